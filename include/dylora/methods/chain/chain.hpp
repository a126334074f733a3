#ifndef DYLORA_METHODS_CHAIN_CHAIN_HPP
#define DYLORA_METHODS_CHAIN_CHAIN_HPP

#include <algorithm>
#include <cstddef>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dylora/adapters/adapter.hpp"
#include "dylora/adapters/checked.hpp"
#include "dylora/adapters/factors.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/map_ranks.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/ranks/truncate.hpp"

namespace dylora {

/// Δ_b(x) = Σⱼ Δ_bʲ(x): the links of a chain, all cut to the same rank b. The last one is trained, those before it are frozen.
///
/// Chain of LoRA (Xia et al., arXiv 2401.04151) and PeriodicLoRA (arXiv 2402.16141) without folding links into the weight
/// (methods/chain/fold.hpp): the whole change can still be cut to every rank, which a folded one cannot, for memory and time that grow with
/// the links.
///
///     Linear<float, Chain<LowRank<float>>> layer(W, {.max_rank = 8, .alpha = 16}, rng);
///     …                                                   // train the first link
///     layer.adapter.extend(rng);                          // freeze it; a fresh link, which leaves the function as it is
///     optimizer = AdamW(layer, optimizer.options());
///     gradients = zeros_like(layer);
///
/// Only the last link is a parameter: optimisers see it alone, and a chain is cut (ranks/truncate.hpp) by cutting it, since the links
/// before use no more components than it has. So no link may be larger than one after it; a stage that is to train fewer components draws
/// lower ranks, whose link is the same function as a smaller one. A smaller link uses all it has at ranks above.
///
/// Checkpoints and the files of parameters keep all links, into a chain of as many; factors(), and so the files of adapters, have all as
/// one pair, which set_factors takes as one link.
template <class Inner>
  requires MergeableAdapter<Inner> && PortableAdapter<Inner>
struct Chain : Checked<Chain<Inner>, typename Inner::Scalar> {
  using Scalar = typename Inner::Scalar;
  using S = Scalar;
  using Options = typename Inner::Options;
  static constexpr std::string_view name = "Chain";
  static constexpr bool needs_linked_cache = !SelfContained<Inner>;

  struct Gradients {
    typename Inner::Gradients last;
  };

  /// Once it was used, at least as many of each as there are links.
  struct Workspace {
    std::vector<typename Inner::Workspace> links;
    std::vector<typename Inner::Gradients> frozen;  // of the links before the last one, which learn nothing: written and never read
  };

  /// Filled by one add_forward, read by any number of add_backward.
  struct Cache {
    Index samples = 0;
    std::vector<typename Inner::Cache> links;
    std::vector<Index> components;  // of each link
  };

  std::vector<Inner> links;  // the last one is trained
  Options options;           // of a fresh link

  /// A chain of one fresh link. Throws as Inner does.
  Chain(Index in_features, Index out_features, Options options_, Rng& rng) : options(std::move(options_)) {
    links.emplace_back(in_features, out_features, options, rng);
  }

  /// From links, of which the last one is trained. Throws std::invalid_argument if there is none or one is larger than the next, ShapeError
  /// if their features differ.
  Chain(std::vector<Inner> links_, Options options_) : links(std::move(links_)), options(std::move(options_)) {
    if (links.empty()) throw std::invalid_argument("Chain: expected at least one link, got none");
    for (std::size_t j = 0; j < links.size(); ++j) {
      require_equal(links[j].in_features(), in_features(), "Chain: in_features of a link");
      require_equal(links[j].out_features(), out_features(), "Chain: out_features of a link");
      if (j > 0) require_as_large(links[j], links[j - 1].max_rank(), "Chain");
    }
  }

  Index in_features() const { return links.back().in_features(); }
  Index out_features() const { return links.back().out_features(); }
  Index max_rank() const { return links.back().max_rank(); }      ///< of the last link, as no other is larger
  Index components() const { return links.back().components(); }  ///< of the last link: the others use no more

  /// Freezes the last link and adds a fresh one after it. Gradients and optimisers made before are of the last link. Throws as Inner does,
  /// with nothing changed.
  void extend(Rng& rng) { extend(options, rng); }
  /// With other options, such as another alpha. Also throws std::invalid_argument, with nothing changed, if their link is smaller than the
  /// last one.
  void extend(const Options& of_link, Rng& rng) {
    Inner fresh(in_features(), out_features(), of_link, rng);
    require_as_large(fresh, max_rank(), "Chain::extend");
    std::vector<Inner> longer = links;
    for (Inner& link : longer) truncate(link, components());
    longer.push_back(std::move(fresh));
    links = std::move(longer);
  }

  /// y += Δ(x). Throws ShapeError if x or y do not fit, std::invalid_argument if a rank is above max_rank. Costs what the links cost.
  void add_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.samples = 0;  // if this call throws, the cache counts as not filled
    this->check_forward(x, ranks);
    this->check_y(x, y);
    cache.links.resize(links.size());
    const BatchRanks limited = ranks.at_most(components());
    const BatchRanks frozen =
        detail::map_ranks(limited, [](RankSlice rank) { return rank.active == 0 ? rank : RankSlice(rank.active, rank.active); });
    cache.components.clear();
    for (std::size_t j = 0; j < links.size(); ++j) {
      const BatchRanks& of_link = j + 1 == links.size() ? limited : frozen;
      links[j].add_forward(x, of_link.at_most(links[j].max_rank()), cache.links[j], y);
      cache.components.push_back(links[j].components());
    }
    cache.samples = x.cols();
  }

