#include "dylora/linalg/svd.hpp"

#include <atomic>

#include "support/catch.hpp"
#include "support/threads.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

MatrixX<double> product_of(const Svd& svd) { return svd.U * svd.singular_values.asDiagonal() * svd.V.transpose(); }

double non_orthogonality(const MatrixX<double>& Q) { return (Q.transpose() * Q - MatrixX<double>::Identity(Q.cols(), Q.cols())).norm(); }

}  // namespace

TEST_CASE("a thin decomposition is orthonormal, falls, and multiplies to the matrix") {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{1, 1}, {1, 9}, {9, 1}, {20, 7}, {7, 20}, {70, 70}, {90, 40}, {40, 90}}) {
    const MatrixX<double> W = noise<double>(rows, cols, 1);
    const Svd svd = thin_svd(W);
    const Index k = std::min(rows, cols);
    REQUIRE(svd.U.rows() == rows);
    REQUIRE(svd.U.cols() == k);
    REQUIRE(svd.V.rows() == cols);
    REQUIRE(svd.V.cols() == k);
    REQUIRE(svd.singular_values.size() == k);
    CHECK(gap(product_of(svd), W) < 1e-13);
    CHECK(non_orthogonality(svd.U) < 1e-13);
    CHECK(non_orthogonality(svd.V) < 1e-13);
    for (Index j = 1; j < k; ++j) CHECK(svd.singular_values[j] <= svd.singular_values[j - 1]);
    CHECK(svd.singular_values[k - 1] >= 0);
  }
}

TEST_CASE("the singular values of a diagonal are its elements without sign, in order") {
  const Svd svd = thin_svd(MatrixX<double>(VectorX<double>{{1, -5, 0, 2}}.asDiagonal()));
  CHECK(gap(svd.singular_values, VectorX<double>{{5, 2, 1, 0}}) < 1e-15);
  CHECK(std::abs(svd.U(1, 0)) == Approx(1));
  CHECK(svd.U(1, 0) * svd.V(1, 0) == Approx(-1));
  CHECK(thin_svd(MatrixX<double>::Zero(3, 2)).singular_values.isZero(0));
}

TEST_CASE("the largest element of each left vector is positive") {
  const MatrixX<double> W = noise<double>(30, 20, 2);
  const Svd svd = thin_svd(W), negative = thin_svd(-W);
  for (Index j = 0; j < 20; ++j) CHECK(svd.U.col(j).maxCoeff() == svd.U.col(j).cwiseAbs().maxCoeff());
  CHECK(gap(negative.U, svd.U) < 1e-12);
  CHECK(gap(negative.V, -svd.V) < 1e-12);
}

TEST_CASE("a decomposition takes any scalar, storage order and expression, and computes in double") {
  const MatrixX<float> W = noise<float>(12, 9, 3);
  const Svd expected = thin_svd(MatrixX<double>(W.cast<double>()));
  CHECK(same_bits(thin_svd(W).U, expected.U));
  CHECK(same_bits(thin_svd(RowMatrix<float>(W)).U, expected.U));
  CHECK(same_bits(thin_svd(W.transpose().transpose()).V, expected.V));
  CHECK(same_bits(thin_svd(W.topRows(5)).V, thin_svd(MatrixX<float>(W.topRows(5))).V));
}

TEST_CASE("a decomposition has the same bits for any number of threads") {
  const MatrixX<double> W = noise<double>(670, 670, 4);  // large enough for Eigen's own threads to change them
  const Svd expected = thin_svd(W);
  for_each_threading([&] { return thin_svd(W); },
                     [&](const Svd& got, const std::string& where) {
                       INFO(where);
                       CHECK(same_bits(got.U, expected.U));
                       CHECK(same_bits(got.singular_values, expected.singular_values));
                       CHECK(same_bits(got.V, expected.V));
                     });
}

TEST_CASE("what cannot be decomposed is refused") {
  CHECK_THROWS_SAYING(ShapeError, thin_svd(MatrixX<double>(0, 5)), "thin_svd", "with elements", "0 × 5");
  MatrixX<double> W = noise<double>(4, 3, 1);
  W(3, 2) = nan<double>;
  CHECK_THROWS_SAYING(NonFiniteError, thin_svd(W), "thin_svd: W", "expected finite");
  W(3, 2) = std::numeric_limits<double>::infinity();
  CHECK_THROWS_SAYING(NonFiniteError, thin_svd(W), "thin_svd: W", "expected finite");
}

TEST_CASE("of several decompositions all are tried and the first error is thrown") {
  std::atomic<int> calls = 0;
  const auto body = [&](Index i) {
    ++calls;
    if (i == 3 || i == 5) throw std::invalid_argument("number " + std::to_string(i));
  };
  CHECK_THROWS_SAYING(std::invalid_argument, detail::for_each_decomposition(7, body), "number 3");
  CHECK(calls == 7);
  detail::for_each_decomposition(0, body);
  detail::for_each_decomposition(1, body);
  CHECK(calls == 8);
}

}  // namespace dylora::test
