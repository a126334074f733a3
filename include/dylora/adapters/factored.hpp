#ifndef DYLORA_ADAPTERS_FACTORED_HPP
#define DYLORA_ADAPTERS_FACTORED_HPP

#include <algorithm>
#include <concepts>
#include <string_view>

#include "dylora/adapters/local_workspace.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/named.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"

namespace dylora {

/// The verbs of a FactoredAdapter, from its parts:
///
///     add_forward  = prepare_forward,  then y  += each term of for_each_forward_term
///     add_backward = check_backward, prepare_backward,  then dx += each term of for_each_backward_term
///
/// A base of the adapter, struct LowRank : Factored<LowRank<S>, S>. The adapter has
///
///     static constexpr std::string_view name      what messages begin with
///     Cache with ranks and samples                those that prepare_forward was called with, ranks no higher than components()
///     Workspace                                   what lies between prepare_backward and for_each_backward_term
///     in_features, out_features, max_rank         as every Adapter; and components(), unless it has a check_backward of its own
///     prepare_forward(x, ranks, cache)            calls check_forward, fills the cache (overwritten)
///     for_each_forward_term(cache, f)             f(begin, n, term) for each run of n columns: y[:, begin : begin + n] is to have the term
///                                                 (out × n) added; it may refer to the adapter and the cache
///     prepare_backward(x, dy, cache, gradients, workspace)
///                                                 calls check_backward, adds to the gradients, leaves in the workspace what the terms need
///     for_each_backward_term(cache, workspace, f) the same for dx, after prepare_backward with this cache and this workspace
///
/// A layer calls the parts itself where its frozen weight can take a term along (layers/linear.hpp). An adapter that has more to refuse than
/// check_call does has a check_backward of its own, which hides this one and calls check_call. Nothing here is virtual or stored.
template <class Derived, std::floating_point S>
struct Factored : LocalWorkspace<Derived, S> {
  using LocalWorkspace<Derived, S>::add_backward;

  /// y += Δ_b(x), where b is the rank of each column.
  ///
  /// x in × n, keep it until add_backward; y out × n, added to; cache overwritten. Throws ShapeError if x or y do not fit,
  /// std::invalid_argument if b > max_rank. Costs what prepare_forward does and the product of each term.
  template <class Cache>
  void add_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    require_equal(y.rows(), self().out_features(), named<"::add_forward: rows of y">());
    require_equal(y.cols(), x.cols(), named<"::add_forward: samples in y">());
    self().prepare_forward(x, ranks, cache);
    self().for_each_forward_term(cache, [&](Index begin, Index n, const LowRankTerm<S>& term) {
      add_product(y.middleCols(begin, n), term.left, term.right, term.scale);
    });
  }

  /// The vector-Jacobian product of add_forward at the cached ranks, run after run; its formula is beside the adapter's prepare_backward.
  ///
  /// x and dy as in add_forward; gradients and dx (in × n) are added to. Throws ShapeError, with nothing added, if something does not fit or
  /// the cache was not filled. Costs what prepare_backward does and the product of each term. Allocates only when the workspace grows.
  template <class Cache, class Gradients, class Workspace>
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    self().check_backward(x, dy, cache, gradients, workspace);
    require_equal(dx.rows(), self().in_features(), named<"::add_backward: rows of dx">());
    require_equal(dx.cols(), dy.cols(), named<"::add_backward: samples in dx">());
    self().prepare_backward(x, dy, cache, gradients, workspace);
    self().for_each_backward_term(cache, workspace, [&](Index begin, Index n, const LowRankTerm<S>& term) {
      add_product(dx.middleCols(begin, n), term.left, term.right, term.scale);
    });
  }

  /// Throws what add_backward would throw for these arguments, and touches nothing.
  template <class Cache, class Gradients, class Workspace>
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& /*workspace*/) const {
    check_call(x, dy, cache, gradients, self().components());
  }

  /// Δ_b as a matrix, out × in: the product of the adapter's factors(b).
  Matrix<S> delta(RankSlice rank) const
    requires requires(const Derived& adapter, Index b) { adapter.factors(b); }
  {
    require_ranks(rank, self().in_features(), self().max_rank(), named<"::delta">());
    const auto product = self().factors(std::min(rank.active, self().max_rank()));
    Matrix<S> result(self().out_features(), self().in_features());
    set_product(result, product.B, product.A, static_cast<S>(product.scale));
    return result;
  }

 protected:
  /// Throws ShapeError unless x has in_features rows and the ranks are for its columns, std::invalid_argument if one is above max_rank.
  void check_forward(ConstMatrixRef<S> x, const BatchRanks& ranks) const {
    require_ranks(ranks, x.cols(), self().max_rank(), named<"::add_forward">());
    require_equal(x.rows(), self().in_features(), named<"::add_forward: rows of x">());
  }

  /// What every backward refuses: dy, x and gradients that do not fit the adapter, a cache that was not filled with as many samples, and one
  /// whose ranks are above the components that there are now.
  template <class Cache, class Gradients>
  void check_call(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients, Index components) const {
    require_equal(dy.rows(), self().out_features(), named<"::add_backward: rows of dy">());
    require_equal(dy.cols(), cache.samples, named<"::add_backward: samples in dy, against the cache (was it filled by add_forward?)">());
    require_equal(x.rows(), self().in_features(), named<"::add_backward: rows of x">());
    require_equal(x.cols(), dy.cols(), named<"::add_backward: samples in x">());
    require_shapes(self(), named<"::add_backward: gradient of">(), gradients);
    require_ranks(cache.ranks, dy.cols(), components, named<"::add_backward: the cache">());
    require_in_range(cache.ranks.highest(), 0, components, named<"::add_backward: rank of the cache">());  // cut to nothing since
  }

  /// The adapter's name and then the text, as messages begin.
  template <detail::Literal text>
  static constexpr std::string_view named() {
    return detail::named<Derived, text>();
  }

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }
};

}  // namespace dylora

#endif
