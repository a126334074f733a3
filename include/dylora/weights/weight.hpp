#ifndef DYLORA_WEIGHTS_WEIGHT_HPP
#define DYLORA_WEIGHTS_WEIGHT_HPP

#include <concepts>

#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"

/// What a layer asks of a frozen weight. A type needs no base class and no registration: whatever answers these calls fits.
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
  { weight.dense() } -> std::same_as<MatrixX<typename W::Scalar>>;
  { weight.dense_bias() } -> std::same_as<VectorX<typename W::Scalar>>;
};

}  // namespace dylora

#endif
