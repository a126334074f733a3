#include "dylora/analysis/randomized_svd.hpp"
#include "dylora/analysis/spectrum.hpp"
#include "dylora/linalg/svd.hpp"

#include <cmath>

#include "support/catch.hpp"
#include "support/threads.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

/// A matrix with these singular values, and its vectors.
Svd planted(Index rows, Index cols, const VectorX<double>& singular_values, std::uint64_t seed = 1) {
  const Index k = singular_values.size();
  const MatrixX<double> U = detail::orthonormal_columns(noise<double>(rows, k, seed)),
                        V = detail::orthonormal_columns(noise<double>(cols, k, seed + 1));
  return {U, singular_values, V};
}

MatrixX<double> product_of(const Svd& svd) { return svd.U * svd.singular_values.asDiagonal() * svd.V.transpose(); }

VectorX<double> falling(Index count, double ratio) {
  VectorX<double> values(count);
  for (Index i = 0; i < count; ++i) values[i] = std::pow(ratio, static_cast<double>(i));
  return values;
}

RandomizedSvd run(const MatrixX<double>& W, Index rank, const RandomizedSvdOptions& options, std::uint64_t seed = 5) {
  Rng rng(seed);
  return randomized_svd(W, rank, options, rng);
}

double norm_of(const MatrixX<double>& W) { return thin_svd(W).singular_values[0]; }

/// The sine of the largest angle between the spans of orthonormal columns.
double sine(const MatrixX<double>& got, const MatrixX<double>& expected) { return norm_of(got - expected * (expected.transpose() * got)); }

}  // namespace

TEST_CASE("a matrix of low rank is found exactly without a power iteration") {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{80, 50}, {50, 80}, {60, 60}}) {
    const Svd expected = planted(rows, cols, VectorX<double>{{9, 5, 4, 2, 1}});
    const RandomizedSvd svd = run(product_of(expected), 5, {.power_iterations = 0});
    CHECK(gap(svd.singular_values, expected.singular_values) < 1e-13);
    CHECK(gap(product_of(svd), product_of(expected)) < 1e-13);
    CHECK(svd.residual < 1e-13);
    CHECK(svd.power_iterations == 0);
  }
}

TEST_CASE("the error of a randomised decomposition is within the bound of its authors") {
  // Halko, Martinsson and Tropp, theorem 10.6 with 9.2 and 9.3: for a sample of k + p columns and q power iterations, on average
  // ‖W − U Σ Vᵀ‖ ≤ σ_{k+1} + (1 + √(k / (p − 1)) + e √(k + p) / p · √(min(m, n) − k))^(1 / (2q + 1)) · σ_{k+1}.
  const Index k = 6, p = 6;
  for (const double ratio : {0.5, 0.9, 0.98}) {
    const MatrixX<double> W = product_of(planted(120, 90, falling(90, ratio)));
    const double next = std::pow(ratio, k);
    for (const Index q : {0, 1, 3}) {
      const double factor = 1 + std::sqrt(6.0 / 5) + std::exp(1.0) * std::sqrt(12.0) / 6 * std::sqrt(84.0);
      double mean = 0;
      for (std::uint64_t seed = 0; seed < 5; ++seed) {
        mean += norm_of(W - product_of(run(W, k, {.oversampling = p, .power_iterations = q}, seed))) / 5;
      }
      CHECK(mean <= next * (1 + std::pow(factor, 1.0 / static_cast<double>(2 * q + 1))));
      CHECK(mean >= next * (1 - 1e-12));  // nothing of rank k is nearer (Eckart and Young)
    }
  }
}

TEST_CASE("each power iteration turns the subspace towards the exact one by the squared ratio of singular values") {
  // For subspaces of one size, tan(angle) becomes S₂² T S₁⁻² from T: multiplied by at most (σ_{k+1} / σ_k)², and where the values left out
  // are equal by at least (σ_{k+1} / σ_1)².
  VectorX<double> sigma = VectorX<double>::Constant(80, 0.6);
  sigma.head(5) << 1.4, 1.3, 1.2, 1.1, 1;
  const Svd exact = planted(100, 80, sigma);
  const MatrixX<double> W = product_of(exact);
  const auto tangent = [&](Index q) {
    const double s = sine(run(W, 5, {.oversampling = 0, .power_iterations = q}).U, exact.U.leftCols(5));
    return s / std::sqrt(1 - s * s);
  };
  double before = tangent(0);
  for (const Index q : {1, 2, 3, 4, 5}) {
    const double now = tangent(q);
    INFO("after " << q << " iterations " << now << ", before " << before);
    CHECK(now < 0.36 * before * (1 + 1e-9));
    CHECK(now > 0.36 / (1.4 * 1.4) * before * (1 - 1e-9));
    before = now;
  }
  CHECK(tangent(40) < 1e-12);
}

TEST_CASE("a larger sample is nearer") {
  const Svd exact = planted(100, 100, falling(100, 0.95));
  const MatrixX<double> W = product_of(exact);
  double before = 1;
  for (const Index oversampling : {0, 10, 30}) {
    const double now = sine(run(W, 8, {.oversampling = oversampling, .power_iterations = 3}).U, exact.U.leftCols(8));
    CHECK(now < before);
    before = now;
  }
}

