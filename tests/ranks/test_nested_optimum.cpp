#include <Eigen/QR>
#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "dylora/layers/linear.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/loss.hpp"
#include "dylora/train/sgd.hpp"
#include "dylora/train/train_step.hpp"
#include "support/catch.hpp"
#include "support/values.hpp"

/// Where training at many ranks ends: with squared error and whitened inputs (X Xᵀ = n·1) the loss at rank b is ‖C − s(b) B_b A_b‖² up to a
/// factor, for a change C = Σ σᵢ uᵢ vᵢᵀ that the adapter has to learn.
namespace dylora::test {

namespace {

using L = Linear<double>;

/// The first columns of an orthogonal matrix without any direction of its own.
MatrixX<double> orthonormal(Index rows, Index cols, std::uint64_t seed) {
  const Eigen::HouseholderQR<MatrixX<double>> qr(noise<double>(rows, cols, seed));
  return qr.householderQ() * MatrixX<double>::Identity(rows, cols);
}

/// A change to learn, and a layer that learns it.
struct Problem {
  VectorX<double> sigma;
  MatrixX<double> U, V;  // columns uᵢ, vᵢ
  MatrixX<double> change;
  MatrixX<double> x, target;
  L layer;

  Problem(Index out, Index in, VectorX<double> sigma_, const LowRankOptions& options, std::uint64_t seed = 1)
      : sigma(std::move(sigma_)),
        U(orthonormal(out, sigma.size(), seed)),
        V(orthonormal(in, sigma.size(), seed + 1)),
        change(U * sigma.asDiagonal() * V.transpose()),
        x(std::sqrt(static_cast<double>(2 * in)) * orthonormal(2 * in, in, seed + 2).transpose()),
        layer(fresh(out, in, options, seed)) {
    target = (layer.base.W + change) * x;
  }

  static L fresh(Index out, Index in, const LowRankOptions& options, std::uint64_t seed) {
    Rng rng(seed + 3);
    return L(MatrixX<double>(noise<double>(out, in, seed + 4)), options, rng);
  }

  Index max_rank() const { return layer.max_rank(); }

  /// The loss, per output and sample, adding its gradient; for ‖C − Δ_b‖², times out.
  double backward(RankSlice rank, double weight, L::Cache& cache, L::Gradients& gradients) const {
    MatrixX<double> dy(target.rows(), target.cols());
    const double loss = mse<double>(layer.forward(x, rank, cache), target, dy, weight);
    (void)layer.backward(dy, cache, gradients);
    return loss;
  }

  /// Training with the learning rate falling to 0 along a line.
  template <class Optimizer, RankPlan Plan>
  void train(Optimizer optimizer, const Plan& plan, Index steps) {
    Rng rng(9);
    auto gradients = zeros_like(layer);
    L::Cache cache;
    const double lr = optimizer.options().lr;
    for (Index step = 0; step < steps; ++step) {
      optimizer.set_learning_rate(lr * (1 - static_cast<double>(step) / static_cast<double>(steps)));
      (void)train_step(layer, optimizer, gradients, plan(step, rng),
                       [&](Index, RankSlice rank, double weight) { return backward(rank, weight, cache, gradients); });
    }
  }

  double error(Index rank) const { return (layer.adapter.delta(rank) - change).norm(); }

  /// Of no matrix of this rank the error is lower (Eckart and Young).
  double best_error(Index rank) const { return sigma.tail(sigma.size() - rank).norm(); }

  /// ⟨uᵢ, B_j A_j vᵢ⟩: how much of direction i component j carries, without the scale.
  MatrixX<double> carried() const {
    MatrixX<double> result(sigma.size(), max_rank());
    for (Index j = 0; j < max_rank(); ++j) {
      const VectorX<double> left = U.transpose() * layer.adapter.B.col(j), right = V.transpose() * layer.adapter.A.row(j).transpose();
      result.col(j) = left.cwiseProduct(right);
    }
    return result;
  }

  /// Component j along uⱼ vⱼᵀ with the value c[j].
  void align(const VectorX<double>& c) {
    for (Index j = 0; j < max_rank(); ++j) {
      layer.adapter.B.col(j) = std::sqrt(c[j]) * U.col(j);
      layer.adapter.A.row(j) = std::sqrt(c[j]) * V.col(j).transpose();
    }
  }

  /// The length of the gradient of the mean over all ranks, relative to those of the ranks by themselves.
  double relative_gradient() const {
    auto sum = zeros_like(layer);
    L::Cache cache;
    double lengths = 0;
    for (Index b = 1; b <= max_rank(); ++b) {
      auto gradients = zeros_like(layer);
      (void)backward(b, 1, cache, gradients);
      lengths += norm(layer, gradients);
      accumulate_gradients(layer, sum, gradients);
    }
    return norm(layer, sum) / lengths;
  }

