#include "dylora/methods/lora_flow/gate.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

constexpr Index in = 6, samples = 5;

template <class S>
FlowGate<S> trained_gate(Index adapters) {
  return {RowMatrix<S>(noise<S>(adapters, in, 1)), noise<S>(adapters, 1, 2)};
}

template <class S>
MatrixX<S> weights(const FlowGate<S>& gate, const MatrixX<S>& h, const BatchRanks& ranks = 1) {
  typename FlowGate<S>::Cache cache;
  gate.forward(h, ranks, cache);
  return cache.weights.view();
}

/// What a backward adds to zero.
template <class S>
struct GateResult {
  MatrixX<S> dh;
  typename FlowGate<S>::Gradients gradients;
};

template <class S>
GateResult<S> backward(const FlowGate<S>& gate, const MatrixX<S>& h, const MatrixX<S>& d_weights, const BatchRanks& ranks = 1) {
  typename FlowGate<S>::Cache cache;
  GateResult<S> result{MatrixX<S>::Zero(h.rows(), h.cols()), zeros_like(gate)};
  gate.forward(h, ranks, cache);
  gate.add_backward(h, d_weights, cache, result.gradients, result.dh);
  return result;
}

}  // namespace

TEMPLATE_TEST_CASE("oracle of LoRA-Flow: a gate of zeros is the plain average of its adapters", "", float, double) {
  using S = TestType;
  for (const Index k : {1, 2, 3, 5}) {
    const FlowGate<S> gate(in, {.adapters = k});
    CHECK(gate.weight.isZero(0));
    CHECK(gate.bias.isZero(0));
    CHECK(same_bits(weights(gate, noise<S>(in, samples, 3)), MatrixX<S>(MatrixX<S>::Constant(k, samples, S(1) / static_cast<S>(k)))));
  }
}

TEMPLATE_TEST_CASE("oracle of LoRA-Flow: the weight of a single adapter is one plus its bias for every token", "", float, double) {
  using S = TestType;
  const FlowGate<S> gate = trained_gate<S>(1);
  const MatrixX<S> h = noise<S>(in, samples, 3);
  CHECK(same_bits(weights(gate, h), MatrixX<S>(MatrixX<S>::Constant(1, samples, S(1) + gate.bias[0]))));
  const auto result = backward(gate, h, noise<S>(1, samples, 4));
  CHECK(result.gradients.weight.isZero(0));
  CHECK(result.dh.isZero(0));
  CHECK_FALSE(result.gradients.bias.isZero(0));
}

TEMPLATE_TEST_CASE("oracle of LoRA-Flow: the same vector added to every row of the weight changes nothing", "", float, double) {
  using S = TestType;
  const FlowGate<S> gate = trained_gate<S>(3);
  FlowGate<S> shifted = gate;
  shifted.weight.rowwise() += noise<S>(1, in, 8).row(0);
  const MatrixX<S> h = noise<S>(in, samples, 3), d_weights = noise<S>(3, samples, 4);
  CHECK(gap(in_double(weights(shifted, h)), in_double(weights(gate, h))) < rounding<S>);
  const auto one = backward(gate, h, d_weights), other = backward(shifted, h, d_weights);
  CHECK(gap(values<FlowGate<S>>(other.gradients).template cast<double>(), values<FlowGate<S>>(one.gradients).template cast<double>()) <
        rounding<S>);
  CHECK(gap(in_double(other.dh), in_double(one.dh)) < rounding<S>);
}

TEMPLATE_TEST_CASE("the weights of a gate are the softmax of each token and the bias", "", float, double) {
  using S = TestType;
  const FlowGate<S> gate = trained_gate<S>(3);
  const MatrixX<S> h = noise<S>(in, samples, 3);
  MatrixX<double> expected(3, samples);
  for (Index n = 0; n < samples; ++n) {
    double sum = 0;
    for (Index i = 0; i < 3; ++i) {
      double logit = 0;
      for (Index j = 0; j < in; ++j) logit += double(gate.weight(i, j)) * double(h(j, n));
      sum += expected(i, n) = std::exp(logit);
    }
    for (Index i = 0; i < 3; ++i) expected(i, n) = expected(i, n) / sum + double(gate.bias[i]);
  }
  CHECK(gap(in_double(weights(gate, h)), expected) < rounding<S>);
}

