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

/// The verbs of a FactoredAdapter, from its parts:
///
///     add_forward  = prepare_forward,  then y  += each term of for_each_forward_term
///     add_backward = check_backward, prepare_backward,  then dx += each term of for_each_backward_term
///
/// A base of the adapter, struct LowRank : Factored<LowRank<S>, S>. The adapter has what Checked asks for, and
///
///     Workspace                                   what lies between prepare_backward and for_each_backward_term
///     prepare_forward(x, ranks, cache)            calls check_forward, fills the cache (overwritten)
///     for_each_forward_term(cache, f)             f(begin, n, term) for each run of n columns: y[:, begin : begin + n] is to have the term
///                                                 (out × n) added; it may refer to the adapter and the cache
///     prepare_backward(x, dy, cache, gradients, workspace)
///                                                 calls check_backward, adds to the gradients, leaves in the workspace what the terms need
///     for_each_backward_term(cache, workspace, f) the same for dx, after prepare_backward with this cache and this workspace
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
    this->check_dx(dy, dx);
    self().prepare_backward(x, dy, cache, gradients, workspace);
    self().for_each_backward_term(cache, workspace, [&](Index begin, Index n, const LowRankTerm<S>& term) {
      add_product(dx.middleCols(begin, n), term.left, term.right, term.scale);
    });
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
