#ifndef DYLORA_ADAPTERS_STACKED_HPP
#define DYLORA_ADAPTERS_STACKED_HPP

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/adapters/adapter.hpp"
#include "dylora/adapters/checked.hpp"
#include "dylora/adapters/factors.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

template <class AdapterOptions>
struct StackedOptions {
  std::vector<AdapterOptions> adapters;  ///< one for each slice, in the order of the rows; max_rank = 0 leaves a slice without an adapter
  std::vector<Index> out_features = {};  ///< the rows of each slice, which make up the weight's; none means slices of one size
};

/// Δ_b(x) = [ Δ_b⁰(x); Δ_b¹(x); … ]: an adapter of its own for each slice of the outputs of one frozen weight, all at the same rank b.
///
/// Where a weight is several projections merged (the q, k and v of GPT-2's c_attn), as loralib's MergedLinear: truncation keeps the first b
/// components of each slice, and every slice is an adapter in ranks/truncate.hpp: "c_attn.0", "c_attn.1" and so on.
///
///     Linear<float, Stacked<LowRank<float>>> c_attn(W, {.adapters = {{.max_rank = 8}, {.max_rank = 0}, {.max_rank = 8}}}, rng);
///
/// A slice that has fewer components than b uses all it has. Dropout goes around it, Dropout<Stacked<…>>: one mask for all slices.
template <class Inner>
  requires Adapter<Inner>
struct Stacked : Checked<Stacked<Inner>, typename Inner::Scalar> {
  using Scalar = typename Inner::Scalar;
  using S = Scalar;
  using Options = StackedOptions<typename Inner::Options>;
  static constexpr std::string_view name = "Stacked";
  static constexpr bool needs_linked_cache = !SelfContained<Inner>;

  struct Gradients {
    std::vector<typename Inner::Gradients> slices;
  };

  struct Workspace {
    std::vector<typename Inner::Workspace> slices;  // at least as many once it was used
  };

  /// Filled by one add_forward, read by any number of add_backward.
  struct Cache {
    Index samples = 0;
    std::vector<typename Inner::Cache> slices;
  };

  std::vector<Inner> slices;  // in the order of their rows

  /// Throws std::invalid_argument if there is none, ShapeError if they read inputs of different sizes.
  explicit Stacked(std::vector<Inner> slices_) : slices(std::move(slices_)) {
    if (slices.empty()) throw std::invalid_argument("Stacked: expected at least one slice, got none");
    for (const Inner& slice : slices) require_equal(slice.in_features(), in_features(), "Stacked: in_features of a slice");
  }

  /// Fresh adapters. Throws ShapeError if the slices do not make up out_features, and as the adapters do.
  Stacked(Index in_features, Index out_features, const Options& options, Rng& rng)
      : Stacked(fresh(in_features, out_features, options, rng)) {}

  Index in_features() const { return slices.front().in_features(); }
  Index out_features() const {
    return std::accumulate(slices.begin(), slices.end(), Index{0},
                           [](Index sum, const Inner& slice) { return sum + slice.out_features(); });
  }
  /// The largest of any slice.
  Index max_rank() const {
    return largest([](const Inner& slice) { return slice.max_rank(); });
  }

