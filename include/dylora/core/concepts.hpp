#ifndef DYLORA_CORE_CONCEPTS_HPP
#define DYLORA_CORE_CONCEPTS_HPP

#include <concepts>

#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/factors.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/product.hpp"
#include "dylora/core/rank.hpp"
#include "dylora/core/types.hpp"

/// What the parts of the library ask of each other. A type needs no base class and no registration: whatever answers these calls fits.
namespace dylora {

/// A frozen out × in matrix with an optional bias.
template <class W>
concept FrozenWeight = requires(const W& weight, ConstMatrixRef<typename W::Scalar> in, MatrixRef<typename W::Scalar> out) {
  { weight.rows() } -> std::same_as<Index>;
  { weight.cols() } -> std::same_as<Index>;
  weight.apply(in, out);                 // out = W in + bias
  weight.add_apply_transposed(in, out);  // out += Wᵀ in
};

/// A frozen weight that takes a low-rank term along in its own pass over the output.
template <class W>
concept FusedWeight = FrozenWeight<W> && requires(const W& weight, ConstMatrixRef<typename W::Scalar> in,
                                                  const LowRankTerm<typename W::Scalar>& term, MatrixRef<typename W::Scalar> out) {
  weight.apply(in, term, out);                 // out = W in + bias + term
  weight.apply_transposed(in, term, out);      // out = Wᵀ in + term
  weight.add_apply_transposed(in, term, out);  // out += Wᵀ in + term
};

/// A frozen weight that can be read back as a matrix, and so be merged with an adapter.
template <class W>
concept MergeableWeight = FrozenWeight<W> && requires(const W& weight) {
  { weight.dense() } -> std::same_as<Matrix<typename W::Scalar>>;
  { weight.dense_bias() } -> std::same_as<Vector<typename W::Scalar>>;
};

/// Something trainable: it names its parameters and knows the type of their gradients.
template <class T>
concept Trainable =
    requires(T& trained, typename T::Gradients& gradients) { T::zip_parameters([](Parameter, auto&, auto&) {}, trained, gradients); };

/// A trainable correction Δ of a frozen weight. Both verbs add into their outputs. Its parameters may be cut to their first b components
/// (core/adapter_ranks.hpp): it then still accepts every rank up to max_rank, and computes at those above b what it does at b.
template <class A>
concept Adapter = Trainable<A> && requires(const A& adapter, ConstMatrixRef<typename A::Scalar> in, MatrixRef<typename A::Scalar> out,
                                           const BatchRanks& ranks, typename A::Cache& cache, const typename A::Cache& filled,
                                           typename A::Gradients& gradients) {
  { adapter.in_features() } -> std::same_as<Index>;
  { adapter.out_features() } -> std::same_as<Index>;
  { adapter.max_rank() } -> std::same_as<Index>;
  adapter.add_forward(in, ranks, cache, out);            // (x, …, y)           y += Δ(x), each column at its rank
  adapter.add_backward(in, in, filled, gradients, out);  // (x, dy, …, dx)      gradients += ∂/∂θ, dx += ∂/∂x
};

/// An adapter whose correction is a low-rank term for each run of equal ranks, left to the caller to add: each verb of Adapter is one of
/// these followed by the addition of its terms, f(first column, columns, term) for each.
template <class A>
concept FactoredAdapter =
    Adapter<A> && requires(const A& adapter, ConstMatrixRef<typename A::Scalar> in, const BatchRanks& ranks, typename A::Cache& cache,
                           const typename A::Cache& filled, typename A::Gradients& gradients,
                           void (*f)(Index, Index, const LowRankTerm<typename A::Scalar>&)) {
      adapter.prepare_forward(in, ranks, cache);             // (x, …)
      adapter.for_each_forward_term(filled, f);              // y += each
      adapter.prepare_backward(in, in, filled, gradients);   // (x, dy, …)    gradients += ∂/∂θ
      adapter.for_each_backward_term(filled, gradients, f);  // dx += each
    };

/// An adapter that is linear in its input, so that it can be merged: delta(b) is Δ_b as an out × in matrix.
template <class A>
concept MergeableAdapter = Adapter<A> && requires(const A& adapter, RankSlice rank) {
  { adapter.delta(rank) } -> std::convertible_to<Matrix<typename A::Scalar>>;
};

/// An adapter that is one low-rank product at each rank, and so can be written to and read from the files of other programs.
template <class A>
concept PortableAdapter = Adapter<A> && requires(const A& adapter, A& changed, Index rank, LowRankFactors<typename A::Scalar> factors) {
  { adapter.components() } -> std::same_as<Index>;
  { adapter.factors(rank) } -> std::same_as<LowRankFactors<typename A::Scalar>>;
  changed.set_factors(factors);  // becomes Δ of these factors; their rank is then its max_rank, or what its parts make up together
};

/// Something that maps and differentiates, and keeps what its backward needs in a cache that the caller owns: what users call, and what to
/// model when writing a layer. max_rank is the largest rank that forward accepts, 0 if it has no adapter and takes any; a part of it that
/// has fewer components uses all it has. Outputs must not overlap inputs. Backward is the vector-Jacobian product: the gradient of ⟨forward(x), dy⟩.
template <class L>
concept Layer = Trainable<L> &&
                requires(const L& layer, ConstMatrixRef<typename L::Scalar> in, MatrixRef<typename L::Scalar> out, const BatchRanks& ranks,
                         typename L::Cache& cache, const typename L::Cache& filled, typename L::Gradients& gradients) {
                  { layer.in_features() } -> std::same_as<Index>;
                  { layer.out_features() } -> std::same_as<Index>;
                  { layer.max_rank() } -> std::same_as<Index>;
                  { layer.forward(in, ranks) } -> std::same_as<Matrix<typename L::Scalar>>;
                  { layer.forward(in, ranks, cache) } -> std::same_as<Matrix<typename L::Scalar>>;
                  { layer.backward(in, filled, gradients) } -> std::same_as<Matrix<typename L::Scalar>>;
                  layer.forward(in, ranks, cache, out);
                  layer.backward(in, filled, gradients, out);
                };

/// A layer that can also work on an input which the caller keeps, so that an activation read by several projections is stored once: what
/// to model, besides Layer, for use inside a composite such as Attention. The parts of one composite may have different numbers of
/// components, so apply takes a rank above max_rank as all there are.
template <class P>
concept Projection = Trainable<P> && requires(const P& projection, ConstMatrixRef<typename P::Scalar> in, MatrixRef<typename P::Scalar> out,
                                              const BatchRanks& ranks, typename P::ProjectionCache& cache,
                                              const typename P::ProjectionCache& filled, typename P::Gradients& gradients) {
  { projection.in_features() } -> std::same_as<Index>;
  { projection.out_features() } -> std::same_as<Index>;
  { projection.max_rank() } -> std::same_as<Index>;
  projection.apply(in, ranks, cache, out);                  // (x, …, y)         y = projection(x)
  projection.set_backward(in, in, filled, gradients, out);  // (x, dy, …, dx)    gradients += ∂/∂θ, dx = ∂/∂x
  projection.add_backward(in, in, filled, gradients, out);  //                   gradients += ∂/∂θ, dx += ∂/∂x
};

}  // namespace dylora

#endif
