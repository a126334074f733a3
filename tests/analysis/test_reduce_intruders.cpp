#include "dylora/analysis/intruders.hpp"
#include "dylora/analysis/reduce_intruders.hpp"
#include "dylora/linalg/svd.hpp"

#include <cmath>

#include "dylora/adapters/low_rank.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

using Exact = MatrixX<double>;

/// A weight with distinct singular values from 2 to 1, and its tuned version with one intruder.
struct Tuned {
  Exact W0, W1;
};

Tuned tuned(Index rows, Index cols, double size) {
  const Index k = std::min(rows, cols);
  const Exact U = detail::orthonormal_columns(noise<double>(rows, k, 1)), V = detail::orthonormal_columns(noise<double>(cols, k, 2));
  const Exact W0 = U * VectorX<double>::LinSpaced(k, 2, 1).asDiagonal() * V.transpose();
  return {W0, W0 + size * U.rowwise().sum().normalized() * V.rowwise().sum().normalized().transpose()};
}

}  // namespace

TEST_CASE("an intruder's singular value is multiplied by the factor and everything else stays") {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{64, 64}, {64, 80}, {80, 64}}) {
    const Tuned weights = tuned(rows, cols, 50);
    const BaseSpectrum base(weights.W0);
    const Svd before = thin_svd(weights.W1);
    for (const double factor : {0.75, 0.9, 1.0}) {
      const Exact reduced = reduce_intruders(base, weights.W1, factor);
      VectorX<double> expected = before.singular_values;
      expected[0] *= factor;
      CHECK(gap(before.U.transpose() * reduced * before.V, Exact(expected.asDiagonal())) < 1e-13);
    }
    CHECK(base.intruders(reduce_intruders(base, weights.W1, 0)).count == 0);
    CHECK(same_bits(reduce_intruders(base, weights.W1), reduce_intruders(base, weights.W1, 0.75)));
  }
}

TEST_CASE("oracle of intruder dimensions: without intruders a reduction changes no bit") {
  const Tuned weights = tuned(64, 64, 50);
  const BaseSpectrum base(weights.W0);
  CHECK(same_bits(reduce_intruders(base, weights.W0, 0), weights.W0));
  CHECK(same_bits(reduce_intruders(base, weights.W1, 0, {.threshold = 0}), weights.W1));
}

TEST_CASE("every direction is an intruder above a threshold of 1 and removing all removes the top of the weight") {
  const Tuned weights = tuned(40, 30, 5);
  const Exact reduced = reduce_intruders(BaseSpectrum(weights.W0), weights.W1, 0, {.top = 7, .threshold = 2});
  const VectorX<double> before = thin_svd(weights.W1).singular_values, after = thin_svd(reduced).singular_values;
  CHECK(gap(after.head(23), before.tail(23)) < 1e-13);
  CHECK(after.tail(7).maxCoeff() < 1e-13);
}

TEST_CASE("a change of a weight becomes the nearest adapter of a rank, and so does every prefix of it") {
  const Exact delta = noise<double>(20, 14, 3);
  const VectorX<double> sigma = thin_svd(delta).singular_values;
  const double scale = 0.5;
  for (const Index rank : {1, 5, 14}) {
    const TruncatedFactors truncated = truncated_factors(delta, rank, scale);
    CHECK(truncated.factors.scale == scale);
    REQUIRE(truncated.factors.A.rows() == rank);
    for (Index b = 1; b <= rank; ++b) {
      const Exact product = scale * truncated.factors.B.leftCols(b) * truncated.factors.A.topRows(b);
      CHECK((delta - product).norm() == Approx(sigma.tail(14 - b).norm()).epsilon(1e-10).margin(1e-12));
    }
    CHECK(truncated.lost == Approx(sigma.tail(14 - rank).norm() / sigma.norm()).epsilon(1e-12).margin(1e-14));
    const VectorX<double> A = truncated.factors.A.rowwise().norm(), B = truncated.factors.B.colwise().norm();
    CHECK(gap(A, B) < 1e-12);  // the square root of each singular value on either side
  }
  CHECK(truncated_factors(Exact::Zero(3, 4), 2, 1).lost == 0);
}

TEST_CASE("a reduced adapter of one component keeps a direction that lies along it, and says what it lost") {
  const Tuned weights = tuned(64, 64, 50);
  const Exact reduced = reduce_intruders(BaseSpectrum(weights.W0), weights.W1);
  const TruncatedFactors one = truncated_factors(reduced - weights.W0, 1, 0.25), three = truncated_factors(reduced - weights.W0, 3, 0.25);
  CHECK(one.lost > 0);  // the intruder of W1 is not exactly the direction that was added
  CHECK(one.lost < 0.05);
  CHECK(three.lost < 1e-12);

  LowRank<double> adapter(RowMatrix<double>::Zero(3, 64), Exact::Zero(64, 3), {.alpha = 8, .scale = alpha_over_max_rank});
  adapter.set_factors(three.factors);
  CHECK(gap(weights.W0 + adapter.delta(3), reduced) < 1e-12);
}

TEST_CASE("a reduction refuses what is out of range, does not fit or is no number") {
  const Tuned weights = tuned(12, 10, 5);
  const BaseSpectrum base(weights.W0);
  CHECK_THROWS_SAYING(std::invalid_argument, reduce_intruders(base, weights.W1, -0.1), "factor", "[0, 1]", "got -0.1");
  CHECK_THROWS_SAYING(std::invalid_argument, reduce_intruders(base, weights.W1, 1.5), "factor", "got 1.5");
  CHECK_THROWS_SAYING(std::invalid_argument, reduce_intruders(base, weights.W1, nan<double>), "factor", "nan");
  CHECK_THROWS_SAYING(std::invalid_argument, reduce_intruders(base, weights.W1, 0.5, {.top = 0}), "top", "got 0");
  CHECK_THROWS_SAYING(ShapeError, reduce_intruders(base, noise<double>(11, 10, 1)), "reduce_intruders: rows", "expected 12", "got 11");
  CHECK_THROWS_SAYING(ShapeError, reduce_intruders(base, noise<double>(12, 11, 1)), "reduce_intruders: columns", "expected 10", "got 11");
  CHECK_THROWS_SAYING(NonFiniteError, reduce_intruders(base, all_nan<double>(12, 10)), "reduce_intruders: W", "expected finite");
  CHECK_THROWS_SAYING(std::invalid_argument, truncated_factors(weights.W1, 11, 1), "truncated_factors: rank", "[1, 10]", "got 11");
  CHECK_THROWS_SAYING(std::invalid_argument, truncated_factors(weights.W1, 0, 1), "truncated_factors: rank", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, truncated_factors(weights.W1, 1, 0), "truncated_factors: scale", "got 0");
  CHECK_THROWS_SAYING(NonFiniteError, truncated_factors(all_nan<float>(3, 3), 1, 1), "truncated_factors: delta", "expected finite");
}

}  // namespace dylora::test
