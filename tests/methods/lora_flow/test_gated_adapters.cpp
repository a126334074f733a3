#include "dylora/methods/lora_flow/gated_adapters.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "dylora/adapters/adapter.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/layers/attention/attention.hpp"
#include "dylora/layers/layer.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/methods/lora_flow/gate.hpp"
#include "dylora/ranks/truncate.hpp"
#include "dylora/train/adamw.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

constexpr Index in = 9, out = 7, samples = 6;

/// Trained adapters, each with a rank, an alpha and a scale rule of its own.
template <class S>
std::vector<LowRank<S>> trained_adapters(const std::vector<Index>& ranks) {
  std::vector<LowRank<S>> adapters;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    adapters.emplace_back(RowMatrix<S>(noise<S>(ranks[i], in, 10 + i)), noise<S>(out, ranks[i], 20 + i),
                          LowRankOptions{.alpha = 1.0 + static_cast<double>(i), .scale = i == 1 ? alpha_over_sqrt_rank : alpha_over_rank});
  }
  return adapters;
}

template <class S>
Buffer<S> buffer_of(const MatrixX<S>& values) {
  Buffer<S> buffer;
  buffer.assign(values);
  return buffer;
}

/// What a forward and a backward add to zero.
template <class S>
struct GatedResult {
  MatrixX<S> y, dx, d_weights;
};

template <class S>
GatedResult<S> run_gated(const GatedAdapters<S>& adapters, const MatrixX<S>& x, const MatrixX<S>& dy, const MatrixX<S>& weights,
                         const BatchRanks& ranks) {
  typename GatedAdapters<S>::Cache cache;
  typename GatedAdapters<S>::Workspace workspace;
  auto gradients = zeros_like(adapters);
  const Buffer<S> used = buffer_of(weights);
  Buffer<S> d_weights = buffer_of<S>(MatrixX<S>::Zero(weights.rows(), weights.cols()));
  cache.weights = &used;
  workspace.d_weights = &d_weights;
  GatedResult<S> result{MatrixX<S>::Zero(out, x.cols()), MatrixX<S>::Zero(in, x.cols()), {}};
  adapters.add_forward(x, ranks, cache, result.y);
  adapters.add_backward(x, dy, cache, gradients, workspace, result.dx);
  result.d_weights = d_weights.view();
  return result;
}

const std::vector<std::vector<Index>> rank_choices{{4, 4, 4}, {5, 2, 3}, {1, 0, 4}, {3}};

}  // namespace

TEMPLATE_TEST_CASE("gated adapters are the sum of the adapters each times its weight of the token", "", float, double) {
  using S = TestType;
  STATIC_REQUIRE(FactoredAdapter<GatedAdapters<S>>);
  STATIC_REQUIRE_FALSE(MergeableAdapter<GatedAdapters<S>>);
  const MatrixX<S> x = noise<S>(in, samples, 1), dy = noise<S>(out, samples, 2);
  for (const std::vector<Index>& ranks : rank_choices) {
    const std::vector<LowRank<S>> adapters = trained_adapters<S>(ranks);
    const GatedAdapters<S> gated(adapters);
    const auto k = static_cast<Index>(ranks.size());
    CHECK(gated.max_rank() == *std::max_element(ranks.begin(), ranks.end()));
    CHECK(gated.count() == k);
    const MatrixX<S> weights = noise<S>(k, samples, 3);
    for (Index b = 1; b <= gated.max_rank(); ++b) {
      MatrixX<double> y = MatrixX<double>::Zero(out, samples), dx = MatrixX<double>::Zero(in, samples), d_weights(k, samples);
      for (Index i = 0; i < k; ++i) {
        const LowRank<S>& adapter = adapters[static_cast<std::size_t>(i)];
        const MatrixX<double> delta = in_double(adapter.delta(RankSlice(b).at_most(adapter.max_rank())));
        for (Index n = 0; n < samples; ++n) {
          const VectorX<double> x_n = x.col(n).template cast<double>(), dy_n = dy.col(n).template cast<double>();
          y.col(n) += double(weights(i, n)) * delta.lazyProduct(x_n);
          dx.col(n) += double(weights(i, n)) * delta.transpose().lazyProduct(dy_n);
          d_weights(i, n) = dy_n.dot(delta.lazyProduct(x_n).eval());
        }
      }
      const auto result = run_gated(gated, x, dy, weights, b);
      CHECK(gap(in_double(result.y), y) < rounding<S>);
      CHECK(gap(in_double(result.dx), dx) < rounding<S>);
      CHECK(gap(in_double(result.d_weights), d_weights) < rounding<S>);
    }
  }
}