TEST_CASE("the residual says how far off the values and vectors are") {
  const MatrixX<double> W = product_of(planted(90, 70, falling(70, 0.9)));
  const VectorX<double> exact = thin_svd(W).singular_values;
  for (const Index q : {0, 2, 10}) {
    const RandomizedSvd svd = run(W, 8, {.oversampling = 4, .power_iterations = q});
    const double largest = svd.singular_values[0];
    const MatrixX<double> missed = W * svd.V - svd.U * svd.singular_values.asDiagonal();
    CHECK(svd.residual == Approx(missed.colwise().norm().maxCoeff() / largest).epsilon(1e-6).margin(1e-14));
    CHECK(gap(W.transpose() * svd.U, svd.V * svd.singular_values.asDiagonal()) < 1e-13);
    for (Index j = 0; j < 8; ++j) {
      CHECK(svd.singular_values[j] <= exact[j] * (1 + 1e-13));
      CHECK((exact.array() - svd.singular_values[j]).abs().minCoeff() <= svd.residual * largest + 1e-13);
    }
    CHECK((svd.U.transpose() * svd.U - MatrixX<double>::Identity(8, 8)).norm() < 1e-13);
    CHECK((svd.V.transpose() * svd.V - MatrixX<double>::Identity(8, 8)).norm() < 1e-13);
  }
}

TEST_CASE("the iterations end at the tolerance or at their number") {
  const MatrixX<double> W = product_of(planted(90, 70, falling(70, 0.9)));
  const RandomizedSvd good = run(W, 8, {.power_iterations = 200, .tolerance = 1e-6});
  CHECK(good.residual <= 1e-6);
  CHECK(good.power_iterations > 1);
  CHECK(good.power_iterations < 50);
  const RandomizedSvd before = run(W, 8, {.power_iterations = good.power_iterations - 1});
  CHECK(before.residual > 1e-6);
  CHECK(before.power_iterations == good.power_iterations - 1);
  CHECK(same_bits(run(W, 8, {.power_iterations = good.power_iterations}).U, good.U));
}

TEST_CASE("a converged randomised decomposition is the exact one, signs included") {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{90, 70}, {70, 90}}) {
    const MatrixX<double> W = product_of(planted(rows, cols, falling(70, 0.9)));
    const Svd exact = thin_svd(W);
    const RandomizedSvd svd = run(W, 8, {.power_iterations = 200, .tolerance = 1e-12});
    CHECK(gap(svd.U, exact.U.leftCols(8)) < 1e-9);
    CHECK(gap(svd.V, exact.V.leftCols(8)) < 1e-9);
    CHECK(gap(svd.singular_values, exact.singular_values.head(8)) < 1e-12);
  }
}

TEST_CASE("at the full rank nothing is left out and the sample is no larger than the matrix") {
  const MatrixX<double> W = noise<double>(9, 6, 1);
  const RandomizedSvd svd = run(W, 6, {.oversampling = 1000, .power_iterations = 0});
  CHECK(gap(product_of(svd), W) < 1e-13);
  CHECK(run(MatrixX<double>::Zero(9, 6), 3, {}).singular_values.isZero(0));
  CHECK(run(MatrixX<double>::Zero(9, 6), 3, {}).residual == 0);
  CHECK(run(MatrixX<double>::Constant(1, 1, -3), 1, {}).singular_values[0] == Approx(3));
  CHECK(run(MatrixX<double>::Constant(1, 1, -3), 1, {}).V(0, 0) == Approx(-1));
}

TEST_CASE("a seed decides the bits, whatever the threads, and the draws are as many as documented") {
  const MatrixX<double> W = noise<double>(500, 400, 1);
  const RandomizedSvdOptions options{.oversampling = 20, .power_iterations = 3};
  const RandomizedSvd expected = run(W, 60, options);
  for_each_threading([&] { return run(W, 60, options); },
                     [&](const RandomizedSvd& got, const std::string& where) {
                       INFO(where);
                       CHECK(same_bits(got.U, expected.U));
                       CHECK(same_bits(got.singular_values, expected.singular_values));
                       CHECK(same_bits(got.V, expected.V));
                       CHECK(got.residual == expected.residual);
                     });
  CHECK(!same_bits(run(W, 60, options, 6).U, expected.U));

  Rng used(5), drawn(5);
  randomized_svd(W, 60, options, used);
  for (int i = 0; i < 400 * 80; ++i) drawn.next();
  CHECK(used.state() == drawn.state());
}

TEST_CASE("a randomised decomposition of floats is that of their values in double") {
  const MatrixX<float> W = noise<float>(40, 30, 2);
  const RandomizedSvd expected = run(W.cast<double>(), 5, {});
  Rng rng(5);
  CHECK(same_bits(randomized_svd(RowMatrix<float>(W), 5, {}, rng).U, expected.U));
}

TEST_CASE("a randomised decomposition refuses what it cannot do") {
  MatrixX<double> W = noise<double>(9, 6, 1);
  CHECK_THROWS_SAYING(std::invalid_argument, run(W, 0, {}), "randomized_svd: rank", "[1, 6]", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, run(W, 7, {}), "randomized_svd: rank", "[1, 6]", "got 7");
  CHECK_THROWS_SAYING(std::invalid_argument, run(W, 2, {.oversampling = -1}), "oversampling", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, run(W, 2, {.power_iterations = -1}), "power_iterations", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, run(W, 2, {.tolerance = -1}), "tolerance", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, run(W, 2, {.tolerance = nan<double>}), "tolerance", "nan");
  CHECK_THROWS_SAYING(ShapeError, run(MatrixX<double>(5, 0), 1, {}), "randomized_svd: W", "5 × 0");
  W(0, 0) = nan<double>;
  CHECK_THROWS_SAYING(NonFiniteError, run(W, 2, {}), "randomized_svd: W", "expected finite");
}

}  // namespace dylora::test
