#ifndef DYLORA_METHODS_RESLORA_RESIDUAL_LOW_RANK_HPP
#define DYLORA_METHODS_RESLORA_RESIDUAL_LOW_RANK_HPP

#include <algorithm>
#include <concepts>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "dylora/adapters/factored.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/buffer.hpp"
#include "dylora/linalg/product.hpp"
#include "dylora/methods/reslora/shortcut.hpp"

namespace dylora {

/// Δ of link n in a chain of adapters, where other layers may lie between a link's output and the next one's input. With s = s(b) and the
/// first b components of each link:
///
///     input     s · B_n · A_n · (x_n + x_{n−1}),  for the first link 2 s · B_0 · A_0 · x_0
///     block     s · (Σ_q B_q · A_q) · x_n         q from n back to n − reach, or to 0
///     middle    s · B_n · (Σ_q A_q · x_q)
///
/// ResLoRA (Shi et al., arXiv 2402.18039, section 3; the scale as in the released code, the paper leaves it out). In use, with the links,
/// their caches, their gradients and their workspaces in a vector each, and link_chain(...) of methods/reslora/link.hpp:
///
///     link_chain(chain, caches);                                                // then the forwards, from the first link to the last
///     chain[n].apply(x, 4, caches[n], y);
///     link_chain(gradients, workspaces);                                        // then the backwards, from the last link to the first
///     chain[n].set_backward(x, dy, caches[n], gradients[n], workspaces[n], dx);
///
/// No input is kept for another link: what passes between them is b × n. (For an input shortcut link n − 1 computes A_n x_{n−1} in one
/// product with its own, and adds the part of x_{n−1} to dA_n in its backward.) A link that is called out of turn, or would read what an
/// earlier batch has left, refuses: a forward is repeated for the whole chain or not at all. Merged as a chain only
/// (methods/reslora/merge.hpp).
template <std::floating_point S, Shortcut shortcut>
struct ResidualLowRank : Factored<ResidualLowRank<S, shortcut>, S> {
  static constexpr std::string_view name = "ResidualLowRank";
  static constexpr bool needs_linked_cache = true;
  using Scalar = S;
  using Options = ResidualOptions;
  using Gradients = detail::ResidualGradients<S>;
  using Workspace = detail::ResidualWorkspace<S>;
  using Cache = detail::ResidualCache<S, ResidualLowRank>;
  static constexpr Shortcut kind = shortcut;

  LowRank<S> inner;
  Index reach, position;

  /// As LowRank: A uniform, B = 0. Throws std::invalid_argument for its options, and unless reach ≥ −1 and position ≥ 0.
  ResidualLowRank(Index in_features, Index out_features, Options options, Rng& rng)
      : ResidualLowRank(LowRank<S>(in_features, out_features, options.adapter, rng), options.reach, options.position) {}
  ResidualLowRank(LowRank<S> inner_, Index reach_, Index position_) : inner(std::move(inner_)), reach(reach_), position(position_) {
    require_option(reach >= -1, static_cast<double>(reach), "ResidualLowRank: reach", "-1 (all earlier links) or more");
    require_option(position >= 0, static_cast<double>(position), "ResidualLowRank: position", "0 (the first link) or more");
  }

  Index in_features() const { return inner.in_features(); }
  Index out_features() const { return inner.out_features(); }
  Index max_rank() const { return inner.max_rank(); }

  /// Of so many links before or after this one, those that it shares something with.
  Index within_reach(Index links) const {
    if (shortcut == Shortcut::input) return std::min<Index>(links, 1);
    return reach < 0 ? links : std::min(links, reach);
  }

  /// Throws ShapeError unless this one and a link within its reach are of one shape: in_features and components, and out_features too but
  /// for an input shortcut.
  void require_alike(const ResidualLowRank& other) const {
    for (const LowRank<S>* factors : {&inner, &other.inner})
      require_equal(factors->B.cols(), factors->A.rows(), "ResidualLowRank: columns of B (rank) against rows of A");
    require_equal(other.inner.components(), inner.components(), "ResidualLowRank: components of a linked adapter, against another's");
    require_equal(other.max_rank(), max_rank(), "ResidualLowRank: max_rank of a linked adapter, against another's");
    require_equal(other.in_features(), in_features(), "ResidualLowRank: in_features of a linked adapter, against another's");
    if (shortcut == Shortcut::input) return;
    require_equal(other.out_features(), out_features(), "ResidualLowRank: out_features of a linked adapter, against another's");
  }

