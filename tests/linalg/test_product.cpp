#include "dylora/linalg/product.hpp"

#include <cstdint>
#include <tuple>
#include <vector>

#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

/// The sum in long double, rounded once.
template <class S, class D, class L, class R>
MatrixX<double> reference(const D& before, const L& lhs, const R& rhs, S scale) {
  MatrixX<double> result(before.rows(), before.cols());
  for (Index i = 0; i < result.rows(); ++i) {
    for (Index j = 0; j < result.cols(); ++j) {
      long double sum = 0;
      for (Index k = 0; k < lhs.cols(); ++k) sum += static_cast<long double>(lhs(i, k)) * static_cast<long double>(rhs(k, j));
      result(i, j) = static_cast<double>(static_cast<long double>(before(i, j)) + static_cast<long double>(scale) * sum);
    }
  }
  return result;
}

/// Values in [1/2, 1): sums grow with the depth, so that one bound on the relative error holds for every element.
template <class S, class M>
M positive(Index rows, Index cols, std::uint64_t seed) {
  Rng rng(seed);
  M m(rows, cols);
  for (Index i = 0; i < m.size(); ++i) m.data()[i] = static_cast<S>(0.5 + rng.uniform() / 2);
  return m;
}

/// The largest error of an element relative to that element, in units of the bound for a sum of `depth` terms in any order.
template <class S, class M>
double error(const M& got, const MatrixX<double>& expected, Index depth) {
  if (got.size() == 0) return 0;
  const double bound = static_cast<double>(depth + 2) * static_cast<double>(std::numeric_limits<S>::epsilon()) / 2;
  return ((got.template cast<double>() - expected).array().abs() / expected.array().abs()).maxCoeff() / bound;
}

// Nothing, one, odd, around a register tile, few columns of many rows, a tile of them, around the blocks of depth 256, columns 1032 and
// rows 144 to 288.
const std::vector<std::tuple<Index, Index, Index>> shapes{
    {0, 3, 2},      {3, 0, 2},     {1, 1, 1},     {1, 7, 3},    {7, 1, 3},    {5, 3, 1},    {16, 6, 9},    {17, 7, 33},
    {33, 13, 255},  {49, 25, 256}, {15, 5, 257},  {3, 2, 513},  {243, 9, 17}, {9, 481, 17}, {1, 483, 258}, {241, 1, 260},
    {97, 487, 300}, {2055, 3, 20}, {2049, 8, 13}, {293, 9, 17}, {9, 1035, 9}, {64, 40, 64}};

template <class S, class Lhs, class Rhs, class Dst>
void check_product(Index rows, Index cols, Index depth) {
  INFO(rows << " × " << cols << " × " << depth);
  const S scale = S(-1.75);
  const Lhs lhs = positive<S, Lhs>(rows, depth, 1);
  const Rhs rhs = positive<S, Rhs>(depth, cols, 2);
  const Dst before = -positive<S, Dst>(rows, cols, 3);  // of the sign of scale · lhs · rhs: nothing cancels
  Dst added = before, set = Dst::Constant(rows, cols, nan<S>);
  add_product(added, lhs, rhs, scale);
  set_product(set, lhs, rhs, scale);
  CHECK(error<S>(added, reference(before, lhs, rhs, scale), depth) <= 1);
  CHECK(error<S>(set, reference(Dst(Dst::Zero(rows, cols)), lhs, rhs, scale), depth) <= 1);

  // The same operands seen through transposes and inside larger matrices give the same bits.
  using LhsT = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Lhs::IsRowMajor ? Eigen::ColMajor : Eigen::RowMajor>;
  const LhsT turned_storage = lhs;
  const Lhs lhs_transposed = lhs.transpose();
  Lhs large_lhs = Lhs::Constant(rows + 3, depth + 4, nan<S>);
  Rhs large_rhs = Rhs::Constant(depth + 5, cols + 2, nan<S>);
  Dst large_dst = Dst::Constant(rows + 2, cols + 3, S(9)), by_transpose = before, by_storage = before;
  large_lhs.block(2, 1, rows, depth) = lhs;
  large_rhs.block(1, 2, depth, cols) = rhs;
  large_dst.block(1, 2, rows, cols) = before;
  add_product(by_transpose, lhs_transposed.transpose(), rhs, scale);
  add_product(by_storage, turned_storage, rhs, scale);
  add_product(large_dst.block(1, 2, rows, cols), large_lhs.block(2, 1, rows, depth), large_rhs.block(1, 2, depth, cols), scale);
  CHECK(same_bits(MatrixX<S>(by_transpose), MatrixX<S>(added)));
  CHECK(same_bits(MatrixX<S>(by_storage), MatrixX<S>(added)));
  CHECK(same_bits(MatrixX<S>(large_dst.block(1, 2, rows, cols)), MatrixX<S>(added)));
  large_dst.block(1, 2, rows, cols).setConstant(S(9));
  CHECK((large_dst.array() == S(9)).all());  // nothing outside of the block was written
}

}  // namespace

