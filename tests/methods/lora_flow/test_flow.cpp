#include "dylora/methods/lora_flow/flow.hpp"
#include "dylora/methods/lora_flow/gate.hpp"
#include "dylora/methods/lora_flow/gated_adapters.hpp"

#include <string>
#include <vector>

#include "methods/lora_flow/flow_under_test.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

using AdaptersUnderTest = InFloatAndDouble<FlowUnderTest>;

}  // namespace dylora::test

#include "laws/adapter_laws.hpp"

namespace dylora::test {

namespace {

constexpr Index in = 9, out = 7, samples = 6;

template <class S>
std::vector<LowRank<S>> trained_adapters(std::size_t count, Index rank = 4) {
  std::vector<LowRank<S>> adapters;
  for (std::size_t i = 0; i < count; ++i) {
    adapters.emplace_back(RowMatrix<S>(noise<S>(rank, in, 10 + i)), noise<S>(out, rank, 20 + i),
                          LowRankOptions{.alpha = 1.0 + static_cast<double>(i)});
  }
  return adapters;
}

/// A trained gate over trained adapters.
template <class S>
Flow<S> trained_flow(std::size_t count) {
  Flow<S> flow(trained_adapters<S>(count));
  randomize<Flow<S>>(flow, 5);
  return flow;
}

template <class S>
MatrixX<S> output(const LowRank<S>& adapter, const MatrixX<S>& x, RankSlice rank) {
  typename LowRank<S>::Cache cache;
  MatrixX<S> y = MatrixX<S>::Zero(out, x.cols());
  adapter.add_forward(x, rank, cache, y);
  return y;
}

}  // namespace

TEMPLATE_TEST_CASE("oracle of LoRA-Flow: with weight and bias zero the output is the plain average of the adapters", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(in, samples, 1), dy = noise<S>(out, samples, 2);
  for (const std::size_t count : {1u, 2u, 3u}) {
    const std::vector<LowRank<S>> adapters = trained_adapters<S>(count);
    for (Index b = 1; b <= 4; ++b) {
      MatrixX<S> average = MatrixX<S>::Zero(out, samples);
      for (const LowRank<S>& adapter : adapters) average += output(adapter, x, b) / static_cast<S>(count);
      CHECK(gap(in_double(run(Flow<S>(adapters), x, dy, b).y), in_double(average)) < rounding<S>);
    }
  }
}

TEMPLATE_TEST_CASE("oracle of LoRA-Flow: one adapter alone is itself times one plus the bias", "", float, double) {
  using S = TestType;
  const Flow<S> flow = trained_flow<S>(1);
  const MatrixX<S> x = noise<S>(in, samples, 1), dy = noise<S>(out, samples, 2);
  for (Index b = 1; b <= 4; ++b) {
    const auto result = run(flow, x, dy, b);
    const MatrixX<S> expected = (1 + flow.gate.bias[0]) * output(trained_adapters<S>(1)[0], x, b);
    CHECK(gap(in_double(result.y), in_double(expected)) < rounding<S>);
    CHECK(result.gradients.gate.weight.isZero(0));
  }
}

TEMPLATE_TEST_CASE("oracle of LoRA-Flow: a gate that starts at one adapter is exactly that adapter", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(in, samples, 1), dy = noise<S>(out, samples, 2);
  for (const std::size_t count : {2u, 4u}) {  // of which 1/k is exact, so that the weights are 0 and 1 exactly
    for (std::size_t chosen = 0; chosen < count; ++chosen) {
      std::vector<LowRank<S>> adapters = trained_adapters<S>(count);
      const FlowGateOptions start{.start = only_adapter(static_cast<Index>(chosen), static_cast<Index>(count))};
      const auto one = run(Flow<S>(adapters, start), x, dy, 3);
      CHECK(gap(in_double(one.y), in_double(output(adapters[chosen], x, 3))) < rounding<S>);
      for (std::size_t other = 0; other < count; ++other) {
        if (other != chosen) randomize<LowRank<S>>(adapters[other], 40 + other);
      }
      const auto same = run(Flow<S>(adapters, start), x, dy, 3);
      CHECK(same_bits(same.y, one.y));
      CHECK(same_bits(same.dx, one.dx));
    }
  }
}

TEMPLATE_TEST_CASE("oracle of LoRA-Flow: a vector added to every row of the weight leaves output and gradients alone", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(in, samples, 1), dy = noise<S>(out, samples, 2);
  const Flow<S> flow = trained_flow<S>(3);
  Flow<S> shifted = flow;
  shifted.gate.weight.rowwise() += noise<S>(1, in, 8).row(0);
  const auto one = run(flow, x, dy, 4), other = run(shifted, x, dy, 4);
  CHECK(gap(in_double(other.y), in_double(one.y)) < rounding<S>);
  CHECK(gap(in_double(other.dx), in_double(one.dx)) < rounding<S>);
  CHECK(gap(values<Flow<S>>(other.gradients).template cast<double>(), values<Flow<S>>(one.gradients).template cast<double>()) <
        rounding<S>);
}

TEMPLATE_TEST_CASE("while the gate is constant the flow is a matrix and not after", "", float, double) {
  using S = TestType;
  STATIC_REQUIRE_FALSE(MergeableAdapter<Flow<S>>);
  Flow<S> flow(trained_adapters<S>(3), {.start = {0.5, -1, 2}});
  const MatrixX<S> x = noise<S>(in, samples, 1), dy = noise<S>(out, samples, 2);
  for (Index b = 1; b <= 4; ++b)
    CHECK(gap(in_double(flow.constant_delta(b)).lazyProduct(in_double(x)), in_double(run(flow, x, dy, b).y)) < rounding<S>);
  CHECK(flow.constant_delta(RankSlice::none()).isZero(0));
  flow.gate.weight(0, 0) = 1;
  CHECK_THROWS_SAYING(std::invalid_argument, flow.constant_delta(1), "weight", "expected 0", "token");
}

TEST_CASE("a flow trains its gate and no component of its adapters") {
  const Flow<float> flow = trained_flow<float>(3);
  CHECK(names(flow) == std::vector<std::string>{"gate.weight", "gate.bias"});
  CHECK(parameter_count(flow) == 3 * (in + 1));
  CHECK(adapter_ranks(flow).empty());
}

TEST_CASE("a copy of a flow's cache and workspace stands by itself") {
  const Flow<double> flow = trained_flow<double>(3);
  const MatrixX<double> x = noise<double>(in, samples, 1), dy = noise<double>(out, samples, 2);
  const auto clean = run(flow, x, dy, 3);
  Flow<double>::Cache copy;
  Flow<double>::Workspace workspace;
  auto gradients = zeros_like(flow);
  {
    Flow<double>::Cache cache;
    Flow<double>::Workspace other;
    MatrixX<double> y = MatrixX<double>::Zero(out, samples), dx = MatrixX<double>::Zero(in, samples);
    flow.add_forward(x, 3, cache, y);
    flow.add_backward(x, dy, cache, gradients, other, dx);
    copy = cache;
    workspace = other;
    flow.add_forward(all_nan<double>(in, samples), 3, cache, y);
  }
  set_zero(flow, gradients);
  MatrixX<double> dx = MatrixX<double>::Zero(in, samples);
  flow.add_backward(x, dy, copy, gradients, workspace, dx);
  CHECK(same_bits(dx, clean.dx));
  CHECK(same_bits(values<Flow<double>>(gradients), values<Flow<double>>(clean.gradients)));
}

TEST_CASE("a flow refuses a gate that is not its adapters'") {
  using F = Flow<float>;
  const GatedAdapters<float> adapters(trained_adapters<float>(3));
  CHECK_THROWS_SAYING(ShapeError, F(FlowGate<float>(in + 1, {.adapters = 3}), adapters), "Flow: in_features of the gate", "expected 9",
                      "got 10");
  CHECK_THROWS_SAYING(ShapeError, F(FlowGate<float>(in, {.adapters = 2}), adapters), "Flow: adapters of the gate", "expected 3", "got 2");
  CHECK_THROWS_SAYING(ShapeError, F(trained_adapters<float>(3), {.start = {0, 1}}), "start", "expected 3", "got 2");
  CHECK_THROWS_AS(F(std::vector<LowRank<float>>()), std::invalid_argument);
}

}  // namespace dylora::test
