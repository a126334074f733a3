#ifndef DYLORA_ADAPTERS_ADAPTER_HPP
#define DYLORA_ADAPTERS_ADAPTER_HPP

#include <concepts>
#include <string_view>
#include <type_traits>
#include <utility>

#include "dylora/adapters/factors.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"

/// What a layer, a file or an optimiser asks of an adapter. A type needs no base class and no registration: whatever answers these calls
/// fits.
namespace dylora {

/// A trainable correction Δ of a frozen weight. Both verbs add into their outputs. What a call keeps is the caller's: the Cache, what a
/// forward leaves for its backward; the Gradients, what the backward calls of a step add up; the Workspace, the scratch memory of a
/// backward, whose contents matter to no other call. One workspace serves any number of calls, one at a time, and allocates only when it
/// grows.
///
/// check_backward(x, dy, cache, gradients, workspace) throws what add_backward would throw for these arguments, and touches nothing: who
/// adds with several adapters asks them all first. It is not asked about dx, which is the caller's, in × n.
///
/// Its parameters may be cut to their first b components (ranks/truncate.hpp): it then still accepts every rank up to max_rank, and
/// computes at those above b what it does at b.
template <class A>
concept Adapter = Trainable<A> && requires(const A& adapter, ConstMatrixRef<typename A::Scalar> in, MatrixRef<typename A::Scalar> out,
                                           const BatchRanks& ranks, typename A::Cache& cache, const typename A::Cache& filled,
                                           typename A::Gradients& gradients, typename A::Workspace& workspace) {
  { adapter.in_features() } -> std::same_as<Index>;
  { adapter.out_features() } -> std::same_as<Index>;
  { adapter.max_rank() } -> std::same_as<Index>;
  adapter.add_forward(in, ranks, cache, out);                       // (x, …, y)           y += Δ(x), each column at its rank
  adapter.add_backward(in, in, filled, gradients, workspace, out);  // (x, dy, …, dx)      gradients += ∂/∂θ, dx += ∂/∂x
  adapter.check_backward(in, in, filled, std::as_const(gradients), std::as_const(workspace));
};

/// An adapter, a projection or a layer whose cache and workspace need nothing from the caller, so that it can be called with some that were
/// just made, or without. Others declare `static constexpr bool needs_linked_cache = true;`: their caller connects the cache to what lies
/// outside of it, before each forward or once for all, and the workspace before each backward.
template <class T>
concept SelfContained = !requires { requires T::needs_linked_cache; };

/// An adapter whose correction is a low-rank term for each run of equal ranks, left to the caller to add: each verb of Adapter is one of
/// these followed by the addition of the terms of cache.ranks.runs(cache.samples), the ranks and samples of the forward (factored.hpp).
template <class A>
concept FactoredAdapter =
    Adapter<A> && requires(const A& adapter, ConstMatrixRef<typename A::Scalar> in, const BatchRanks& ranks, typename A::Cache& cache,
                           const typename A::Cache& filled, typename A::Gradients& gradients, typename A::Workspace& workspace,
                           const RankRun& run) {
      adapter.prepare_forward(in, ranks, cache);                                               // (x, …)
      { adapter.forward_term(filled, run) } -> std::same_as<LowRankTerm<typename A::Scalar>>;  // y += this
      adapter.prepare_backward(in, in, filled, gradients, workspace);                          // (x, dy, …)    gradients += ∂/∂θ
      { adapter.backward_term(filled, workspace, run) } -> std::same_as<LowRankTerm<typename A::Scalar>>;  // dx += this
      filled.ranks.runs(filled.samples);
    };

/// A frozen weight `base` and the `adapter` that corrects it.
template <class L>
concept AdaptedLayer = requires(L& layer) {
  layer.base;
  requires Adapter<std::remove_cvref_t<decltype(layer.adapter)>>;
};

/// An adapter that is linear in its input, so that it can be merged: delta(b) is Δ_b as an out × in matrix.
template <class A>
concept MergeableAdapter = Adapter<A> && requires(const A& adapter, RankSlice rank) {
  { adapter.delta(rank) } -> std::convertible_to<MatrixX<typename A::Scalar>>;
};

/// An adapter that is one low-rank product at each rank, and so can be written to and read from the files of other programs.
template <class A>
concept PortableAdapter = Adapter<A> && requires(const A& adapter, A& changed, Index rank, LowRankFactors<typename A::Scalar> factors) {
  { adapter.components() } -> std::same_as<Index>;
  { adapter.factors(rank) } -> std::same_as<LowRankFactors<typename A::Scalar>>;
  changed.set_factors(factors);  // becomes Δ of these factors; their rank is then its max_rank, or what its parts make up together
};

namespace detail {

template <class F>
struct LayerVisitor {
  F& f;

  template <class L>
  auto enter(std::string_view name, L& layer, auto&... beside) const {
    if constexpr (AdaptedLayer<L>) f(name, layer, beside...);
    return std::bool_constant<!AdaptedLayer<L>>{};
  }
};

}  // namespace detail

/// Calls f(name, layer, beside...) for each AdaptedLayer inside `model`, itself included (its name is then empty), and what is in its place
/// in each of `beside`: gradients, for example.
template <class T, class F, class... Beside>
void for_each_layer(T& model, F&& f, Beside&... beside) {
  visit_members(detail::LayerVisitor<F>{f}, model, beside...);
}

}  // namespace dylora

#endif