TEMPLATE_TEST_CASE("a product is the sum over the depth for every shape and storage order and block", "", float, double) {
  using S = TestType;
  for (const auto& [rows, cols, depth] : shapes) {
    check_product<S, MatrixX<S>, MatrixX<S>, MatrixX<S>>(rows, cols, depth);
    check_product<S, RowMatrix<S>, MatrixX<S>, MatrixX<S>>(rows, cols, depth);
    check_product<S, MatrixX<S>, RowMatrix<S>, RowMatrix<S>>(rows, cols, depth);
    check_product<S, RowMatrix<S>, RowMatrix<S>, RowMatrix<S>>(rows, cols, depth);
  }
}

TEMPLATE_TEST_CASE("a product without depth adds nothing and sets zero", "", float, double) {
  using S = TestType;
  const MatrixX<S> lhs(3, 0), rhs(0, 2), before = noise<S>(3, 2, 1);
  MatrixX<S> dst = before;
  add_product(dst, lhs, rhs);
  CHECK(same_bits(dst, before));
  dst.setConstant(nan<S>);
  set_product(dst, lhs, rhs);
  CHECK(dst.isZero(0));
}

TEMPLATE_TEST_CASE("an element depends on its own row and column only", "", float, double) {
  using S = TestType;
  const Index rows = 53, cols = 29, depth = 301;
  const MatrixX<S> lhs = noise<S>(rows, depth, 1), rhs = noise<S>(depth, cols, 2), before = noise<S>(rows, cols, 3);
  MatrixX<S> whole = before;
  add_product(whole, lhs, rhs, S(0.3));
  for (Index j = 0; j < cols; ++j) {
    MatrixX<S> column = before.col(j);
    add_product(column, lhs, rhs.col(j), S(0.3));
    CHECK(same_bits(column, MatrixX<S>(whole.col(j))));
  }
  const RowMatrix<S> lhs_rows = lhs;
  for (const Index some : {2, 3, 4, 8}) {
    for (Index j = 0; j + some <= cols; j += some) {
      MatrixX<S> columns = before.middleCols(j, some), by_rows = columns;
      add_product(columns, lhs, rhs.middleCols(j, some), S(0.3));
      add_product(by_rows, lhs_rows, rhs.middleCols(j, some), S(0.3));
      CHECK(same_bits(columns, MatrixX<S>(whole.middleCols(j, some))));
      CHECK(same_bits(by_rows, columns));
    }
  }
  for (Index i = 0; i < rows; ++i) {
    MatrixX<S> row = before.row(i);
    add_product(row, MatrixX<S>(lhs.row(i)), rhs, S(0.3));
    CHECK(same_bits(row, MatrixX<S>(whole.row(i))));
  }
  // Hence a NaN stays where it came from.
  MatrixX<S> spoiled = rhs, dst = before;
  spoiled(7, 5) = nan<S>;
  add_product(dst, lhs, spoiled, S(0.3));
  CHECK(dst.col(5).array().isNaN().all());
  dst.col(5) = whole.col(5);
  CHECK(same_bits(dst, whole));
}