TEST_CASE("the gradients of a gate are those of differences") {
  FlowGate<double> gate = trained_gate<double>(4);
  MatrixX<double> h = noise<double>(in, samples, 3);
  const MatrixX<double> d_weights = noise<double>(4, samples, 4);
  const auto result = backward(gate, h, d_weights);
  const auto difference = [&](double& entry) {
    const double kept = entry, step = 1e-5;
    entry = kept + step;
    const double above = weights(gate, h).cwiseProduct(d_weights).sum();
    entry = kept - step;
    const double below = weights(gate, h).cwiseProduct(d_weights).sum();
    entry = kept;
    return (above - below) / (2 * step);
  };
  MatrixX<double> d_weight(4, in), d_bias(4, 1), dh(in, samples);
  for (Index i = 0; i < 4; ++i) {
    for (Index j = 0; j < in; ++j) d_weight(i, j) = difference(gate.weight(i, j));
    d_bias(i) = difference(gate.bias[i]);
  }
  for (Index i = 0; i < h.size(); ++i) dh.data()[i] = difference(h.data()[i]);
  CHECK(gap(MatrixX<double>(result.gradients.weight), d_weight) < 1e-8);
  CHECK(gap(MatrixX<double>(result.gradients.bias), d_bias) < 1e-8);
  CHECK(gap(result.dh, dh) < 1e-8);
}

TEMPLATE_TEST_CASE("a gate adds to its gradients and to those of its input", "", float, double) {
  using S = TestType;
  const FlowGate<S> gate = trained_gate<S>(3);
  const MatrixX<S> h = noise<S>(in, samples, 3), d_weights = noise<S>(3, samples, 4), before = noise<S>(in, samples, 5);
  const auto clean = backward(gate, h, d_weights);
  typename FlowGate<S>::Cache cache;
  gate.forward(h, 1, cache);
  auto gradients = zeros_like(gate), noisy = zeros_like(gate);
  randomize<FlowGate<S>>(noisy, 6);
  randomize<FlowGate<S>>(gradients, 6);
  MatrixX<S> dh = before;
  gate.add_backward(h, d_weights, cache, gradients, dh);
  CHECK(gap(in_double(dh), in_double<S>(before + clean.dh)) < rounding<S>);
  const VectorX<S> sum = values<FlowGate<S>>(noisy) + values<FlowGate<S>>(clean.gradients);
  CHECK(gap(values<FlowGate<S>>(gradients).template cast<double>(), sum.template cast<double>()) < rounding<S>);
}

TEMPLATE_TEST_CASE("a gate's batch of several ranks equals its parts run apart bit for bit and skips what has none", "", float, double) {
  using S = TestType;
  const FlowGate<S> gate = trained_gate<S>(3);
  MatrixX<S> h = noise<S>(in, 7, 3), d_weights = noise<S>(3, 7, 4);
  h.col(3).setConstant(nan<S>);
  d_weights.col(3).setConstant(nan<S>);
  const auto mixed = BatchRanks::per_sample({2, 2, 1, RankSlice::none(), 4, 4, 4});
  const MatrixX<S> whole = weights(gate, h, mixed);
  const auto result = backward(gate, h, d_weights, mixed);
  auto gradients = zeros_like(gate);
  for (const auto& [begin, n] : {std::pair<Index, Index>{0, 2}, {2, 1}, {4, 3}}) {
    const MatrixX<S> part = h.middleCols(begin, n);
    typename FlowGate<S>::Cache cache;
    gate.forward(part, 1, cache);
    MatrixX<S> dh = MatrixX<S>::Zero(in, n);
    gate.add_backward(part, d_weights.middleCols(begin, n), cache, gradients, dh);
    CHECK(same_bits(MatrixX<S>(whole.middleCols(begin, n)), MatrixX<S>(cache.weights.view())));
    CHECK(same_bits(MatrixX<S>(result.dh.middleCols(begin, n)), dh));
  }
  CHECK(whole.col(3).isZero(0));
  CHECK(result.dh.col(3).isZero(0));
  CHECK(same_bits(values<FlowGate<S>>(result.gradients), values<FlowGate<S>>(gradients)));
}

TEMPLATE_TEST_CASE("a fresh gate has the weights that it was told to start with", "", float, double) {
  using S = TestType;
  const MatrixX<S> h = noise<S>(in, samples, 3);
  const FlowGate<S> chosen(in, {.adapters = 3, .start = {0.25, -1, 2}});
  for (Index n = 0; n < samples; ++n)
    CHECK(gap(in_double<S>(weights(chosen, h).col(n)), (MatrixX<double>(3, 1) << 0.25, -1, 2).finished()) < rounding<S>);
  CHECK(gap(in_double<S>(chosen.constant_weights()), (MatrixX<double>(3, 1) << 0.25, -1, 2).finished()) < rounding<S>);
  const FlowGate<S> published(in, {.adapters = 2, .start = only_adapter(1, 2)});
  CHECK(published.bias[0] == S(-0.5));
  CHECK(published.bias[1] == S(0.5));
  CHECK(only_adapter(0, 3) == std::vector<double>{1, 0, 0});
}

TEST_CASE("logits as large as numbers get still make weights") {
  FlowGate<float> gate = trained_gate<float>(2);
  gate.weight.row(0).setConstant(1e30f);
  gate.weight.row(1).setConstant(-1e30f);
  const MatrixX<float> h = MatrixX<float>::Ones(in, 1);
  CHECK(weights(gate, h)(0, 0) == 1 + gate.bias[0]);
  CHECK(weights(gate, h)(1, 0) == gate.bias[1]);
}

