#ifndef DYLORA_CORE_TYPES_HPP
#define DYLORA_CORE_TYPES_HPP

#include <Eigen/Core>

/// One column per sample: activations are features × samples (for text: features × tokens), weights out × in, and y = W x.
/// Every shape in this library follows that rule.
namespace dylora {

using Index = Eigen::Index;

/// Column-major, Eigen's default: a sample's features are contiguous. Eigen's own name, so that it means one thing to who uses both
/// namespaces.
using Eigen::MatrixX;
using Eigen::VectorX;

/// Row-major: how PyTorch and safetensors store a weight.
template <class Scalar>
using RowMatrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// An argument that is written in place: a MatrixX, or a block of whole columns or of some rows of one.
template <class Scalar>
using MatrixRef = Eigen::Ref<MatrixX<Scalar>>;

/// An argument that is only read. Binds without a copy to a column-major matrix or block; a row-major or otherwise strided argument, or
/// an expression, is evaluated into a temporary.
template <class Scalar>
using ConstMatrixRef = Eigen::Ref<const MatrixX<Scalar>>;

}  // namespace dylora

#endif