TEMPLATE_TEST_CASE("splitting the depth at a block boundary changes no bit", "", float, double) {
  using S = TestType;
  const MatrixX<S> lhs = noise<S>(20, 600, 1), rhs = noise<S>(600, 11, 2);
  MatrixX<S> whole = noise<S>(20, 11, 3), parts = whole;
  add_product(whole, lhs, rhs);
  add_product(parts, lhs.leftCols(256), rhs.topRows(256));
  add_product(parts, lhs.middleCols(256, 256), rhs.middleRows(256, 256));
  add_product(parts, lhs.rightCols(88), rhs.bottomRows(88));
  CHECK(same_bits(parts, whole));
}

TEMPLATE_TEST_CASE("dot products are the sum over the depth for every shape and storage order", "", float, double) {
  using S = TestType;
  for (const Index rows : {1, 2, 3, 4, 5, 9, 16, 17}) {
    for (const Index cols : {1, 2, 7, 16, 33}) {
      for (const Index depth : {0, 1, 15, 16, 257, 300}) {
        INFO(rows << " × " << cols << " × " << depth);
        const RowMatrix<S> lhs = positive<S, RowMatrix<S>>(rows, depth, 1);
        const MatrixX<S> rhs = positive<S, MatrixX<S>>(depth, cols, 2), column_major = lhs;
        const MatrixX<double> expected = reference(MatrixX<S>(MatrixX<S>::Zero(rows, cols)), lhs, rhs, S(-1.75));
        MatrixX<S> dst = MatrixX<S>::Constant(rows, cols, nan<S>), other = dst;
        set_dot_products(dst, lhs, rhs, S(-1.75));
        CHECK((depth == 0 ? dst.isZero(0) : error<S>(dst, expected, depth) <= 1));
        set_dot_products(other, column_major, rhs, S(-1.75));
        CHECK((depth == 0 ? other.isZero(0) : error<S>(other, expected, depth) <= 1));
      }
    }
  }
}

TEMPLATE_TEST_CASE("a dot product depends on its own row and column, and the number of rows, only", "", float, double) {
  using S = TestType;
  const Index rows = 13, cols = 37, depth = 131;
  const RowMatrix<S> lhs = noise<S>(rows, depth, 1);
  const MatrixX<S> rhs = noise<S>(depth, cols, 2);
  MatrixX<S> whole(rows, cols);
  set_dot_products(whole, lhs, rhs, S(0.3));
  for (Index j = 0; j < cols; ++j) {
    MatrixX<S> column(rows, 1);
    set_dot_products(column, lhs, rhs.col(j), S(0.3));
    CHECK(same_bits(column, MatrixX<S>(whole.col(j))));
  }
  MatrixX<S> large = MatrixX<S>::Constant(rows + 2, cols + 3, S(9));
  set_dot_products(large.block(1, 2, rows, cols), lhs, rhs, S(0.3));
  CHECK(same_bits(MatrixX<S>(large.block(1, 2, rows, cols)), whole));
  large.block(1, 2, rows, cols).setConstant(S(9));
  CHECK((large.array() == S(9)).all());
  RowMatrix<S> spoiled = lhs;
  spoiled(7, 5) = nan<S>;
  MatrixX<S> dst(rows, cols);
  set_dot_products(dst, spoiled, rhs, S(0.3));
  CHECK(dst.row(7).array().isNaN().all());
  dst.row(7) = whole.row(7);
  CHECK(same_bits(dst, whole));
  CHECK_THROWS_SAYING(ShapeError, set_dot_products(dst, lhs, noise<S>(depth + 1, cols, 2)), "product: rows of the right operand",
                      "expected 131", "got 132");
}