  /// Σ_b ‖C − Δ_b‖²
  double nested_loss() const {
    double sum = 0;
    for (Index b = 1; b <= max_rank(); ++b) sum += std::pow(error(b), 2);
    return sum;
  }
};

VectorX<double> vector(std::initializer_list<double> values) {
  return Eigen::Map<const VectorX<double>>(values.begin(), static_cast<Index>(values.size()));
}

/// Where each component is along its own direction, cᵢ minimises Σ_{b ≥ i} (σᵢ − s(b) cᵢ)².
VectorX<double> aligned_optimum(const Problem& problem) {
  VectorX<double> c(problem.max_rank());
  for (Index i = 1; i <= c.size(); ++i) {
    double sum = 0, squares = 0;
    for (Index b = i; b <= c.size(); ++b) {
      const double s = problem.layer.adapter.scale(b);
      sum += s;
      squares += s * s;
    }
    c[i - 1] = problem.sigma[i - 1] * sum / squares;
  }
  return c;
}

}  // namespace

TEST_CASE("trained at all ranks with a constant scale an adapter is the best approximation at each of them") {
  const LowRankOptions options{.max_rank = 4, .alpha = 4, .scale = alpha_over_max_rank};
  const VectorX<double> sigma = vector({4, 3, 2, 1, 0.5, 0.25});
  using Plan = std::function<StepRanks(Index, Rng&)>;
  for (const auto& [name, plan] : std::vector<std::pair<std::string, Plan>>{{"every rank", EveryRank{1, 4}},
                                                                            {"fresh ranks", FreshRanks{UniformRank{1, 4}}},
                                                                            {"sandwich", Sandwich{1, 4}},
                                                                            {"weighted", WeightedRanks{EveryRank{1, 4}, {1, 2, 1, 4}}}}) {
    for (const auto& [out, in] : std::vector<std::pair<Index, Index>>{{8, 8}, {7, 10}, {11, 6}}) {
      Problem problem(out, in, sigma, options);
      problem.train(AdamW(problem.layer, {.lr = 0.02}), plan, 3000);
      for (Index b = 1; b <= 4; ++b) {
        INFO(name << ", " << out << " x " << in << ", rank " << b);
        CHECK(problem.error(b) == Approx(problem.best_error(b)).epsilon(0.01));
      }
    }
  }
}

TEST_CASE("trained at its largest rank alone an adapter is the best approximation there and nowhere below") {
  Problem problem(7, 10, vector({4, 3, 2, 1, 0.5, 0.25}), {.max_rank = 4, .alpha = 4, .scale = alpha_over_max_rank});
  problem.train(AdamW(problem.layer, {.lr = 0.02}), EveryRank{4, 4}, 3000);
  CHECK(problem.error(4) == Approx(problem.best_error(4)).epsilon(0.01));
  for (Index b = 1; b < 4; ++b) CHECK(problem.error(b) > 1.05 * problem.best_error(b));
}

/// The closed form assumes that component i carries direction i alone. Of such adapters it is the one minimum, and of all adapters it is a
/// stationary point for any σ: the gradient at an aligned adapter is aligned.
TEST_CASE("under alpha over rank the aligned optimum is a stationary point for any change to learn") {
  for (const VectorX<double>& sigma : {vector({3, 2}), vector({3, 0.5, 0.2}), vector({4, 3.7, 3.4, 3.1, 0.5}), vector({4, 3, 2, 1, 0.5})}) {
    Problem problem(9, 7, sigma, {.max_rank = std::min<Index>(4, sigma.size()), .alpha = 3});
    const VectorX<double> c = aligned_optimum(problem);
    problem.align(c);
    CHECK(problem.relative_gradient() < 1e-14);
    for (Index i = 0; i < c.size(); ++i) {
      for (const double change : {0.99, 1.01}) {
        VectorX<double> moved = c;
        moved[i] *= change;
        Problem other = problem;
        other.align(moved);
        CHECK(other.relative_gradient() > 1e-4);
        CHECK(other.nested_loss() > problem.nested_loss());
      }
    }
    // With a scale for each rank, c could not be the best for any of them: some of each direction is missing, or too much.
    for (Index b = 1; b <= c.size(); ++b) CHECK(problem.error(b) > 1.001 * problem.best_error(b));
  }
}

/// Of two components, a small turn of the first towards direction 2 changes the loss, with the second at its best for it, in proportion to
/// 2.88 − 2.4 r − 0.288 / (r − 0.4) for r = σ₂/σ₁ (perturbation of the smaller singular value of C − s(2) B₁A₁). That is above 0 for
/// 0.6 < r < 1: where σ₂ is more than what rank 2 reaches of σ₁.
TEST_CASE("under alpha over rank and with two like directions rank 1 overshoots by a fifth and rank 2 falls short by two") {
  for (const double second : {0.75, 0.9}) {
    for (const double alpha : {1.0, 16.0}) {
      Problem problem(9, 7, vector({3, 3 * second, 0.5}), {.max_rank = 2, .alpha = alpha});
      problem.train(AdamW(problem.layer, {.lr = 0.02}), EveryRank{1, 2}, 4000);
      const MatrixX<double> c = problem.carried();
      CHECK(c(0, 0) == Approx(1.2 * 3 / alpha).epsilon(0.01));
      CHECK(c(1, 1) == Approx(2 * 3 * second / alpha).epsilon(0.01));
      CHECK((c.topRows(2) - aligned_optimum(problem).asDiagonal().toDenseMatrix()).norm() < 0.01 * c.norm());
      const auto reached = [&](Index rank, Index i) { return problem.U.col(i).dot(problem.layer.adapter.delta(rank) * problem.V.col(i)); };
      CHECK(reached(1, 0) == Approx(1.2 * 3).epsilon(0.01));
      CHECK(reached(2, 0) == Approx(0.6 * 3).epsilon(0.01));
      CHECK(reached(2, 1) == Approx(3 * second).epsilon(0.01));
    }
  }
}

TEST_CASE("under alpha over rank and with four like directions training from a random start ends at the aligned optimum") {
  const VectorX<double> sigma = vector({4, 3.7, 3.4, 3.1, 0.5});
  const auto trained = [&](const auto& plan) {
    Problem problem(9, 7, sigma, {.max_rank = 4, .alpha = 3});
    problem.train(AdamW(problem.layer, {.lr = 0.02}), plan, 6000);
    return problem;
  };
  const auto check = [&](const Problem& problem) {
    const VectorX<double> c = aligned_optimum(problem);
    for (Index i = 0; i < 4; ++i) CHECK(problem.carried()(i, i) == Approx(c[i]).epsilon(0.01));
    CHECK((problem.carried().topRows(4) - c.asDiagonal().toDenseMatrix()).norm() < 0.01 * c.norm());
    // Σ 1/b over Σ 1/b² from i on: 1.463, 2.557, 3.36 and 4.
    CHECK(c[0] == Approx(sigma[0] / 3 * (25.0 / 12) / (205.0 / 144)).epsilon(1e-12));
    CHECK(c[3] == Approx(sigma[3] / 3 * 4).epsilon(1e-12));
  };
  check(trained(EveryRank{1, 4}));
  check(trained(FreshRanks{UniformRank{1, 4}, 8}));  // uniform too, in the mean
}

/// The optimum without any assumption: a small second direction is not worth a component. Both then carry the first, so that rank 1 and
/// rank 2 reach all of it and the second is never learned. By the same perturbation, that is a minimum where σ₂ < σ₁ / 3; between that and
/// 0.6 σ₁ the second component carries some of both.
TEST_CASE("under alpha over rank a small second direction is not learned and rank 2 is no better than rank 1") {
  for (const double second : {0.1, 0.3}) {
    Problem problem(9, 7, vector({3, 3 * second}), {.max_rank = 2, .alpha = 6});
    problem.train(AdamW(problem.layer, {.lr = 0.02}), EveryRank{1, 2}, 4000);
    const MatrixX<double> c = problem.carried();
    CHECK(c(0, 0) == Approx(3.0 / 6).epsilon(0.01));
    CHECK(c(0, 1) == Approx(3.0 / 6).epsilon(0.01));
    CHECK(c.row(1).cwiseAbs().maxCoeff() < 0.01);
    CHECK(problem.error(1) == Approx(problem.best_error(1)).epsilon(0.01));
    CHECK(problem.error(2) == Approx(problem.best_error(1)).epsilon(0.01));
    Problem aligned = problem;
    aligned.align(aligned_optimum(aligned));
    CHECK(problem.nested_loss() < aligned.nested_loss());
  }
  Problem between(9, 7, vector({3, 1.5}), {.max_rank = 2, .alpha = 6});
  Problem aligned = between;
  aligned.align(aligned_optimum(aligned));
  between.train(AdamW(between.layer, {.lr = 0.02}), EveryRank{1, 2}, 4000);
  CHECK(between.relative_gradient() < 1e-6);
  CHECK(between.nested_loss() < 0.99 * aligned.nested_loss());
  CHECK(between.carried().col(1).head(2).minCoeff() > 0.1);
}

}  // namespace dylora::test
