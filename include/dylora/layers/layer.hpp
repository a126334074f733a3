#ifndef DYLORA_LAYERS_LAYER_HPP
#define DYLORA_LAYERS_LAYER_HPP

#include <concepts>

#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"

/// What a training loop asks of a layer, and a composite of its parts. A type needs no base class and no registration.
namespace dylora {

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