TEMPLATE_TEST_CASE("a batch of gated adapters at several ranks equals its parts run apart bit for bit", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(in, samples, 1), dy = noise<S>(out, samples, 2);
  for (const std::vector<Index>& ranks : {std::vector<Index>{4, 4, 4}, {5, 2, 3}}) {
    const GatedAdapters<S> gated(trained_adapters<S>(ranks));
    MatrixX<S> weights = noise<S>(3, samples, 3);
    weights.col(3).setConstant(nan<S>);
    const auto mixed = run_gated(gated, x, dy, weights, BatchRanks::per_sample({4, 4, 1, RankSlice::none(), {3, 2}, {3, 2}}));
    CHECK(mixed.y.col(3).isZero(0));
    CHECK(mixed.dx.col(3).isZero(0));
    CHECK(mixed.d_weights.col(3).isZero(0));
    for (const auto& [begin, n, b] : {std::tuple<Index, Index, Index>{0, 2, 4}, {2, 1, 1}, {4, 2, 3}}) {
      const auto part = [&, begin = begin, n = n](const MatrixX<S>& m) { return MatrixX<S>(m.middleCols(begin, n)); };
      const auto apart = run_gated(gated, part(x), part(dy), part(weights), b);
      CHECK(same_bits(part(mixed.y), apart.y));
      CHECK(same_bits(part(mixed.dx), apart.dx));
      CHECK(same_bits(part(mixed.d_weights), apart.d_weights));
    }
  }
}

TEMPLATE_TEST_CASE("components past the rank of gated adapters are not read", "", float, double) {
  using S = TestType;
  const std::vector<LowRank<S>> adapters = trained_adapters<S>({5, 2, 3});
  const MatrixX<S> x = noise<S>(in, samples, 1), dy = noise<S>(out, samples, 2), weights = noise<S>(3, samples, 3);
  for (Index b = 1; b <= 5; ++b) {
    std::vector<LowRank<S>> poisoned = adapters, cut = adapters;
    for (std::size_t i = 0; i < adapters.size(); ++i) {
      fill_components<LowRank<S>>(poisoned[i], nan<S>, b);
      truncate(cut[i], std::min(b, cut[i].components()));
    }
    const auto clean = run_gated(GatedAdapters<S>(adapters), x, dy, weights, b);
    for (const auto& other : {poisoned, cut}) {
      const auto result = run_gated(GatedAdapters<S>(other), x, dy, weights, b);
      CHECK(same_bits(result.y, clean.y));
      CHECK(same_bits(result.dx, clean.dx));
      CHECK(same_bits(result.d_weights, clean.d_weights));
    }
    // Cut, they still take every rank, and are at those above what they were at b.
    const auto above = run_gated(GatedAdapters<S>(cut), x, dy, weights, 5);
    CHECK(same_bits(above.y, clean.y));
    CHECK(same_bits(above.dx, clean.dx));
  }
}

TEMPLATE_TEST_CASE("under weights that are the same for every token gated adapters are a matrix", "", float, double) {
  using S = TestType;
  const GatedAdapters<S> gated(trained_adapters<S>({5, 2, 3}));
  const VectorX<S> weights = noise<S>(3, 1, 3);
  const MatrixX<S> x = noise<S>(in, samples, 1), dy = noise<S>(out, samples, 2);
  for (Index b = 1; b <= 5; ++b) {
    const auto result = run_gated(gated, x, dy, MatrixX<S>(weights.replicate(1, samples)), b);
    CHECK(gap(in_double(gated.delta_at(weights, b)).lazyProduct(in_double(x)), in_double(result.y)) < rounding<S>);
  }
  CHECK(gated.delta_at(weights, RankSlice::none()).isZero(0));
  CHECK_THROWS_SAYING(std::invalid_argument, gated.delta_at(weights, 6), "GatedAdapters::delta_at", "max_rank = 5", "got 6");
  CHECK_THROWS_SAYING(ShapeError, gated.delta_at(VectorX<S>::Ones(2), 1), "GatedAdapters::delta_at: weights", "expected 3", "got 2");
}

