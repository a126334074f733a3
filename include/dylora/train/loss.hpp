#ifndef DYLORA_TRAIN_LOSS_HPP
#define DYLORA_TRAIN_LOSS_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/parallel.hpp"

/// Losses over a batch: the mean, and its gradient with respect to the network's output. Each has a form that returns the gradient and one
/// that writes it into the caller's matrix, which may be the output itself.
///
///     const auto loss = mse(layer.forward(x, rank, cache), target);         // loss.value, loss.gradient
///     const double value = mse<float>(y, target, dy);                       // into dy
///     const auto loss = cross_entropy<float>(logits, targets);              // targets: a std::vector<Index>, a class per sample
namespace dylora {

template <class S>
struct Loss {
  double value;
  MatrixX<S> gradient;
};

/// mean (y − target)² over all elements; gradient = weight · 2 (y − target) / size, overwritten.
///
/// `weight` scales the gradient only: 1/k where k micro-batches make a step. Throws ShapeError if the shapes differ or are empty.
template <class S>
double mse(ConstMatrixRef<S> y, ConstMatrixRef<S> target, MatrixRef<S> gradient, double weight = 1) {
  require_equal(target.rows(), y.rows(), "mse: rows of target");
  require_equal(target.cols(), y.cols(), "mse: samples in target");
  require_equal(gradient.rows(), y.rows(), "mse: rows of gradient");
  require_equal(gradient.cols(), y.cols(), "mse: samples in gradient");
  require_samples(y.size(), "mse: y");
  const auto size = static_cast<double>(y.size());
  gradient = y - target;
  double sum = 0;
  for (Index sample = 0; sample < y.cols(); ++sample) sum += static_cast<double>(gradient.col(sample).squaredNorm());
  gradient *= static_cast<S>(2 * weight / size);
  return sum / size;
}

template <class Y, class Target>
auto mse(const Eigen::MatrixBase<Y>& y, const Eigen::MatrixBase<Target>& target) {
  using S = typename Y::Scalar;
  Loss<S> loss{0, MatrixX<S>(y.rows(), y.cols())};
  loss.value = mse<S>(y, target, loss.gradient);
  return loss;
}

struct CrossEntropyOptions {
  Index ignore_index = -100;  ///< samples with this target count for nothing, as in PyTorch
  double weight = 1;          ///< scales the gradient only: 1/k where k micro-batches make a step
};

namespace detail {

/// to = exp(from − shift), returning its sum. In whole blocks, the last one padded: an element's bits depend on its value alone. Eigen's
/// vectorised exp(−∞) is a tiny number and its exp(NaN) need not be one, so both are put right; its own select would not be vectorised.
template <class S>
S shifted_exp(const S* from, Index size, S shift, S* to) {
  constexpr Index block = 64;
  constexpr S infinity = std::numeric_limits<S>::infinity();
  Eigen::Array<S, block, 1> values;
  S sum = 0;
  for (Index i = 0; i < size; i += block) {
    const Index used = std::min(block, size - i);
    if (used < block) values.setConstant(-infinity);
    std::copy_n(from + i, used, values.data());
    const Eigen::Array<S, block, 1> raw = values;
    values = (raw - shift).exp();
    for (Index k = 0; k < block; ++k) values[k] = raw[k] == -infinity ? S(0) : std::isnan(raw[k]) ? raw[k] : values[k];
    sum += values.sum();
    std::copy_n(values.data(), used, to + i);
  }
  return sum;
}

}  // namespace detail

/// mean over the n counted samples of −log softmax(logits)[target]; gradient = weight · (softmax(logits) − onehot(target)) / n,
/// overwritten.
///
/// logits classes × samples, one target in [0, classes) or the ignore index per sample; `gradient` may be `logits` itself.
/// Throws ShapeError if the shapes differ, std::invalid_argument if a target is neither, or if every sample is ignored.
template <class S>
double cross_entropy(ConstMatrixRef<S> logits, std::span<const Index> targets, MatrixRef<S> gradient, CrossEntropyOptions options = {}) {
  require_samples(logits.cols(), "cross_entropy: logits");
  require_equal(static_cast<Index>(targets.size()), logits.cols(), "cross_entropy: number of targets");
  require_equal(gradient.rows(), logits.rows(), "cross_entropy: rows of gradient");
  require_equal(gradient.cols(), logits.cols(), "cross_entropy: samples in gradient");
  Index counted = 0;
  for (std::size_t i = 0; i < targets.size(); ++i) {
    if (targets[i] == options.ignore_index) continue;
    if (targets[i] < 0 || targets[i] >= logits.rows()) {
      throw std::invalid_argument("cross_entropy: target of sample " + std::to_string(i) + ": expected a class in [0, " +
                                  std::to_string(logits.rows() - 1) + "] or the ignore index " + std::to_string(options.ignore_index) +
                                  ", got " + std::to_string(targets[i]));
    }
    ++counted;
  }
  if (counted == 0) throw std::invalid_argument("cross_entropy: expected at least one target to count, got only the ignore index");

  std::vector<double> values(targets.size(), 0);
  const auto scale = static_cast<S>(options.weight / static_cast<double>(counted));
  constexpr Index columns = 64;  // samples in a task
  for_each_task((logits.cols() + columns - 1) / columns, 8.0 * static_cast<double>(logits.size()), [&](Index task) {
    for (Index i = task * columns; i < std::min((task + 1) * columns, logits.cols()); ++i) {
      const Index target = targets[static_cast<std::size_t>(i)];
      if (target == options.ignore_index) {
        gradient.col(i).setZero();
        continue;
      }
      const S highest = logits.col(i).maxCoeff(), wanted = logits(target, i);
      const S sum = detail::shifted_exp(logits.col(i).data(), logits.rows(), highest, gradient.col(i).data());
      values[static_cast<std::size_t>(i)] =
          std::log(static_cast<double>(sum)) + (static_cast<double>(highest) - static_cast<double>(wanted));
      gradient.col(i) *= scale / sum;
      gradient(target, i) -= scale;
    }
  });
  double total = 0;
  for (const double value : values) total += value;
  return total / static_cast<double>(counted);
}

template <class S>
Loss<S> cross_entropy(const MatrixX<S>& logits, std::span<const Index> targets, CrossEntropyOptions options = {}) {
  Loss<S> loss{0, MatrixX<S>(logits.rows(), logits.cols())};
  loss.value = cross_entropy<S>(logits, targets, loss.gradient, options);
  return loss;
}

}  // namespace dylora

#endif