  /// y += Δ(x), each column at its rank: what B meets, and what it takes from the links within reach, into the cache (overwritten).
  ///
  /// Also throws ShapeError or std::invalid_argument unless the cache was linked and the links within reach have just been called with as
  /// many samples at the same ranks. With the term, costs 2·b·n·(in + out) flops, with 2·in for input, times the links taken in for block.
  void prepare_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const {
    cache.samples = 0;  // if this call throws, the cache counts as not filled
    this->check_forward(x, ranks);
    cache.ranks = ranks.at_most(inner.components());
    require_alike(*this);
    cache.require_linked(*this);
    const Index reached = within_reach(position), links = readers(cache), highest = cache.ranks.highest();
    cache.require_earlier(reached, x.cols());
    if (links > 1) gather(links, cache);
    auto a = cache.a.resize(links * highest, x.cols());
    cache.ranks.for_each_run(x.cols(), [&](Index begin, Index n, RankSlice rank) {
      const Index rows = links * rank.active;
      if (rows > 0) set_dot_products(a.block(0, begin, rows, n), all_A(cache).leftCols(rows).transpose(), x.middleCols(begin, n));
    });
    if constexpr (shortcut != Shortcut::block) {
      auto h = cache.h.resize(highest, x.cols());
      h = detail::rows_of_link(a, 0, links);
      const Cache* from = cache.previous;
      constexpr Index parts = shortcut == Shortcut::input ? 2 : 1;  // of what an earlier link has computed; the last is for this one
      for (Index k = 0; k < reached; ++k, from = from->previous) h += detail::rows_of_link(from->a.view(), parts - 1, parts);
      if (doubles()) h *= 2;
    }
    cache.pass = reached > 0 ? cache.previous->pass : cache.pass + 1;
    cache.samples = x.cols();
  }

  LowRankTerm<S> forward_term(const Cache& cache, const RankRun& run) const {
    const Index b = run.rank.active, columns = writers() * b;
    return {all_B(cache).leftCols(columns), met_by_B(cache).block(0, run.begin, columns, run.count), b > 0 ? inner.scale(b) : S(0)};
  }

  /// Throws as Factored's, and ShapeError if the cache or the workspace is of another batch, or unless the workspace was linked and each
  /// later link within reach was called since this one was; std::invalid_argument if it was not linked with these gradients.
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& workspace) const {
    require_alike(*this);
    this->check_call(x, dy, cache, gradients, inner.components());
    require_equal(cache.earlier, position, "ResidualLowRank::add_backward: earlier links of the cache");
    require_equal(cache.a.rows(), readers(cache) * cache.ranks.highest(), "ResidualLowRank::add_backward: rank of the cached A x");
    workspace.require_linked(position, gradients);
    require_equal(workspace.returned, within_reach(cache.later),
                  "ResidualLowRank::add_backward: later links whose backward was called (they come before this one)");
    for (Index k = 0; k <= within_reach(position); ++k) {
      const Workspace& to = workspace.back(k);
      to.require_batch(cache.ranks, cache.samples);
      if (k > 0 && shortcut == Shortcut::block) require_shapes(*this, "ResidualLowRank::add_backward: gradient of", *to.gradients);
    }
  }