TEMPLATE_TEST_CASE("gated adapters add to y and dx and to what the projections before them left in d_weights", "", float, double) {
  using S = TestType;
  const GatedAdapters<S> gated(trained_adapters<S>({4, 4, 4}));
  const MatrixX<S> x = noise<S>(in, samples, 1), dy = noise<S>(out, samples, 2), weights = noise<S>(3, samples, 3);
  const MatrixX<S> y_before = noise<S>(out, samples, 4), dx_before = noise<S>(in, samples, 5), d_before = noise<S>(3, samples, 6);
  const auto clean = run_gated(gated, x, dy, weights, 3);
  Buffer<S> used = buffer_of(weights), d_weights = buffer_of(d_before);
  typename GatedAdapters<S>::Cache cache;
  cache.weights = &used;
  auto gradients = zeros_like(gated);
  typename GatedAdapters<S>::Workspace workspace;
  workspace.d_weights = &d_weights;
  MatrixX<S> y = y_before, dx = dx_before;
  gated.add_forward(x, 3, cache, y);
  used.view().setConstant(nan<S>);  // the buffer is the caller's again
  gated.add_backward(x, dy, cache, gradients, workspace, dx);
  CHECK(gap(in_double(y), in_double<S>(y_before + clean.y)) < rounding<S>);
  CHECK(gap(in_double(dx), in_double<S>(dx_before + clean.dx)) < rounding<S>);
  CHECK(gap(in_double<S>(d_weights.view()), in_double<S>(d_before + clean.d_weights)) < rounding<S>);
}

TEMPLATE_TEST_CASE("a linear layer runs gated adapters along with its base and has nothing to train", "", float, double) {
  using S = TestType;
  using Layer = Linear<S, GatedAdapters<S>>;
  STATIC_REQUIRE(Projection<Layer>);
  const std::vector<LowRank<S>> adapters = trained_adapters<S>({5, 2, 3});
  const MatrixX<S> W = noise<S>(out, in, 7), x = noise<S>(in, samples, 1), dy = noise<S>(out, samples, 2),
                   weights = noise<S>(3, samples, 3);
  const Layer layer(W, GatedAdapters<S>(adapters));
  CHECK(parameter_count(layer) == 0);
  const Buffer<S> used = buffer_of(weights);
  for (const BatchRanks& ranks : {BatchRanks(3), BatchRanks::per_sample({5, 5, RankSlice::none(), 1, 1, 2})}) {
    Buffer<S> d_weights = buffer_of<S>(MatrixX<S>::Zero(3, samples));
    typename Layer::Cache cache;
    cache.adapter.weights = &used;
    auto gradients = zeros_like(layer);
    typename Layer::Workspace workspace;
    workspace.adapter.d_weights = &d_weights;
    MatrixX<S> y(out, samples), dx(in, samples);
    layer.apply(x, ranks, cache, y);
    layer.set_backward(x, dy, cache, gradients, workspace, dx);
    const auto apart = run_gated(GatedAdapters<S>(adapters), x, dy, weights, ranks);
    CHECK(gap(in_double(y), in_double<S>(W * x + apart.y)) < rounding<S>);
    CHECK(gap(in_double(dx), in_double<S>(W.transpose() * dy + apart.dx)) < rounding<S>);
    CHECK(same_bits(MatrixX<S>(d_weights.view()), apart.d_weights));
  }
  // A forward without a cache would have no weights to give, so there is none. At no rank nobody asks for weights.
  STATIC_REQUIRE_FALSE(dylora::Layer<Layer>);
  STATIC_REQUIRE_FALSE(SelfContained<Layer>);
  STATIC_REQUIRE_FALSE(dylora::Layer<Attention<S, Layer>>);
  typename Layer::Cache cache;
  MatrixX<S> y(out, samples);
  CHECK_THROWS_SAYING(std::invalid_argument, layer.apply(x, 1, cache, y), "GatedAdapters::add_forward: weights", "got none");
  layer.apply(x, RankSlice::none(), cache, y);
  CHECK(same_bits(y, FrozenLinear<S>(DenseWeight<S>(W)).forward(x, RankSlice::none())));
}