  /// y += Δ(x), each slice into its rows of y. Throws ShapeError if x or y do not fit, std::invalid_argument if a rank is above max_rank.
  void add_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.samples = 0;  // if this call throws, the cache counts as not filled
    this->check_forward(x, ranks);
    this->check_y(x, y);
    cache.slices.resize(slices.size());
    for_each_slice([&](std::size_t i, Index begin, Index rows) {
      slices[i].add_forward(x, ranks.at_most(slices[i].max_rank()), cache.slices[i], y.middleRows(begin, rows));
    });
    cache.samples = x.cols();
  }

  using LocalWorkspace<Stacked, S>::add_backward;

  /// The vector-Jacobian product of add_forward at the cached ranks: each slice's, from its rows of dy. Throws ShapeError, with nothing
  /// added, if something does not fit or the cache was not filled.
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    check_backward(x, dy, cache, gradients, workspace);
    this->check_dx(dy, dx);
    if (workspace.slices.size() < slices.size()) workspace.slices.resize(slices.size());
    for_each_slice([&](std::size_t i, Index begin, Index rows) {
      slices[i].add_backward(x, dy.middleRows(begin, rows), cache.slices[i], gradients.slices[i], workspace.slices[i], dx);
    });
  }

  /// Asks every slice.
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& workspace) const {
    require_equal(static_cast<Index>(gradients.slices.size()), static_cast<Index>(slices.size()),
                  "Stacked::add_backward: slices in the gradients");
    this->check_arguments(x, dy, cache.samples, gradients);
    require_equal(static_cast<Index>(cache.slices.size()), static_cast<Index>(slices.size()), "Stacked::add_backward: slices in the cache");
    const typename Inner::Workspace fresh{};
    for_each_slice([&](std::size_t i, Index begin, Index rows) {
      slices[i].check_backward(x, dy.middleRows(begin, rows), cache.slices[i], gradients.slices[i],
                               i < workspace.slices.size() ? workspace.slices[i] : fresh);
    });
  }

  /// Δ_b as a matrix; exactly zero in the rows of a slice without an adapter.
  MatrixX<S> delta(RankSlice rank) const
    requires MergeableAdapter<Inner>
  {
    require_ranks(rank, in_features(), max_rank(), "Stacked::delta");
    MatrixX<S> result(out_features(), in_features());
    for_each_slice([&](std::size_t i, Index begin, Index rows) {
      result.middleRows(begin, rows) = slices[i].delta(rank.at_most(slices[i].max_rank()));
    });
    return result;
  }

  /// The most that any slice has.
  Index components() const
    requires PortableAdapter<Inner>
  {
    return largest([](const Inner& slice) { return slice.components(); });
  }

  /// One pair that is all slices at this rank: their A on top of each other, and B block-diagonal, so that its rank is the sum of theirs.
  /// The scale is theirs where those that have a component agree; else it is 1, and each is multiplied into its block of B.
  LowRankFactors<S> factors(Index rank) const
    requires PortableAdapter<Inner>
  {
    require_in_range(rank, 0, max_rank(), "Stacked::factors: rank");
    std::vector<LowRankFactors<S>> parts;
    std::vector<double> scales;  // of the slices that have a component
    Index total = 0;
    for (const Inner& slice : slices) {
      parts.push_back(slice.factors(std::min(rank, slice.max_rank())));
      total += parts.back().A.rows();
      if (parts.back().A.rows() > 0) scales.push_back(parts.back().scale);
    }
    const bool agree = std::adjacent_find(scales.begin(), scales.end(), std::not_equal_to<>()) == scales.end();
    LowRankFactors<S> whole{RowMatrix<S>(total, in_features()), MatrixX<S>::Zero(out_features(), total),
                            agree && total > 0 ? scales.front() : 1};
    if (total == 0) return whole;  // empty matrices have no address for a block to begin at
    Index first = 0;
    for_each_slice([&](std::size_t i, Index begin, Index rows) {
      const LowRankFactors<S>& part = parts[i];
      whole.A.middleRows(first, part.A.rows()) = part.A;
      whole.B.block(begin, first, rows, part.A.rows()) = (agree ? S(1) : static_cast<S>(part.scale)) * part.B;
      first += part.A.rows();
    });
    return whole;
  }

  /// Becomes slices that are Δ of these factors together, each at its own max_rank. Where B is block-diagonal, as factors() writes it, they
  /// are the blocks, bit for bit; else, as in a pair for the whole weight, each slice has all of A and its rows of B.
  ///
  /// A column of zeros may belong to any block. It goes where it makes the slices those that this adapter has at some rank; else slices
  /// of one rank, of those that have an adapter; else to the slice of the column before it. So fresh factors (B = 0) come back to their
  /// slices. Throws as the slices' set_factors do, with nothing changed.
  void set_factors(LowRankFactors<S> factors)
    requires PortableAdapter<Inner>
  {
    require_equal(factors.A.cols(), in_features(), "Stacked::set_factors: columns of A (in_features)");
    require_equal(factors.B.rows(), out_features(), "Stacked::set_factors: rows of B (out_features)");
    require_equal(factors.B.cols(), factors.A.rows(), "Stacked::set_factors: columns of B (rank) against rows of A");
    const std::vector<Index> ranks = block_ranks(factors.B);
    Stacked changed = *this;
    Index first = 0;
    for_each_slice([&](std::size_t i, Index begin, Index rows) {
      const Index rank = ranks.empty() ? factors.A.rows() : ranks[i];
      changed.slices[i].set_factors({factors.A.middleRows(first, rank),
                                     rank == 0 ? MatrixX<S>(rows, 0) : MatrixX<S>(factors.B.block(begin, first, rows, rank)),
                                     factors.scale});
      if (!ranks.empty()) first += rank;
    });
    *this = std::move(changed);
  }

  static void members(const auto& f, auto&... t) { f(Child<Inner>{}, t.slices...); }

 private:
  static std::vector<Inner> fresh(Index in_features, Index out_features, const Options& options, Rng& rng) {
    const Index count = static_cast<Index>(options.adapters.size());
    std::vector<Index> sizes = options.out_features;
    if (sizes.empty() && count > 0) sizes.assign(options.adapters.size(), out_features / count);
    require_equal(static_cast<Index>(sizes.size()), count, "Stacked: number of slices in out_features, against the adapters");
    require_equal(std::reduce(sizes.begin(), sizes.end()), out_features, "Stacked: out_features of all slices together");
    std::vector<Inner> slices;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      require_in_range(sizes[i], 1, out_features, "Stacked: out_features of a slice");
      slices.emplace_back(in_features, sizes[i], options.adapters[i], rng);
    }
    return slices;
  }

  template <class Count>
  Index largest(Count&& count) const {
    Index most = 0;
    for (const Inner& slice : slices) most = std::max(most, count(slice));
    return most;
  }

  /// Calls f(i, its first row, its rows) for each slice.
  template <class F>
  void for_each_slice(F&& f) const {
    Index begin = 0;
    for (std::size_t i = 0; i < slices.size(); ++i) {
      f(i, begin, slices[i].out_features());
      begin += slices[i].out_features();
    }
  }

  /// The ranks of the blocks that B is made of, one for each slice and in their order; none if it is not.
  std::vector<Index> block_ranks(const MatrixX<S>& B) const {
    std::vector<Index> ranks(slices.size());
    if (B.cols() == 0) return ranks;
    const auto fits = [&] { return std::reduce(ranks.begin(), ranks.end()) == B.cols() && has_blocks(B, ranks); };
    const auto ranks_of = [&](const auto& rank) { std::transform(slices.begin(), slices.end(), ranks.begin(), rank); };
    for (Index rank = 0; rank <= components(); ++rank) {
      ranks_of([&](const Inner& slice) { return std::min(rank, slice.components()); });
      if (fits()) return ranks;
    }
    const auto adapted = std::count_if(slices.begin(), slices.end(), [](const Inner& slice) { return slice.max_rank() > 0; });
    ranks_of([&](const Inner& slice) { return slice.max_rank() > 0 ? B.cols() / adapted : 0; });
    if (fits()) return ranks;
    std::fill(ranks.begin(), ranks.end(), 0);
    std::size_t owner = 0;
    for (Index column = 0; column < B.cols(); ++column) {
      for_each_slice([&](std::size_t i, Index begin, Index rows) {
        if (!B.col(column).segment(begin, rows).isZero(0)) owner = i;
      });
      ++ranks[owner];
    }
    return fits() && !B.isZero(0) ? ranks : std::vector<Index>();
  }

  /// Whether B is 0 but for a block of so many columns in the rows of each slice, one block after the other.
  bool has_blocks(const MatrixX<S>& B, const std::vector<Index>& ranks) const {
    bool zero = true;
    Index first = 0;
    for_each_slice([&](std::size_t i, Index begin, Index rows) {
      const auto columns = B.middleCols(first, ranks[i]);
      zero = zero && columns.topRows(begin).isZero(0) && columns.bottomRows(B.rows() - begin - rows).isZero(0);
      first += ranks[i];
    });
    return zero;
  }
};

}  // namespace dylora

#endif
