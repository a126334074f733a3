#ifndef DYLORA_BENCHMARKS_RANK_SWEEP_REGRESSION_HPP
#define DYLORA_BENCHMARKS_RANK_SWEEP_REGRESSION_HPP

#include <Eigen/QR>
#include <cmath>
#include <cstdint>
#include <dylora/dylora.hpp>
#include <limits>
#include <string>
#include <vector>

#include "rank_sweep/contender.hpp"
#include "rank_sweep/train.hpp"

namespace rank_sweep {

/// A task with a known answer: a frozen W that should have been W + Δ, seen through white inputs and squared error. The best that any
/// adapter of rank b can do is the distance of Δ from its best rank-b approximation, √(Σ_{i>b} σᵢ²) (Eckart and Young).
class Regression {
 public:
  static constexpr Index features = 32, samples = 64;

  explicit Regression(std::uint64_t seed) {
    Rng rng(seed);
    W_ = random_uniform<float>(features, features, 0.3, rng);
    const auto orthogonal = [&] {
      const Eigen::HouseholderQR<MatrixX<double>> qr(random_uniform<double>(features, features, 1, rng));
      return MatrixX<double>(qr.householderQ());
    };
    const MatrixX<double> U = orthogonal(), V = orthogonal();
    sigma_ = VectorX<double>(features);
    for (Index i = 0; i < features; ++i) sigma_[i] = 2 * std::pow(0.75, static_cast<double>(i));
    change_ = U * sigma_.asDiagonal() * V.transpose();
  }

  /// ‖Δ − its best rank-b approximation‖.
  double best(Index rank) const { return sigma_.tail(features - rank).norm(); }

  /// ‖Δ − Δ_b‖ / best(b) at each rank b of the trained contender; infinite where training diverged.
  std::vector<double> errors(const Contender& contender, double lr, std::uint64_t seed) const {
    Rng rng(1000 * seed), rank_rng(1000 * seed + 1);
    Linear<float> layer(W_, {.max_rank = contender.max_rank, .alpha = alpha, .scale = contender.scale}, rng);
    auto gradients = zeros_like(layer);
    Linear<float>::Cache cache;
    Linear<float>::Workspace workspace;
    const MatrixX<float> answer = W_ + change_.cast<float>();
    MatrixX<float> y(features, samples), dx(features, samples), target(features, samples);
    const Sequences sequences = Sequences::equal(samples, 1);
    try {
      train(layer, contender, lr, rank_rng, gradients, [&](const StepRanks& ranks) {
        const MatrixX<float> x = random_uniform<float>(features, samples, std::sqrt(3.0), rng);  // unit variance
        target.noalias() = answer * x;
        const auto groups = divide_sequences(ranks, samples);
        layer.forward(x, batch_ranks(groups, sequences), cache, y);
        const double loss = weighted_loss(groups, sequences, [&](Index begin, Index count, double weight) {
          auto part = y.middleCols(begin, count);
          return mse<float>(part, target.middleCols(begin, count), part, weight);
        });
        layer.backward(y, cache, gradients, workspace, dx);
        return loss;
      });
    } catch (const NonFiniteError&) {
      return std::vector<double>(static_cast<std::size_t>(contender.max_rank), std::numeric_limits<double>::infinity());
    }
    std::vector<double> errors;
    for (Index rank = 1; rank <= contender.max_rank; ++rank) {
      errors.push_back((layer.adapter.delta(rank).cast<double>() - change_).norm() / best(rank));
    }
    return errors;
  }

 private:
  MatrixX<float> W_;
  MatrixX<double> change_;
  VectorX<double> sigma_;
};

}  // namespace rank_sweep

#endif
