#ifndef DYLORA_EXAMPLES_GPT_LAYER_NORM_HPP
#define DYLORA_EXAMPLES_GPT_LAYER_NORM_HPP

#include <cmath>
#include <concepts>
#include <dylora/dylora.hpp>

#include "gpt/columns.hpp"

namespace gpt {

/// y = gain ∘ (x − mean) / √(variance + ε) + bias, over the features of each token (arXiv 1607.06450).
template <std::floating_point S>
struct LayerNorm {
  struct Gradients {
    dylora::VectorX<S> gain, bias;
  };
  struct Cache {
    dylora::Buffer<S> normalized;  // (x − mean) / deviation
    dylora::VectorX<S> deviation;
  };

  dylora::VectorX<S> gain, bias;
  double epsilon = 1e-5;

  explicit LayerNorm(Index features) : gain(dylora::VectorX<S>::Ones(features)), bias(dylora::VectorX<S>::Zero(features)) {}

  void forward(dylora::ConstMatrixRef<S> x, Cache& cache, dylora::MatrixRef<S> y) const {
    auto normalized = cache.normalized.resize(x.rows(), x.cols());
    if (cache.deviation.size() < x.cols()) cache.deviation.resize(x.cols());
    for_each_column(x.rows(), x.cols(), [&](Index i) {
      auto column = normalized.col(i);
      column = x.col(i).array() - x.col(i).mean();
      cache.deviation[i] = std::sqrt(column.squaredNorm() / static_cast<S>(x.rows()) + static_cast<S>(epsilon));
      column /= cache.deviation[i];
      y.col(i) = column.cwiseProduct(gain) + bias;
    });
  }

  /// dx += (dn − mean(dn) − n · mean(dn ∘ n)) / deviation, with n the normalized column and dn = gain ∘ dy.
  void add_backward(dylora::ConstMatrixRef<S> dy, const Cache& cache, dylora::MatrixRef<S> dx) const {
    const auto normalized = cache.normalized.view();
    for_each_column(dy.rows(), dy.cols(), [&](Index i) {
      const auto n = normalized.col(i).array();
      const S mean = gain.dot(dy.col(i)) / static_cast<S>(dy.rows());
      const S slope = (gain.array() * dy.col(i).array() * n).sum() / static_cast<S>(dy.rows());
      dx.col(i).array() += (gain.array() * dy.col(i).array() - mean - n * slope) / cache.deviation[i];
    });
  }

  /// gradients += ∂/∂gain, ∂/∂bias.
  void add_gradients(dylora::ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients) const {
    const auto normalized = cache.normalized.view();
    for (Index i = 0; i < dy.cols(); ++i) {
      gradients.gain += dy.col(i).cwiseProduct(normalized.col(i));
      gradients.bias += dy.col(i);
    }
  }

  static void members(const auto& f, auto&... t) {
    f(dylora::Parameter{"weight"}, t.gain...);
    f(dylora::Parameter{"bias"}, t.bias...);
  }
};

}  // namespace gpt

#endif