TEST_CASE("a gate trains a weight and a bias and nothing else") {
  const FlowGate<float> gate(in, {.adapters = 4});
  CHECK(names(gate) == std::vector<std::string>{"weight", "bias"});
  CHECK(parameter_count(gate) == 4 * (in + 1));
  CHECK(parameter_count(FlowGate<float>(4096, {.adapters = 2})) * 32 == 262208);  // of a model with 7 billion parameters, as published
}

TEST_CASE("a gate's weights are constant only before it is trained") {
  FlowGate<float> gate(in, {.adapters = 2});
  CHECK(gate.constant_weights().isConstant(0.5f, 0));
  gate.weight(1, 3) = 1e-30f;
  CHECK_THROWS_SAYING(std::invalid_argument, gate.constant_weights(), "FlowGate::constant_weights", "expected 0", "token");
}

TEST_CASE("a gate refuses what does not fit and says what was expected and what came") {
  CHECK_THROWS_SAYING(std::invalid_argument, FlowGate<float>(in, {.adapters = 0}), "FlowGate: adapters", "got 0");
  CHECK_THROWS_SAYING(ShapeError, FlowGate<float>(in, {.adapters = 3, .start = {0, 1}}), "FlowGate: weights in start", "expected 3",
                      "got 2");
  for (const double start : {nan<double>, std::numeric_limits<double>::infinity()})
    CHECK_THROWS_SAYING(std::invalid_argument, FlowGate<float>(in, {.adapters = 2, .start = {0, start}}), "FlowGate: start", "finite");
  CHECK_THROWS_SAYING(ShapeError, FlowGate<float>(RowMatrix<float>(noise<float>(3, in, 1)), noise<float>(2, 1, 1)),
                      "FlowGate: size of bias", "expected 3", "got 2");
  CHECK_THROWS_SAYING(std::invalid_argument, only_adapter(2, 2), "only_adapter: adapter", "[0, 1]", "got 2");
  CHECK_THROWS_SAYING(std::invalid_argument, only_adapter(-1, 2), "only_adapter: adapter", "[0, 1]", "got -1");

  const FlowGate<float> gate = trained_gate<float>(3);
  const MatrixX<float> h = noise<float>(in, samples, 3), d_weights = noise<float>(3, samples, 4);
  FlowGate<float>::Cache cache;
  auto gradients = zeros_like(gate);
  MatrixX<float> dh = MatrixX<float>::Zero(in, samples), tall = MatrixX<float>::Zero(in + 1, samples), wide = MatrixX<float>::Zero(in, 6);
  CHECK_THROWS_SAYING(ShapeError, gate.add_backward(h, d_weights, cache, gradients, dh), "FlowGate::add_backward", "cache", "forward",
                      "expected 0", "got 5");
  CHECK_THROWS_SAYING(ShapeError, gate.forward(tall, 1, cache), "FlowGate::forward: rows of h", "expected 6", "got 7");
  CHECK_THROWS_SAYING(ShapeError, gate.forward(h, BatchRanks::per_sample({1, 2}), cache), "FlowGate::forward",
                      "columns that the ranks are for", "expected 5", "got 2");
  gate.forward(h, 1, cache);
  CHECK_THROWS_SAYING(ShapeError, gate.add_backward(h, noise<float>(2, samples, 4), cache, gradients, dh), "rows of d_weights",
                      "expected 3", "got 2");
  CHECK_THROWS_SAYING(ShapeError, gate.add_backward(h, noise<float>(3, 6, 4), cache, gradients, dh), "samples in d_weights", "expected 5",
                      "got 6");
  CHECK_THROWS_SAYING(ShapeError, gate.add_backward(tall, d_weights, cache, gradients, dh), "rows of h", "expected 6", "got 7");
  CHECK_THROWS_SAYING(ShapeError, gate.add_backward(wide, d_weights, cache, gradients, dh), "samples in h", "expected 5", "got 6");
  CHECK_THROWS_SAYING(ShapeError, gate.add_backward(h, d_weights, cache, gradients, tall), "rows of dh", "expected 6", "got 7");
  CHECK_THROWS_SAYING(ShapeError, gate.add_backward(h, d_weights, cache, gradients, wide), "samples in dh", "expected 5", "got 6");
  auto other = zeros_like(trained_gate<float>(2));
  CHECK_THROWS_SAYING(ShapeError, gate.add_backward(h, d_weights, cache, other, dh), "FlowGate::add_backward: gradient of weight", "3 × 6",
                      "got 2 × 6");
  CHECK_THROWS_SAYING(ShapeError, trained_gate<float>(2).add_backward(h, noise<float>(2, samples, 4), cache, other, dh),
                      "adapters of the cache", "expected 2", "got 3");
  CHECK(values<FlowGate<float>>(gradients).isZero(0));
  CHECK(dh.isZero(0));
}

}  // namespace dylora::test
