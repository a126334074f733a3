#include "dylora/methods/adalora/orthogonality.hpp"

#include <Eigen/QR>

#include "dylora/layers/linear.hpp"
#include "methods/adalora/trained_layer.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

/// Gradients of zero that hold this slice to be trained.
Linear<double>::Gradients trained_at(const Linear<double>& layer, RankSlice rank) {
  auto gradients = zeros_like(layer);
  gradients.adapter.A.components.insert(rank);
  gradients.adapter.B.components.insert(rank);
  return gradients;
}

Orthogonality<double> at_rank(const Linear<double>& layer, Index rank) {
  return orthogonality<double>(layer.adapter.A.topRows(rank), layer.adapter.B.leftCols(rank));
}

}  // namespace

TEST_CASE("oracle of AdaLoRA: the gradient of the orthogonality penalty is that of differences") {
  const RowMatrix<double> A = noise<double>(max_rank, in, 1);
  const MatrixX<double> B = noise<double>(out, max_rank, 2);
  const auto exact = orthogonality(A, B);
  constexpr double step = 1e-5;
  const auto difference = [&](auto matrix, Index i, auto&& value) {
    matrix.data()[i] += step;
    const double above = value(matrix);
    matrix.data()[i] -= 2 * step;
    return (above - value(matrix)) / (2 * step);
  };
  for (Index i = 0; i < A.size(); ++i) {
    const double expected = difference(A, i, [&](const RowMatrix<double>& changed) { return orthogonality(changed, B).value; });
    CHECK(exact.A.data()[i] == Approx(expected).epsilon(1e-6).margin(1e-6));
  }
  for (Index i = 0; i < B.size(); ++i) {
    const double expected = difference(B, i, [&](const MatrixX<double>& changed) { return orthogonality(A, changed).value; });
    CHECK(exact.B.data()[i] == Approx(expected).epsilon(1e-6).margin(1e-6));
  }
}

TEMPLATE_TEST_CASE("components that are orthogonal and of length 1 have no penalty and no gradient", "", float, double) {
  using S = TestType;
  const auto orthonormal = [](Index rows, std::uint64_t seed) -> MatrixX<S> {
    const Eigen::HouseholderQR<MatrixX<S>> qr(noise<S>(rows, max_rank, seed));
    return qr.householderQ() * MatrixX<S>::Identity(rows, max_rank);
  };
  const RowMatrix<S> A = orthonormal(in, 1).transpose();
  const auto none = orthogonality<S>(A, orthonormal(out, 2));
  CHECK(none.value < rounding<S>);
  CHECK(none.A.cwiseAbs().maxCoeff() < 4 * rounding<S>);
  CHECK(none.B.cwiseAbs().maxCoeff() < 4 * rounding<S>);
  const auto fresh = orthogonality<S>(A, MatrixX<S>::Zero(out, max_rank));  // B = 0: a 1 for each component, and no way out
  CHECK(fresh.value == Approx(max_rank).epsilon(rounding<S>));
  CHECK(fresh.B.isZero(0));
}

TEST_CASE("a step at rank b makes its components orthogonal and no others") {
  const Linear<double> layer = trained_layer();
  for (Index b = 1; b <= max_rank; ++b) {
    for (const Index t : {Index{0}, b - 1}) {
      auto gradients = trained_at(layer, RankSlice(b, t));
      const auto expected = at_rank(layer, b);
      CHECK(add_orthogonality(layer, gradients, 0.5) == Approx(0.5 * expected.value).epsilon(1e-12));
      MatrixX<double> dA = MatrixX<double>::Zero(max_rank, in), dB = MatrixX<double>::Zero(out, max_rank);
      dA.middleRows(t, b - t) = 0.5 * expected.A.middleRows(t, b - t);
      dB.middleCols(t, b - t) = 0.5 * expected.B.middleCols(t, b - t);
      CHECK(gap(MatrixX<double>(gradients.adapter.A), dA) < rounding<double>);
      CHECK(gap(MatrixX<double>(gradients.adapter.B), dB) < rounding<double>);
      add_orthogonality(layer, gradients, 0.5);  // adds
      CHECK(gap(MatrixX<double>(gradients.adapter.A), 2 * dA) < rounding<double>);
    }
  }
  auto untrained = zeros_like(layer);
  CHECK(add_orthogonality(layer, untrained, 0.5) == 0);
  CHECK(values<Linear<double>>(untrained).isZero(0));
}

TEST_CASE("a penalty that does not fit is refused by name") {
  const Linear<double> layer = trained_layer();
  auto gradients = trained_at(layer, RankSlice(4));
  for (const double weight : {-1.0, nan<double>})
    CHECK_THROWS_SAYING(std::invalid_argument, add_orthogonality(layer, gradients, weight), "add_orthogonality: weight", "≥ 0", "got");
  Linear<double>::Gradients empty;
  CHECK_THROWS_SAYING(ShapeError, add_orthogonality(layer, empty, 1), "add_orthogonality: gradient of lora_A", "expected 4 × 9");
  CHECK_THROWS_SAYING(ShapeError, orthogonality<double>(noise<double>(3, in, 1), noise<double>(out, 4, 1)), "orthogonality", "columns of B",
                      "expected 3", "got 4");
}

}  // namespace dylora::test
