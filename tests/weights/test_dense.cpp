#include "dylora/weights/dense.hpp"

#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

template <class S>
using ByColumns = DenseWeight<S>;
template <class S>
using ByRows = DenseWeight<S, RowMatrix<S>>;

using WeightsUnderTest = InFloatAndDouble<ByColumns, ByRows>;

TEST_CASE("a dense weight takes over the matrix that is moved into it") {
  RowMatrix<float> W = noise<float>(4, 3, 1);
  const float* memory = W.data();
  const DenseWeight<float, RowMatrix<float>> weight(std::move(W));
  CHECK(weight.W.data() == memory);
}

TEST_CASE("a layer is made from a bare matrix") {
  Rng rng(1);
  const MatrixX<float> W = noise<float>(4, 3, 1);
  const Linear<float> layer(W, {.max_rank = 2}, rng);
  CHECK(same_bits(layer.base.W, W));
}

}  // namespace dylora::test

#include "laws/weight_laws.hpp"

namespace dylora::test {

TEST_CASE("a dense weight refuses an empty matrix and a bias of another size") {
  CHECK_THROWS_SAYING(ShapeError, DenseWeight<float>(MatrixX<float>(0, 3)), "weight", "at least 1 × 1", "got 0 × 3");
  CHECK_THROWS_SAYING(ShapeError, DenseWeight<float>(MatrixX<float>(3, 0)), "weight", "at least 1 × 1", "got 3 × 0");
  CHECK_THROWS_SAYING(ShapeError, DenseWeight<float>(noise<float>(4, 3, 1), VectorX<float>::Zero(3)), "DenseWeight: size of bias",
                      "expected 4", "got 3");
}

}  // namespace dylora::test