  /// As far as the chain's cached forwards pass through this link's x and dy. With h_n what B_n meets, dh_n = s · B_nᵀ · dy_n (twice that
  /// for the first link of an input chain), and for the trained components:
  ///
  ///     input     dB_n += s · dy_n · h_nᵀ          dA_n += dh_n · (x_n + x_{n−1})ᵀ       dx_n += A_nᵀ · dh_n + A_{n+1}ᵀ · dh_{n+1}
  ///     block     dB_q += s · dy_n · (A_q x_n)ᵀ    dA_q += s · B_qᵀ · dy_n · x_nᵀ        dx_n += Σ_q A_qᵀ · s · B_qᵀ · dy_n
  ///     middle    dB_n += s · dy_n · h_nᵀ          dA_n += da_n · x_nᵀ                   dx_n += A_nᵀ · da_n,  da_n = Σ_{q ≥ n} dh_q
  ///
  /// Complete when every link has been called, from the last to the first. With the term, costs twice the flops of the forward; keeps
  /// b·(in + out) values for each run of ranks in the workspace, and allocates only when it grows.
  void prepare_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    check_backward(x, dy, cache, gradients, workspace);
    const BatchRanks& ranks = cache.ranks;
    auto dh = workspace.dh.resize(writers() * ranks.highest(), dy.cols());
    ranks.for_each_run(dy.cols(), [&](Index begin, Index n, RankSlice rank) {
      const Index b = rank.active, rows = writers() * b;
      if (b == 0) return;
      const S scale = doubles() ? 2 * inner.scale(b) : inner.scale(b);
      set_dot_products(dh.block(0, begin, rows, n), all_B(cache).leftCols(rows).transpose(), dy.middleCols(begin, n), scale);
      gradients.inner.A.components.insert(rank);
      gradients.inner.B.components.insert(rank);
    });
    if constexpr (shortcut == Shortcut::block) {
      if (workspace.returned == 0) workspace.clear_sums(ranks, dy.cols(), in_features(), out_features());
      for (Index k = 1; k <= within_reach(position); ++k) {
        if (workspace.leave(k, ranks, dy.cols())) workspace.back(k).clear_sums(ranks, dy.cols(), in_features(), out_features());
      }
    } else {
      workspace.clear_sums(ranks, dy.cols(), in_features(), out_features());
      for (Index k = 1; k <= within_reach(position); ++k) {
        Buffer<S>& received = workspace.back(k).received;
        if (workspace.leave(k, ranks, dy.cols())) received.resize(dh.rows(), dh.cols()).setZero();
        received.view() += dh;
      }
      take_back(workspace);
    }
    detail::add_to_sums<S>(
        ranks, dy, met_by_B(cache), writers(), workspace.product, [&](Index b) { return inner.scale(b); },
        [&](Index j) -> Buffer<S>& { return workspace.back(j).dB_sums; });
    detail::add_to_sums<S>(
        ranks, x, met_by_x(cache, workspace), readers(cache), workspace.product, [](Index) { return S(1); },
        [&](Index j) -> Buffer<S>& { return reader(workspace, j).dA_sums; });
    workspace.add_dB(ranks, dy.cols(), gradients);
    // Of an input chain, this link has been the last to contribute to the dA of the next one.
    if (shortcut != Shortcut::input || position == 0) workspace.add_dA(ranks, dy.cols(), gradients);
    if (shortcut == Shortcut::input && workspace.returned > 0) workspace.sender->add_dA(ranks, dy.cols(), *workspace.sender->gradients);
    workspace.returned = 0;
  }

  LowRankTerm<S> backward_term(const Cache& cache, const Workspace& workspace, const RankRun& run) const {
    const Index columns = readers(cache) * run.rank.active;
    return {all_A(cache).leftCols(columns), met_by_x(cache, workspace).block(0, run.begin, columns, run.count)};
  }

  static void members(const auto& f, auto&... t) {
    f(Child<LowRank<S>>{}, t.inner...);
    f(Setting{"shortcut"}, [](const auto&) { return static_cast<int>(shortcut); });
    f(Setting{"reach"}, &ResidualLowRank::reach);
    f(Setting{"position"}, &ResidualLowRank::position);
  }

 private:
  using ConstView = typename Buffer<S>::ConstView;

  bool doubles() const { return shortcut == Shortcut::input && position == 0; }

  /// How many links have a B that writes this one's y: itself, and for a block shortcut those before it.
  Index writers() const { return shortcut == Shortcut::block ? 1 + within_reach(position) : 1; }

  /// How many have an A that reads this one's x: the same, or for an input shortcut itself and the next one.
  Index readers(const Cache& cache) const { return shortcut == Shortcut::input ? 1 + within_reach(cache.later) : writers(); }
  static const ResidualLowRank& reader(const Cache& cache, Index j) {
    if (shortcut == Shortcut::input && j > 0) return *cache.next;
    const Cache* from = &cache;
    for (; j > 0; --j) from = from->previous;
    return *from->owner;
  }
  static Workspace& reader(Workspace& workspace, Index j) {
    return shortcut == Shortcut::input && j > 0 ? *workspace.sender : workspace.back(j);
  }

  ConstView all_A(const Cache& cache) const {
    return readers(cache) > 1 ? cache.A.view() : ConstView(inner.A.data(), in_features(), inner.components());
  }
  ConstView all_B(const Cache& cache) const {
    return writers() > 1 ? cache.B.view() : ConstView(inner.B.data(), out_features(), inner.components());
  }
  static ConstView met_by_B(const Cache& cache) { return shortcut == Shortcut::block ? cache.a.view() : cache.h.view(); }
  ConstView met_by_x(const Cache& cache, const Workspace& workspace) const {
    return shortcut == Shortcut::input && readers(cache) > 1 ? workspace.da.view() : workspace.dh.view();
  }

  /// The factors of the links that take part into the cache, component by component.
  void gather(Index links, Cache& cache) const {
    const Index highest = cache.ranks.highest();
    auto A = cache.A.resize(in_features(), links * highest), B = cache.B.resize(out_features(), writers() > 1 ? links * highest : 0);
    for (Index j = 0; j < links; ++j) {
      const ResidualLowRank& from = reader(cache, j);
      require_alike(from);
      for (Index i = 0; i < highest; ++i) {
        A.col(i * links + j) = from.inner.A.row(i).transpose();
        if (writers() > 1) B.col(i * links + j) = from.inner.B.col(i);
      }
    }
  }

  /// What the later links have sent joins dh: from now on it is what meets x.
  void take_back(Workspace& workspace) const {
    if (workspace.returned == 0) return;
    auto dh = workspace.dh.view();
    if constexpr (shortcut == Shortcut::input) {
      auto da = workspace.da.resize(2 * dh.rows(), dh.cols());
      detail::rows_of_link(da, 0, 2) = dh;
      detail::rows_of_link(da, 1, 2) = workspace.received.view();
    } else {
      dh += workspace.received.view();
    }
  }
};

}  // namespace dylora

#endif
