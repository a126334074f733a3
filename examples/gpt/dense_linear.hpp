#ifndef DYLORA_EXAMPLES_GPT_DENSE_LINEAR_HPP
#define DYLORA_EXAMPLES_GPT_DENSE_LINEAR_HPP

#include <concepts>
#include <dylora/dylora.hpp>
#include <utility>

#include "gpt/columns.hpp"

namespace gpt {

/// y = W x + bias with W and bias themselves trained: what pretraining uses where adaptation has a dylora::Linear.
template <std::floating_point S>
struct DenseLinear {
  using Scalar = S;
  static constexpr bool trains_base = true;

  struct Gradients {
    dylora::MatrixX<S> W;
    dylora::VectorX<S> bias;
  };
  struct Cache {};  // x is the caller's
  struct Workspace {};

  dylora::MatrixX<S> W;  // out × in
  dylora::VectorX<S> bias;

  DenseLinear(dylora::MatrixX<S> W_, dylora::VectorX<S> bias_) : W(std::move(W_)), bias(std::move(bias_)) {}

  Index in_features() const { return W.cols(); }
  Index out_features() const { return W.rows(); }
  Index max_rank() const { return 0; }

  void apply(dylora::ConstMatrixRef<S> x, const dylora::BatchRanks& /*ranks*/, Cache& /*cache*/, dylora::MatrixRef<S> y) const {
    dylora::WeightView<S>(W, bias).apply(x, y);
  }

  void set_backward(dylora::ConstMatrixRef<S> x, dylora::ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients,
                    Workspace& workspace, dylora::MatrixRef<S> dx) const {
    add_gradients(x, dy, cache, gradients, workspace);
    dylora::set_product(dx, W.transpose(), dy);
  }

  ///     y = W x + bias         dW += dy · xᵀ        dbias += Σ dy        dx += Wᵀ · dy
  void add_backward(dylora::ConstMatrixRef<S> x, dylora::ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients,
                    Workspace& workspace, dylora::MatrixRef<S> dx) const {
    add_gradients(x, dy, cache, gradients, workspace);
    dylora::add_product(dx, W.transpose(), dy);
  }

  void add_gradients(dylora::ConstMatrixRef<S> x, dylora::ConstMatrixRef<S> dy, const Cache& /*cache*/, Gradients& gradients,
                     Workspace& /*workspace*/) const {
    dylora::add_product(gradients.W, dy, x.transpose());
    for (Index i = 0; i < dy.cols(); ++i) gradients.bias += dy.col(i);
  }

  void check_backward(dylora::ConstMatrixRef<S> x, dylora::ConstMatrixRef<S> dy, const Cache& /*cache*/, const Gradients& gradients,
                      const Workspace& /*workspace*/) const {
    dylora::require_equal(x.rows(), in_features(), "DenseLinear::backward: rows of x");
    dylora::require_equal(dy.rows(), out_features(), "DenseLinear::backward: rows of dy");
    dylora::require_equal(x.cols(), dy.cols(), "DenseLinear::backward: samples in x");
    dylora::require_shapes(*this, "DenseLinear::backward: gradient of", gradients);
  }

  static void members(const auto& f, auto&... t) {
    f(dylora::Parameter{"weight"}, t.W...);
    f(dylora::Parameter{"bias"}, t.bias...);
  }
};

}  // namespace gpt

#endif