  using LocalWorkspace<Chain, S>::add_backward;

  /// The vector-Jacobian product of add_forward at the cached ranks: dx += every link's, gradients += those of the last. Throws ShapeError,
  /// with nothing added, if something does not fit or the cache was not filled.
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    check_backward(x, dy, cache, gradients, workspace);
    this->check_dx(dy, dx);
    const std::size_t last = links.size() - 1;
    if (workspace.links.size() < links.size()) workspace.links.resize(links.size());
    if (workspace.frozen.size() < last) workspace.frozen.resize(last);
    for (std::size_t j = 0; j < last; ++j) {
      if (!fits(links[j], workspace.frozen[j])) workspace.frozen[j] = zeros_like(links[j]);
    }
    links[last].add_backward(x, dy, cache.links[last], gradients.last, workspace.links[last], dx);
    for (std::size_t j = last; j-- > 0;) links[j].add_backward(x, dy, cache.links[j], workspace.frozen[j], workspace.links[j], dx);
  }

  /// Asks every link.
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& workspace) const {
    this->check_arguments(x, dy, cache.samples, gradients);
    require_equal(static_cast<Index>(cache.links.size()), static_cast<Index>(links.size()), "Chain::add_backward: links in the cache");
    const std::size_t last = links.size() - 1;
    for (std::size_t j = 0; j < last; ++j)
      require_equal(cache.components[j], links[j].components(), "Chain::add_backward: components of a frozen link, against the cache");
    const typename Inner::Workspace fresh{};
    const auto of_link = [&](std::size_t j) -> const typename Inner::Workspace& {
      return j < workspace.links.size() ? workspace.links[j] : fresh;
    };
    links[last].check_backward(x, dy, cache.links[last], gradients.last, of_link(last));
    for (std::size_t j = last; j-- > 0;) {
      const bool made = j < workspace.frozen.size() && fits(links[j], workspace.frozen[j]);
      links[j].check_backward(x, dy, cache.links[j], made ? workspace.frozen[j] : zeros_like(links[j]), of_link(j));
    }
  }

  /// Σⱼ Δ_bʲ as a matrix.
  MatrixX<S> delta(RankSlice rank) const {
    require_ranks(rank, in_features(), max_rank(), "Chain::delta");
    MatrixX<S> sum = MatrixX<S>::Zero(out_features(), in_features());
    for (const Inner& link : links) sum += link.delta(rank.at_most(components()).at_most(link.max_rank()));
    return sum;
  }

  /// One pair that is all links at this rank: their A on top of each other and their B side by side, first link first. The scale is theirs
  /// where those that have a component agree; else it is 1, and each is multiplied into its columns of B.
  LowRankFactors<S> factors(Index rank) const {
    require_in_range(rank, 0, max_rank(), "Chain::factors: rank");
    std::vector<LowRankFactors<S>> parts;
    Index total = 0;
    bool agree = true;
    for (const Inner& link : links) {
      LowRankFactors<S> part = link.factors(std::min({rank, components(), link.max_rank()}));
      if (part.A.rows() == 0) continue;
      total += part.A.rows();
      agree = agree && (parts.empty() || part.scale == parts.front().scale);
      parts.push_back(std::move(part));
    }
    LowRankFactors<S> whole{RowMatrix<S>(total, in_features()), MatrixX<S>(out_features(), total),
                            agree && total > 0 ? parts.front().scale : 1};
    Index first = 0;
    for (const LowRankFactors<S>& part : parts) {
      whole.A.middleRows(first, part.A.rows()) = part.A;
      whole.B.middleCols(first, part.A.rows()) = (agree ? S(1) : static_cast<S>(part.scale)) * part.B;
      first += part.A.rows();
    }
    return whole;
  }

  /// Becomes a chain of one link with these factors, whoever wrote them: nothing in a pair says where one link of a chain ends, and so it
  /// is at its full rank that the link is what factors() was made of, not below. Throws as Inner::set_factors does, with nothing changed.
  void set_factors(LowRankFactors<S> factors) {
    Inner only = links.back();
    only.set_factors(std::move(factors));
    links = {std::move(only)};
  }

  static void members(const auto& f, auto&... t) {
    f(Child<Inner>{}, last(t)...);
    f(Constant{"links"}, [](auto& self) { return std::span(self.links).first(self.links.size() - 1); });
  }

 private:
  template <class T>
  static auto& last(T& t) {
    if constexpr (requires { t.links; }) {
      return t.links.back();
    } else {
      return t.last;
    }
  }

  static void require_as_large(const Inner& link, Index before, const char* what) {
    if (link.max_rank() >= before) return;
    throw std::invalid_argument(std::string(what) + ": max_rank of a link: expected at least that of the link before it, " +
                                std::to_string(before) + ", got " + std::to_string(link.max_rank()));
  }

  /// Whether these are of the shapes that zeros_like makes for the link.
  static bool fits(const Inner& link, const typename Inner::Gradients& gradients) {
    bool same = true;
    for_each_parameter([&](Parameter, const auto& p, const auto& g) { same = same && p.rows() == g.rows() && p.cols() == g.cols(); }, link,
                       gradients);
    return same;
  }
};

}  // namespace dylora

#endif