TEMPLATE_TEST_CASE("no kernel rounds otherwise than the others, however short the sums", "", float, double) {
  using S = TestType;
  const Index cols = 11;
  for (const Index rows : {1, 6, 17, 33}) {
    for (const Index depth : {1, 2, 5, 8, 17}) {
      INFO(rows << " × " << depth);
      const MatrixX<S> lhs = noise<S>(rows, depth, 1), rhs = noise<S>(depth, cols, 2), before = noise<S>(rows, cols, 3);
      const RowMatrix<S> lhs_rows = lhs;
      MatrixX<S> whole = before, dots(rows, cols);
      add_product(whole, lhs, rhs, S(0.7));
      set_dot_products(dots, lhs_rows, rhs, S(0.7));
      for (const Index some : {1, 2, 3, 5, 8}) {
        for (Index j = 0; j + some <= cols; ++j) {
          MatrixX<S> part = before.middleCols(j, some), by_rows = part, some_dots(rows, some);
          add_product(part, lhs, rhs.middleCols(j, some), S(0.7));
          add_product(by_rows, lhs_rows, rhs.middleCols(j, some), S(0.7));
          set_dot_products(some_dots, lhs_rows, rhs.middleCols(j, some), S(0.7));
          CHECK(same_bits(part, MatrixX<S>(whole.middleCols(j, some))));
          CHECK(same_bits(by_rows, part));
          CHECK(same_bits(some_dots, MatrixX<S>(dots.middleCols(j, some))));
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("dot products of columns are those of their columns", "", float, double) {
  using S = TestType;
  for (const Index size : {1, 7, 16, 33}) {
    for (const Index count : {1, 5, 16, 37}) {
      INFO(size << " × " << count);
      const MatrixX<S> a = positive<S, MatrixX<S>>(size + 2, count, 1), b = positive<S, MatrixX<S>>(size + 3, count, 2);
      VectorX<S> dots = VectorX<S>::Constant(count + 1, S(9));
      detail::column_dot_products(size, count, a.data(), a.outerStride(), b.data(), b.outerStride(), dots.data());
      for (Index i = 0; i < count; ++i) {
        const MatrixX<double> expected =
            reference(MatrixX<S>(MatrixX<S>::Zero(1, 1)), a.col(i).head(size).transpose(), b.col(i).head(size), S(1));
        CHECK(error<S>(MatrixX<S>(dots.segment(i, 1)), expected, size) <= 1);
      }
      CHECK(dots[count] == S(9));
    }
  }
}

TEST_CASE("a product refuses shapes that do not fit and then writes nothing") {
  const MatrixX<float> lhs = noise<float>(3, 4, 1), rhs = noise<float>(4, 2, 2), before = noise<float>(3, 2, 3);
  MatrixX<float> dst = before, tall(4, 2), wide(3, 5);
  CHECK_THROWS_SAYING(ShapeError, add_product(tall, lhs, rhs), "product: rows of the left operand", "expected 4", "got 3");
  CHECK_THROWS_SAYING(ShapeError, add_product(wide, lhs, rhs), "product: columns of the right operand", "expected 5", "got 2");
  CHECK_THROWS_SAYING(ShapeError, add_product(dst, lhs, noise<float>(5, 2, 1)), "product: rows of the right operand", "expected 4",
                      "got 5");
  CHECK_THROWS_SAYING(ShapeError, set_product(dst, lhs, noise<float>(5, 2, 1)), "product: rows of the right operand", "expected 4",
                      "got 5");
  CHECK(same_bits(dst, before));
}

TEST_CASE("a destination that is strided both ways is refused") {
  MatrixX<float> dst = noise<float>(4, 4, 1);
  const MatrixX<float> before = dst, a = noise<float>(1, 3, 2), b = noise<float>(3, 4, 3);
  CHECK_THROWS_SAYING(ShapeError, add_product(dst.row(3), a, b), "inner stride", "expected 1", "got 4");
  CHECK(same_bits(dst, before));
}

}  // namespace dylora::test
