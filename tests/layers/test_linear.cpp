#include "dylora/layers/linear.hpp"

#include "support/law.hpp"
#include "support/make.hpp"
#include "support/throws.hpp"

namespace dylora::test {

template <class S>
using Plain = Linear<S>;
template <class S>
using RowMajorBase = Linear<S, LowRank<S>, DenseWeight<S, RowMatrix<S>>>;
template <class S>
using StridedView = Linear<S, LowRank<S>, WeightView<S>>;
template <class S>
using RowMajorView = Linear<S, LowRank<S>, WeightView<S, RowMatrix<S>>>;
template <class S>
using Dropping = Linear<S, Dropout<LowRank<S>>>;
template <class S>
using Frozen = FrozenLinear<S, DenseWeight<S, RowMatrix<S>>>;

using LayersUnderTest = InFloatAndDouble<Plain, RowMajorBase, StridedView, RowMajorView, Dropping, Frozen>;

}  // namespace dylora::test

#include "laws/layer_laws.hpp"

namespace dylora::test {

TEMPLATE_TEST_CASE("a linear layer is W x plus its bias plus alpha over b times B A x", "", float, double) {
  using L = Linear<TestType>;
  L layer = MakeLayer<L>::make(1, law_rank);
  randomize<L>(layer, 3);
  const MatrixX<TestType> x = noise<TestType>(7, 4, 1);
  const MatrixX<double> W = in_double(layer.base.W), B = in_double(layer.adapter.B), A = layer.adapter.A.template cast<double>();
  for (Index b = 1; b <= law_rank; ++b) {
    MatrixX<double> expected = (W + law_alpha / static_cast<double>(b) * B.leftCols(b) * A.topRows(b)) * in_double(x);
    expected.colwise() += VectorX<double>(layer.base.bias.template cast<double>());
    CHECK(gap(in_double(layer.forward(x, b)), expected) < rounding<TestType>);
  }
}

TEMPLATE_TEST_CASE("without its adapter a linear layer is its weight bit for bit", "", float, double) {
  using L = Linear<TestType, LowRank<TestType>, WeightView<TestType, RowMatrix<TestType>>>;
  L layer = MakeLayer<L>::make(1, law_rank);
  randomize<L>(layer, 3);
  const MatrixX<TestType> x = noise<TestType>(7, 4, 1), dy = noise<TestType>(6, 4, 2);
  MatrixX<TestType> y(6, 4), dx = MatrixX<TestType>::Zero(7, 4);
  layer.base.apply(x, y);
  layer.base.add_apply_transposed(dy, dx);
  const auto none = run(layer, x, dy, RankSlice::none());
  CHECK(same_bits(none.y, y));
  CHECK(same_bits(none.dx, dx));
}

// Past the threshold for threads, with edges in every direction.
TEMPLATE_TEST_CASE("a sample's output and gradient do not depend on the batch it is in", "", float, double) {
  using S = TestType;
  using L = Linear<S>;
  L layer = MakeLayer<L>::make(530, 300, true, 13, 1);
  randomize<L>(layer, 2);
  const MatrixX<S> x = noise<S>(530, 70, 3), dy = noise<S>(300, 70, 4);
  for (const RankSlice rank : {RankSlice::none(), RankSlice{1}, RankSlice{13}}) {
    const auto batch = run(layer, x, dy, rank);
    for (const auto& [begin, count] : {std::pair<Index, Index>{0, 1}, {37, 1}, {69, 1}, {1, 5}, {3, 64}, {20, 17}}) {
      const auto part = run<L>(layer, x.middleCols(begin, count), dy.middleCols(begin, count), rank);
      CHECK(same_bits(part.y, MatrixX<S>(batch.y.middleCols(begin, count))));
      CHECK(same_bits(part.dx, MatrixX<S>(batch.dx.middleCols(begin, count))));
    }
  }
}

TEST_CASE("a row-major or strided input gives the bits of a plain one") {
  using L = Linear<float>;
  L layer = MakeLayer<L>::make(1, law_rank);
  randomize<L>(layer, 3);
  const MatrixX<float> x = noise<float>(7, 4, 1), y = layer.forward(x, 3);
  const RowMatrix<float> by_rows = x;
  MatrixX<float> large = all_nan<float>(9, 6);
  large.block(1, 1, 7, 4) = x;
  CHECK(same_bits(layer.forward(by_rows, 3), y));
  CHECK(same_bits(layer.forward(large.block(1, 1, 7, 4), 3), y));
  MatrixX<float> into = all_nan<float>(9, 6);
  L::Cache cache;
  layer.forward(x, 3, cache, into.block(2, 1, 6, 4));
  CHECK(same_bits(MatrixX<float>(into.block(2, 1, 6, 4)), y));
  CHECK(into.array().isNaN().count() == 9 * 6 - 6 * 4);
}

TEST_CASE("layers of one seed are the same layer") {
  Rng one(1), same(1);
  const MatrixX<float> W = noise<float>(6, 7, 1);
  const Linear<float> a(W, {.max_rank = 3}, one), b(W, {.max_rank = 3}, same);
  CHECK(same_bits(values<Linear<float>>(a), values<Linear<float>>(b)));
}

TEST_CASE("a linear layer refuses an adapter of other features") {
  const MatrixX<float> W = noise<float>(6, 7, 1);
  CHECK_THROWS_SAYING(ShapeError, Linear<float>(W, make_adapter<LowRank<float>>(8, 6, 2, 1)), "Linear: in_features", "expected 7", "got 8");
  CHECK_THROWS_SAYING(ShapeError, Linear<float>(W, make_adapter<LowRank<float>>(7, 5, 2, 1)), "Linear: out_features", "expected 6",
                      "got 5");
}

TEST_CASE("a layer is made from a matrix in either order, a map, or an expression") {
  const RowMatrix<float> W = noise<float>(4, 6, 1);
  Rng rng(1), same(1), again(1);
  const Linear<float> of_rows(W, {.max_rank = 2}, rng);
  const Linear<float> of_map(Eigen::Map<const RowMatrix<float>>(W.data(), 4, 6), {.max_rank = 2}, same);
  const Linear<float> of_expression(1 * W, {.max_rank = 2}, again);
  for (const auto* layer : {&of_rows, &of_map, &of_expression}) CHECK(same_bits(layer->base.W, MatrixX<float>(W)));
}

TEST_CASE("factors that were made to disagree after construction are refused") {
  auto layer = MakeLayer<Linear<float>>::make(6, 4, false, 3, 1);
  layer.adapter.B = MatrixX<float>::Ones(4, 2);
  CHECK_THROWS_SAYING(ShapeError, layer.forward(noise<float>(6, 2, 1), 3), "columns of B", "expected 3", "got 2");
}

}  // namespace dylora::test
