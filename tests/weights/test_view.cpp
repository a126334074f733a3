#include <type_traits>

#include "dylora/weights/view.hpp"

#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

template <class S>
using ByColumns = WeightView<S>;
template <class S>
using ByRows = WeightView<S, RowMatrix<S>>;

using WeightsUnderTest = InFloatAndDouble<ByColumns, ByRows>;

}  // namespace dylora::test

#include "laws/weight_laws.hpp"

namespace dylora::test {

TEST_CASE("a view reads the memory that it was given and copies nothing") {
  MatrixX<float> W = noise<float>(4, 3, 1);
  VectorX<float> bias = noise<float>(4, 1, 2);
  const WeightView<float> view(W, bias);
  CHECK(view.values().data() == W.data());
  CHECK(view.bias().data() == bias.data());
  const DenseWeight<float> owner(W, bias);
  CHECK(owner.view().values().data() == owner.W.data());
}

TEST_CASE("a stride of 0 means the tightest in either storage order") {
  const MatrixX<float> W = noise<float>(4, 3, 1);
  const RowMatrix<float> rows = W;
  CHECK(same_bits(WeightView<float>(W.data(), 4, 3).dense(), W));
  CHECK(same_bits(WeightView<float, RowMatrix<float>>(rows.data(), 4, 3).dense(), W));
}

TEST_CASE("a view of columns reads a row-major in × out matrix as GPT-2 keeps it") {
  const RowMatrix<float> in_by_out = noise<float>(3, 4, 1);
  CHECK(same_bits(WeightView<float>(in_by_out.data(), 4, 3).dense(), MatrixX<float>(in_by_out.transpose())));
}

TEST_CASE("a view reads a block of a matrix where it is, and nothing that would be gone") {
  MatrixX<float> qkv = noise<float>(5, 9, 1);
  const VectorX<float> bias = noise<float>(5, 1, 2);
  const WeightView<float> view(qkv.middleCols(3, 4), bias);
  CHECK(view.values().data() == qkv.col(3).data());
  CHECK(view.bias().data() == bias.data());
  CHECK(same_bits(view.dense(), MatrixX<float>(qkv.middleCols(3, 4))));
  const RowMatrix<float> rows = qkv;
  CHECK(WeightView<float, RowMatrix<float>>(rows.middleRows(1, 2)).values().data() == rows.row(1).data());

  STATIC_REQUIRE_FALSE(std::is_constructible_v<WeightView<float>, MatrixX<float>>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<WeightView<float>, MatrixX<float>, const VectorX<float>&>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<WeightView<float>, const MatrixX<float>&, VectorX<float>>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<WeightView<float>, const RowMatrix<float>&>);
}

TEST_CASE("a view refuses null and empty memory and a stride that is too small") {
  const MatrixX<float> W = noise<float>(4, 3, 1);
  CHECK_THROWS_SAYING(ShapeError, WeightView<float>(nullptr, 4, 3), "WeightView: values", "12 elements", "got null");
  CHECK_THROWS_SAYING(ShapeError, WeightView<float>(W.data(), 0, 3), "weight", "at least 1 × 1", "got 0 × 3");
  CHECK_THROWS_SAYING(ShapeError, WeightView<float>(W.data(), -1, 3), "weight", "at least 1 × 1", "got -1 × 3");
  CHECK_THROWS_SAYING(std::invalid_argument, WeightView<float>(W.data(), 4, 3, nullptr, 3), "WeightView: stride", "[4, ", "got 3");
  CHECK_THROWS_SAYING(std::invalid_argument, (WeightView<float, RowMatrix<float>>(W.data(), 4, 3, nullptr, 2)), "WeightView: stride",
                      "[3, ", "got 2");
  CHECK_THROWS_SAYING(std::invalid_argument, WeightView<float>(W.data(), 4, 3, nullptr, -4), "WeightView: stride", "[4, ", "got -4");
  const VectorX<float> bias = noise<float>(3, 1, 1);
  CHECK_THROWS_SAYING(ShapeError, WeightView<float>(W, bias), "WeightView: size of bias", "expected 4", "got 3");
}

}  // namespace dylora::test