TEST_CASE("oracle of LoRA-Flow: training leaves the base and the adapters as they were and has no gradient for them") {
  using Layer = Linear<double, GatedAdapters<double>>;
  const std::vector<LowRank<double>> adapters = trained_adapters<double>({4, 4, 4});
  const MatrixX<double> W = noise<double>(out, in, 7), x = noise<double>(in, samples, 1), dy = noise<double>(out, samples, 2);
  Layer layer(W, GatedAdapters<double>(adapters));
  FlowGate<double> gate(in, {.adapters = 3});
  const FlowGate<double> fresh = gate;
  FlowGate<double>::Cache gate_cache;
  Layer::Cache cache;
  auto gate_gradients = zeros_like(gate);
  auto gradients = zeros_like(layer);
  Layer::Workspace workspace;
  Buffer<double> d_weights;
  AdamW optimizer(gate, {.lr = 1e-2});
  AdamW idle(layer, {.lr = 1e-2});
  const MatrixX<double> before = layer.adapter.delta_at(VectorX<double>::Ones(3), 4);
  for (int step = 0; step < 3; ++step) {
    MatrixX<double> y(out, samples), dx(in, samples);
    set_zero(gate, gate_gradients);
    gate.forward(x, 4, gate_cache);
    cache.adapter.weights = &gate_cache.weights;
    layer.apply(x, 4, cache, y);
    d_weights.resize(3, samples).setZero();
    workspace.adapter.d_weights = &d_weights;
    layer.set_backward(x, dy, cache, gradients, workspace, dx);
    gate.add_backward(x, d_weights.view(), gate_cache, gate_gradients, dx);
    optimizer.step(gate, gate_gradients);
    idle.step(layer, gradients);
  }
  CHECK(values<Layer>(gradients).size() == 0);
  CHECK(same_bits(layer.base.W, W));
  CHECK(same_bits(layer.adapter.delta_at(VectorX<double>::Ones(3), 4), before));
  CHECK((gate.weight.array() != fresh.weight.array()).all());
  CHECK((gate.bias.array() != fresh.bias.array()).all());
}

TEST_CASE("gated adapters refuse what does not fit and say what was expected and what came") {
  using Adapters = GatedAdapters<float>;
  CHECK_THROWS_SAYING(std::invalid_argument, Adapters({}), "GatedAdapters", "at least one adapter", "none");
  auto other = trained_adapters<float>({2});
  other.emplace_back(RowMatrix<float>(noise<float>(2, in + 1, 1)), noise<float>(out, 2, 1), LowRankOptions{});
  CHECK_THROWS_SAYING(ShapeError, Adapters(other), "GatedAdapters: in_features of an adapter", "expected 9", "got 10");
  other.back() = LowRank<float>(RowMatrix<float>(noise<float>(2, in, 1)), noise<float>(out - 1, 2, 1), {});
  CHECK_THROWS_SAYING(ShapeError, Adapters(other), "GatedAdapters: out_features of an adapter", "expected 7", "got 6");

  const Adapters gated(trained_adapters<float>({5, 2, 3}));
  const MatrixX<float> x = noise<float>(in, samples, 1), dy = noise<float>(out, samples, 2);
  MatrixX<float> y = MatrixX<float>::Zero(out, samples), dx = MatrixX<float>::Zero(in, samples);
  MatrixX<float> tall = MatrixX<float>::Zero(11, samples), wide_y = MatrixX<float>::Zero(out, 7), wide_x = MatrixX<float>::Zero(in, 7);
  Adapters::Cache cache;
  Adapters::Workspace workspace;
  auto gradients = zeros_like(gated);
  CHECK_THROWS_SAYING(std::invalid_argument, gated.add_forward(x, 2, cache, y), "GatedAdapters::add_forward: weights", "expected 3 × 6",
                      "got none");
  Buffer<float> weights = buffer_of<float>(noise<float>(2, samples, 3)), d_weights = buffer_of<float>(MatrixX<float>::Zero(3, 7));
  cache.weights = &weights;
  CHECK_THROWS_SAYING(ShapeError, gated.add_forward(x, 2, cache, y), "weights: rows (adapters)", "expected 3", "got 2");
  weights.assign(noise<float>(3, 7, 3));
  CHECK_THROWS_SAYING(ShapeError, gated.add_forward(x, 2, cache, y), "weights: samples", "expected 6", "got 7");
  weights.assign(noise<float>(3, samples, 3));
  CHECK_THROWS_SAYING(std::invalid_argument, gated.add_forward(x, 6, cache, y), "GatedAdapters::add_forward", "max_rank = 5", "got 6");
  CHECK_THROWS_SAYING(ShapeError, gated.add_forward(tall, 2, cache, y), "add_forward: rows of x", "expected 9", "got 11");
  CHECK_THROWS_SAYING(ShapeError, gated.add_forward(x, 2, cache, tall), "add_forward: rows of y", "expected 7", "got 11");
  CHECK_THROWS_SAYING(ShapeError, gated.add_forward(x, 2, cache, wide_y), "add_forward: samples in y", "expected 6", "got 7");
  CHECK(y.isZero(0));
  CHECK_THROWS_SAYING(ShapeError, gated.add_backward(x, dy, cache, gradients, workspace, dx), "add_backward", "cache", "expected 0",
                      "got 6");
  gated.add_forward(x, 4, cache, y);
  CHECK_THROWS_SAYING(std::invalid_argument, gated.add_backward(x, dy, cache, gradients, workspace, dx),
                      "GatedAdapters::add_backward: d_weights", "expected 3 × 6", "got none");
  workspace.d_weights = &d_weights;
  CHECK_THROWS_SAYING(ShapeError, gated.add_backward(x, dy, cache, gradients, workspace, dx), "d_weights: samples", "expected 6", "got 7");
  d_weights.resize(3, samples).setZero();
  CHECK_THROWS_SAYING(ShapeError, gated.add_backward(tall, dy, cache, gradients, workspace, dx), "add_backward: rows of x", "expected 9",
                      "got 11");
  CHECK_THROWS_SAYING(ShapeError, gated.add_backward(wide_x, dy, cache, gradients, workspace, dx), "add_backward: samples in x",
                      "expected 6", "got 7");
  CHECK_THROWS_SAYING(ShapeError, gated.add_backward(x, tall, cache, gradients, workspace, dx), "add_backward: rows of dy", "expected 7",
                      "got 11");
  CHECK_THROWS_SAYING(ShapeError, gated.add_backward(x, wide_y, cache, gradients, workspace, dx), "add_backward: samples in dy",
                      "expected 6", "got 7");
  CHECK_THROWS_SAYING(ShapeError, gated.add_backward(x, dy, cache, gradients, workspace, tall), "add_backward: rows of dx", "expected 9",
                      "got 11");
  CHECK_THROWS_SAYING(ShapeError, gated.add_backward(x, dy, cache, gradients, workspace, wide_x), "add_backward: samples in dx",
                      "expected 6", "got 7");
  // A cache of another set of adapters.
  const Adapters of_lower_rank(trained_adapters<float>({3, 3, 3}));
  CHECK_THROWS_SAYING(std::invalid_argument, of_lower_rank.add_backward(x, dy, cache, gradients, workspace, dx), "add_backward: the cache",
                      "max_rank = 3", "got 4");
  auto nothing = trained_adapters<float>({0, 0, 0});
  CHECK_THROWS_SAYING(std::invalid_argument, Adapters(nothing).add_backward(x, dy, cache, gradients, workspace, dx), "rank of the cache",
                      "[0, 0]", "got 4");
  CHECK_THROWS_SAYING(ShapeError, Adapters(trained_adapters<float>({4, 4, 4})).add_backward(x, dy, cache, gradients, workspace, dx),
                      "components of the cached h", "expected 12", "got 9");
  CHECK_THROWS_SAYING(ShapeError, Adapters(trained_adapters<float>({4, 2, 2, 1})).add_backward(x, dy, cache, gradients, workspace, dx),
                      "weights in the cache (adapters)", "expected 4", "got 3");
  CHECK(dx.isZero(0));
  CHECK(d_weights.view().isZero(0));
}

