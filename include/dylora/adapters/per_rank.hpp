#ifndef DYLORA_ADAPTERS_PER_RANK_HPP
#define DYLORA_ADAPTERS_PER_RANK_HPP

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <limits>
#include <string_view>
#include <vector>

#include "dylora/adapters/checked.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/named.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

/// An Adapter from its mathematics at one rank: the shortest way to write one of your own.
///
///     struct Mine : PerRank<Mine, double> {      // constructed from in_features, out_features and max_rank
///       …                                        // the parameters, Gradients and members, as of everything trainable
///       void add_forward_at(Index b, In x, Out y) const;
///       void add_backward_at(RankSlice rank, In x, In dy, Gradients& gradients, Out dx) const;
///     };
///
///     add_forward_at        y += Δ_b(x), for all columns of x; b ≥ 1, and no more than components()
///     add_backward_at       gradients += ∂/∂θ for components [rank.trainable_from, rank.active), dx += ∂/∂x
///
/// Both are called for each run of neighbouring columns at one rank, in their order, when everything has been found to fit; what a backward
/// has trained is noted in its gradients. If a forward computes what its backward can use, the adapter says what that is, `using Kept =
/// MatrixX<double>`, and both verbs take it after x or dy: Kept& in the forward, which finds in it what an earlier call left, const Kept&
/// in the backward.
///
/// It may have a name, which messages then begin with, and delta(rank) if it is linear in x. An adapter that is a product of two factors
/// has a faster base (factored.hpp): a layer adds such a product in the pass that its frozen weight makes over the output.
template <class Derived, std::floating_point S>
class PerRank : public Checked<Derived, S> {
 public:
  static constexpr std::string_view name = "adapter";
  using Scalar = S;
  using In = ConstMatrixRef<S>;  ///< features × samples, only read
  using Out = MatrixRef<S>;      ///< features × samples, added to

  struct Workspace {};
  struct Kept {};  ///< nothing, unless the adapter has a Kept of its own

  /// Filled by one add_forward, read by any number of add_backward.
  struct Cache {
    BatchRanks ranks = RankSlice::none();
    Index samples = 0;
    std::vector<typename Derived::Kept> kept;  // of each run that has a component
  };

  /// Throws std::invalid_argument unless in_features and out_features are at least 1 and max_rank is at least 0, which means no adapter.
  PerRank(Index in_features, Index out_features, Index max_rank)
      : in_features_(in_features), out_features_(out_features), max_rank_(max_rank) {
    constexpr Index any = std::numeric_limits<Index>::max();
    require_in_range(in_features, 1, any, detail::named<Derived, ": in_features">());
    require_in_range(out_features, 1, any, detail::named<Derived, ": out_features">());
    require_in_range(max_rank, 0, any, detail::named<Derived, ": max_rank">());
  }

  Index in_features() const { return in_features_; }
  Index out_features() const { return out_features_; }
  Index max_rank() const { return max_rank_; }
  /// Those that every parameter with a rank axis has: max_rank, or fewer once cut (ranks/truncate.hpp).
  Index components() const {
    Index components = max_rank_;
    for_each_parameter(
        [&](Parameter parameter, const auto& p) {
          if (parameter.rank_axis != RankAxis::none) components = std::min(components, detail::component_count(parameter.rank_axis, p));
        },
        self());
    return components;
  }

  using LocalWorkspace<Derived, S>::add_backward;

  /// y += Δ_b(x), where b is the rank of each column.
  ///
  /// x in × n, keep it until add_backward; y out × n, added to; cache overwritten. Throws ShapeError if x or y do not fit,
  /// std::invalid_argument if b > max_rank. Costs add_forward_at for each run; allocates itself only when the cache grows.
  void add_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.samples = 0;  // if this call throws, the cache counts as not filled
    this->check_forward(x, ranks);
    this->check_y(x, y);
    cache.ranks = ranks.at_most(self().components());
    for_each_run(cache.ranks, x.cols(), [&](std::size_t i, Index begin, Index n, RankSlice rank) {
      if (i == cache.kept.size()) cache.kept.emplace_back();
      if constexpr (keeps()) {
        self().add_forward_at(rank.active, x.middleCols(begin, n), cache.kept[i], y.middleCols(begin, n));
      } else {
        self().add_forward_at(rank.active, x.middleCols(begin, n), y.middleCols(begin, n));
      }
    });
    cache.samples = x.cols();
  }

  /// The vector-Jacobian product of add_forward at the cached ranks, run after run.
  ///
  /// x and dy as in add_forward; gradients and dx (in × n) are added to. Throws ShapeError, with nothing added, if something does not fit
  /// or the cache was not filled. Costs add_backward_at for each run.
  template <class Gradients>
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    self().check_backward(x, dy, cache, gradients, workspace);
    this->check_dx(dy, dx);
    for_each_run(cache.ranks, dy.cols(), [&](std::size_t i, Index begin, Index n, RankSlice rank) {
      const auto x_b = x.middleCols(begin, n), dy_b = dy.middleCols(begin, n);
      if constexpr (keeps()) {
        self().add_backward_at(rank, x_b, dy_b, cache.kept[i], gradients, dx.middleCols(begin, n));
      } else {
        self().add_backward_at(rank, x_b, dy_b, gradients, dx.middleCols(begin, n));
      }
      note_trained(rank, gradients);
    });
  }

 private:
  /// Whether the adapter has a Kept of its own.
  static constexpr bool keeps() { return !std::same_as<typename Derived::Kept, Kept>; }

  /// Calls f(i, begin, n, rank) for the i-th run that has a component.
  template <class F>
  static void for_each_run(const BatchRanks& ranks, Index columns, F&& f) {
    std::size_t i = 0;
    ranks.for_each_run(columns, [&](Index begin, Index n, RankSlice rank) {
      if (rank.active > 0) f(i++, begin, n, rank);
    });
  }

  template <class Gradients>
  static void note_trained(RankSlice rank, Gradients& gradients) {
    for_each_parameter<Derived>(
        [&](Parameter parameter, auto& g) {
          if constexpr (requires { g.components; }) {
            if (parameter.rank_axis != RankAxis::none) g.components.insert(rank);
          }
        },
        gradients);
  }

  const Derived& self() const { return static_cast<const Derived&>(*this); }

  Index in_features_, out_features_, max_rank_;
};

}  // namespace dylora

#endif
