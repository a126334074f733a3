#include "dylora/adapters/low_rank.hpp"
#include "dylora/adapters/stacked.hpp"
#include "dylora/layers/linear.hpp"
#include "support/catch.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/values.hpp"

// What LoRA and DyLoRA are known by, each shown once on the smallest thing that has it; the laws show the same on everything.
namespace dylora::test {

namespace {

constexpr Index in = 9, out = 8, rank = 4, samples = 5;

template <class S>
Linear<S> trained_layer() {
  Linear<S> layer = MakeLayer<Linear<S>>::make(in, out, true, rank, 1);
  randomize<Linear<S>>(layer, 2);
  return layer;
}

template <class L>
typename L::Gradients gradients_of(const L& layer, RankSlice slice) {
  using S = typename L::Scalar;
  typename L::Cache cache;
  auto gradients = zeros_like(layer);
  (void)layer.forward(noise<S>(in, samples, 3), slice, cache);
  (void)layer.backward(noise<S>(out, samples, 4), cache, gradients);
  return gradients;
}

}  // namespace

TEMPLATE_TEST_CASE("oracle of LoRA: after initialisation the layer is its weight bit for bit", "", float, double) {
  Rng rng(5);
  const DenseWeight<TestType> W(noise<TestType>(out, in, 6), noise<TestType>(out, 1, 7));
  const Linear<TestType> layer(W, {.max_rank = rank}, rng);
  const FrozenLinear<TestType> base(W);
  const MatrixX<TestType> x = noise<TestType>(in, samples, 3);
  CHECK_FALSE(layer.adapter.A.isZero(0));
  CHECK(same_bits(layer.forward(x, rank), base.forward(x, RankSlice::none())));
}

TEMPLATE_TEST_CASE("oracle of LoRA: a merged weight gives what the layer gives and merging leaves the layer as it was", "", float, double) {
  const Linear<TestType> layer = trained_layer<TestType>();
  const MatrixX<TestType> x = noise<TestType>(in, samples, 3), before = layer.base.W;
  const FrozenLinear<TestType> merged(layer.merged(rank)), again(layer.merged(rank));
  CHECK(gap(in_double(merged.forward(x, RankSlice::none())), in_double(layer.forward(x, rank))) < rounding<TestType>);
  CHECK(same_bits(layer.base.W, before));
  CHECK(same_bits(merged.base.W, again.base.W));
}

TEMPLATE_TEST_CASE("oracle of LoRA: a weight that is stored as in by out gives the same output and gradients", "", float, double) {
  using S = TestType;
  using L = Linear<S, LowRank<S>, DenseWeight<S, RowMatrix<S>>>;  // the memory of its transpose, column by column
  const Linear<S> layer = trained_layer<S>();
  const L other(DenseWeight<S, RowMatrix<S>>(RowMatrix<S>(layer.base.W), layer.base.bias), layer.adapter);
  const MatrixX<S> x = noise<S>(in, samples, 3), dy = noise<S>(out, samples, 4);
  typename Linear<S>::Cache cache;
  typename L::Cache other_cache;
  auto gradients = zeros_like(layer);
  auto other_gradients = zeros_like(other);
  CHECK(gap(in_double(other.forward(x, rank, other_cache)), in_double(layer.forward(x, rank, cache))) < rounding<S>);
  CHECK(gap(in_double(other.backward(dy, other_cache, other_gradients)), in_double(layer.backward(dy, cache, gradients))) < rounding<S>);
  CHECK(same_bits(values<L>(other_gradients), values<Linear<S>>(gradients)));
}

TEMPLATE_TEST_CASE("oracle of LoRA: a merged projection is its slices apart and a slice without adapter is exactly zero", "", float,
                   double) {
  using S = TestType;
  const LowRank<S> q = make_adapter<LowRank<S>>(in, 4, rank, 1), none = make_adapter<LowRank<S>>(in, 4, 0, 2),
                   v = make_adapter<LowRank<S>>(in, 4, rank, 3);
  Stacked<LowRank<S>> stacked({q, none, v});
  randomize<Stacked<LowRank<S>>>(stacked, 4);
  const MatrixX<S> delta = stacked.delta(3);
  CHECK(same_bits(MatrixX<S>(delta.topRows(4)), stacked.slices[0].delta(3)));
  CHECK(delta.middleRows(4, 4).isZero(0));
  CHECK(same_bits(MatrixX<S>(delta.bottomRows(4)), stacked.slices[2].delta(3)));
}

TEMPLATE_TEST_CASE("oracle of DyLoRA: with B = 0 every rank is the base", "", float, double) {
  Linear<TestType> layer = trained_layer<TestType>();
  layer.adapter.B.setZero();
  const MatrixX<TestType> x = noise<TestType>(in, samples, 3), base = layer.forward(x, RankSlice::none());
  for (Index b = 1; b <= rank; ++b) CHECK(same_bits(layer.forward(x, b), base));
}

TEMPLATE_TEST_CASE("oracle of DyLoRA: at the largest rank it is LoRA of the same alpha", "", float, double) {
  using S = TestType;
  const Linear<S> layer = trained_layer<S>();
  const MatrixX<double> x = in_double(noise<S>(in, samples, 3)), B = in_double(layer.adapter.B),
                        A = layer.adapter.A.template cast<double>();
  MatrixX<double> lora = in_double(layer.base.W) * x + law_alpha / rank * B * (A * x);
  lora.colwise() += VectorX<double>(layer.base.bias.template cast<double>());
  CHECK(gap(in_double(layer.forward(noise<S>(in, samples, 3), rank)), lora) < rounding<S>);
}

TEMPLATE_TEST_CASE("oracle of DyLoRA: components past the rank never change the output and their gradient is exactly zero", "", float,
                   double) {
  using L = Linear<TestType>;
  const L layer = trained_layer<TestType>();
  const MatrixX<TestType> x = noise<TestType>(in, samples, 3);
  for (Index b = 1; b < rank; ++b) {
    L changed = layer;
    changed.adapter.A.bottomRows(rank - b).setConstant(7);
    changed.adapter.B.rightCols(rank - b).setConstant(-7);
    CHECK(same_bits(changed.forward(x, b), layer.forward(x, b)));
    CHECK(component_values<L>(gradients_of(layer, b), b).isZero(0));
  }
}

TEMPLATE_TEST_CASE("oracle of DyLoRA: frozen mode has the gradient of nested mode at the newest component and none elsewhere", "", float,
                   double) {
  using L = Linear<TestType>;
  const L layer = trained_layer<TestType>();
  for (Index b = 2; b <= rank; ++b) {
    const auto frozen = gradients_of(layer, {b, b - 1}), nested = gradients_of(layer, b);
    CHECK(same_bits(component_values<L>(frozen, b - 1, b), component_values<L>(nested, b - 1, b)));
    CHECK(component_values<L>(frozen, 0, b - 1).isZero(0));
    CHECK_FALSE(component_values<L>(nested, 0, b - 1).isZero(0));
  }
}

}  // namespace dylora::test
