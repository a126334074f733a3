#ifndef DYLORA_ADAPTERS_FACTORED_HPP
#define DYLORA_ADAPTERS_FACTORED_HPP

#include <algorithm>
#include <concepts>

#include "dylora/adapters/checked.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/named.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"

namespace dylora {

/// y += the term of each run, after the adapter's prepare_forward has filled the cache.
template <class A, class S>
void add_forward_terms(const A& adapter, const typename A::Cache& cache, MatrixRef<S> y) {
  for (const RankRun& run : cache.ranks.runs(cache.samples)) {
    const LowRankTerm<S> term = adapter.forward_term(cache, run);
    add_product(y.middleCols(run.begin, run.count), term.left, term.right, term.scale);
  }
}

/// dx += the term of each run, after the adapter's prepare_backward has left them in the workspace.
template <class A, class S>
void add_backward_terms(const A& adapter, const typename A::Cache& cache, const typename A::Workspace& workspace, MatrixRef<S> dx) {
  for (const RankRun& run : cache.ranks.runs(cache.samples)) {
    const LowRankTerm<S> term = adapter.backward_term(cache, workspace, run);
    add_product(dx.middleCols(run.begin, run.count), term.left, term.right, term.scale);
  }
}

/// The verbs of a FactoredAdapter, from its parts:
///
///     add_forward  = prepare_forward,                   then y  += forward_term of each run
///     add_backward = check_backward, prepare_backward,  then dx += backward_term of each run
///
/// A base of the adapter, struct LowRank : Factored<LowRank<S>, S>. The adapter has what Checked asks for, and
///
///     Workspace                                   what lies between prepare_backward and backward_term
///     prepare_forward(x, ranks, cache)            calls check_forward, fills the cache (overwritten)
///     forward_term(cache, run)                    the term, out × run.count, that y is to have added for a run of the cached ranks; it may
///                                                 refer to the adapter and the cache, and is returned as it is made, never
///                                                 copied (LowRankTerm says why)
///     prepare_backward(x, dy, cache, gradients, workspace)
///                                                 calls check_backward, adds to the gradients, leaves in the workspace what the terms need
///     backward_term(cache, workspace, run)        the same for dx, after prepare_backward with this cache and this workspace
///
/// A layer calls the parts itself where its frozen weight can take a term along (layers/linear.hpp). Nothing here is virtual or stored.
template <class Derived, std::floating_point S>
struct Factored : Checked<Derived, S> {
  using LocalWorkspace<Derived, S>::add_backward;

  /// y += Δ_b(x), where b is the rank of each column.
  ///
  /// x in × n, keep it until add_backward; y out × n, added to; cache overwritten. Throws ShapeError if x or y do not fit,
  /// std::invalid_argument if b > max_rank. Costs what prepare_forward does and the product of each term.
  template <class Cache>
  void add_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    this->check_y(x, y);
    self().prepare_forward(x, ranks, cache);
    add_forward_terms<Derived, S>(self(), cache, y);
  }

  /// The vector-Jacobian product of add_forward at the cached ranks, run after run; its formula is beside the adapter's prepare_backward.
  ///
  /// x and dy as in add_forward; gradients and dx (in × n) are added to. Throws ShapeError, with nothing added, if something does not fit
  /// or the cache was not filled. Costs what prepare_backward does and the product of each term. Allocates only when the workspace grows.
  template <class Cache, class Gradients, class Workspace>
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    self().check_backward(x, dy, cache, gradients, workspace);
    this->check_dx(dy, dx);
    self().prepare_backward(x, dy, cache, gradients, workspace);
    add_backward_terms<Derived, S>(self(), cache, workspace, dx);
  }

  /// Δ_b as a matrix, out × in: the product of the adapter's factors(b).
  MatrixX<S> delta(RankSlice rank) const
    requires requires(const Derived& adapter, Index b) { adapter.factors(b); }
  {
    require_ranks(rank, self().in_features(), self().max_rank(), detail::named<Derived, "::delta">());
    const auto product = self().factors(std::min(rank.active, self().max_rank()));
    MatrixX<S> result(self().out_features(), self().in_features());
    set_product(result, product.B, product.A, static_cast<S>(product.scale));
    return result;
  }

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }
};

}  // namespace dylora

#endif
