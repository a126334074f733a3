#ifndef DYLORA_WEIGHTS_DENSE_HPP
#define DYLORA_WEIGHTS_DENSE_HPP

#include <concepts>
#include <string_view>
#include <utility>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/weights/matrix_weight.hpp"
#include "dylora/weights/view.hpp"

namespace dylora {

/// A frozen weight that owns its matrix: y = W x + bias.
///
/// `Storage` is MatrixX<S> or RowMatrix<S>; move in what you have and nothing is copied. It converts from any Eigen matrix, map or
/// expression, so that a layer can be made from one: Linear<float> layer(W, {.max_rank = 8}, rng).
template <std::floating_point S, class Storage = MatrixX<S>>
struct DenseWeight : MatrixWeight<DenseWeight<S, Storage>, S> {
  using Scalar = S;
  static constexpr std::string_view name = "DenseWeight";

  Storage W;        // out × in
  VectorX<S> bias;  // out, or no elements

  /// Throws ShapeError if W is empty or the bias does not have one element per row of it.
  DenseWeight(Storage W_, VectorX<S> bias_ = {}) : W(std::move(W_)), bias(std::move(bias_)) {
    if (bias.size() > 0) require_equal(bias.size(), W.rows(), "DenseWeight: size of bias");
    (void)view();
  }

  /// A copy of a matrix in the other order, of a map, or of an expression.
  template <class M>
    requires std::derived_from<M, Eigen::EigenBase<M>> && std::convertible_to<const M&, Storage>
  DenseWeight(const M& W_) : DenseWeight(Storage(W_)) {}

  Index rows() const { return W.rows(); }
  Index cols() const { return W.cols(); }
  WeightView<S, Storage> view() const { return {W, bias}; }
  const Storage& values() const { return W; }
  const VectorX<S>& offsets() const { return bias; }
};

}  // namespace dylora

#endif