TEST_CASE("the weights of gated adapters are used up by a forward and must be given again before the next") {
  const GatedAdapters<float> gated(trained_adapters<float>({4, 4, 4}));
  const MatrixX<float> x = noise<float>(in, samples, 1);
  MatrixX<float> y = MatrixX<float>::Zero(out, samples);
  const Buffer<float> weights = buffer_of<float>(noise<float>(3, samples, 3));
  GatedAdapters<float>::Cache cache;
  for (const RankSlice rank : {RankSlice(3), RankSlice::none()}) {
    cache.weights = &weights;
    gated.add_forward(x, rank, cache, y);
    CHECK_THROWS_SAYING(std::invalid_argument, gated.add_forward(x, 3, cache, y), "GatedAdapters::add_forward: weights", "got none");
  }
}

TEST_CASE("adapters of largest rank 0 leave y as it was and take any rank") {
  const GatedAdapters<float> none(trained_adapters<float>({0, 0}));
  GatedAdapters<float>::Cache cache;
  GatedAdapters<float>::Workspace workspace;
  auto gradients = zeros_like(none);
  MatrixX<float> y = MatrixX<float>::Zero(out, samples), dx = MatrixX<float>::Zero(in, samples);
  none.add_forward(noise<float>(in, samples, 1), 3, cache, y);
  none.add_backward(noise<float>(in, samples, 1), noise<float>(out, samples, 2), cache, gradients, workspace, dx);
  CHECK(y.isZero(0));
  CHECK(dx.isZero(0));
  CHECK(none.max_rank() == 0);
}

}  // namespace dylora::test
