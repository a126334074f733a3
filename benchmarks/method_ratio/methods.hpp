#ifndef DYLORA_BENCHMARKS_METHOD_RATIO_METHODS_HPP
#define DYLORA_BENCHMARKS_METHOD_RATIO_METHODS_HPP

#include <array>
#include <cstddef>
#include <dylora/dylora.hpp>
#include <dylora/methods/chain/chain.hpp>
#include <dylora/methods/dora/dora_linear.hpp>
#include <dylora/methods/dora/options.hpp>
#include <dylora/methods/lora_flow/flow.hpp>
#include <dylora/methods/multilora.hpp>
#include <dylora/methods/nola/nola.hpp>
#include <dylora/methods/pissa/offset_low_rank.hpp>
#include <dylora/methods/prilora/proportional.hpp>
#include <dylora/methods/reslora/shortcut.hpp>
#include <dylora/methods/reslora/stack.hpp>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "measure/report.hpp"

namespace method_ratio {

using namespace dylora;

constexpr Index rank = 8;
constexpr std::size_t links = 4;  // of a chain

struct Shape {
  Index in, out, tokens;

  std::string name() const { return std::to_string(in) + "->" + std::to_string(out) + "x" + std::to_string(tokens); }
};

/// A frozen weight and what goes through it, shared by all contenders, so that all work in the same memory.
struct Samples {
  MatrixX<float> W, x, dy, y, dx;

  Samples(const Shape& shape, Rng rng)
      : W(random_uniform<float>(shape.out, shape.in, 0.5, rng)),
        x(random_uniform<float>(shape.in, shape.tokens, 0.5, rng)),
        dy(random_uniform<float>(shape.out, shape.tokens, 0.5, rng)),
        y(MatrixX<float>::Zero(shape.out, shape.tokens)),
        dx(MatrixX<float>::Zero(shape.in, shape.tokens)) {}
};

using Weight = WeightView<float>;
template <class A = LowRank<float>>
using Layer = Linear<float, A, Weight>;

/// Draws all that is trained, also what starts at 0.
template <class T>
T drawn(T fresh, Rng& rng) {
  for_each_parameter([&](const Parameter&, auto& values) { values = random_uniform<float>(values.rows(), values.cols(), 0.5, rng); },
                     fresh);
  return fresh;
}

/// Linears one after the other, as the links of a ResidualStack are, but each by itself.
struct Linears {
  struct Gradients {
    std::array<Layer<>::Gradients, links> layers;
  };
  struct Workspace {
    Layer<>::Workspace layer;
    Buffer<float> d, next_d;
  };
  struct Cache {
    std::array<Buffer<float>, links> x;
    std::array<Layer<>::Cache, links> layers;
  };

  std::array<Layer<>, links> layers;

  void forward(ConstMatrixRef<float> x, Index b, Cache& cache, MatrixRef<float> y) const {
    cache.x[0].assign(x);
    for (std::size_t n = 0; n < links; ++n) {
      const auto next = [&]() -> MatrixRef<float> { return cache.x[n + 1].resize(layers[n].out_features(), x.cols()); };
      layers[n].apply(cache.x[n].view(), b, cache.layers[n], n + 1 == links ? y : next());
    }
  }

  void backward(ConstMatrixRef<float> dy, const Cache& cache, Gradients& gradients, Workspace& workspace, MatrixRef<float> dx) const {
    for (std::size_t n = links; n-- > 0;) {
      const auto d = n + 1 == links ? dy : ConstMatrixRef<float>(workspace.d.view());
      auto next_d = workspace.next_d.resize(layers[n].in_features(), n == 0 ? 0 : dy.cols());
      layers[n].set_backward(cache.x[n].view(), d, cache.layers[n], gradients.layers[n], workspace.layer,
                             n == 0 ? dx : MatrixRef<float>(next_d));
      std::swap(workspace.d, workspace.next_d);
    }
  }

  static void members(const auto& f, auto&... t) {
    for (std::size_t n = 0; n < links; ++n) f(Child<Layer<>>{"layers." + std::to_string(n)}, t.layers[n]...);
  }
};

/// Forward and backward into the same memory at every call, as in training. `samples` must outlive it.
template <class L>
std::function<void()> step_of(L layer, Index b, Samples& samples) {
  struct State {
    L layer;
    decltype(zeros_like(std::declval<const L&>())) gradients = zeros_like(layer);
    typename L::Cache cache = {};
    typename L::Workspace workspace = {};
  };
  return [state = std::make_shared<State>(State{std::move(layer)}), b, &samples] {
    state->layer.forward(samples.x, b, state->cache, samples.y);
    state->layer.backward(samples.dy, state->cache, state->gradients, state->workspace, samples.dx);
  };
}

/// Something that takes steps, and whose steps it is measured against.
struct Method {
  std::string name, over;  ///< over: the name of another method; empty for those that all others are measured against
  std::function<void()> step;
  std::optional<measure::Goal> goal = std::nullopt;
  Index total_rank = rank;
};

inline Layer<Nola<float>> nola(const Samples& samples, Index bases, Rng& rng) {
  return drawn(Layer<Nola<float>>(Weight(samples.W), {.max_rank = rank, .bases = bases}, rng), rng);
}

/// All methods at a rank of 8, and the Linears that they are measured against. `samples` must outlive them.
inline std::vector<Method> methods(Samples& samples) {
  Rng rng(1);
  const Weight W(samples.W);
  const auto step = [&](auto fresh, Index b = rank) { return step_of(drawn(std::move(fresh), rng), b, samples); };
  const auto low_rank = [&](Index b = rank) { return drawn(LowRank<float>(W.cols(), W.rows(), {.max_rank = b}, rng), rng); };
  const auto dora = [&](NormGradient norm_gradient) {
    return DoraLinear<float, LowRank<float>, Weight>(W, {.adapter = {.max_rank = rank}, .norm_gradient = norm_gradient}, rng);
  };
  const MultiLoraOptions three{.max_rank = rank, .modules = 3};

  std::vector<Method> all;
  all.push_back({"Linear", "", step(Layer<>(W, low_rank()))});
  all.push_back({"Linear of rank 24", "", step(Layer<>(W, low_rank(3 * rank)), 3 * rank)});
  all.push_back({"DoRA", "Linear", step(dora(NormGradient::detached)), measure::at_most(1.15)});
  all.push_back({"DoRA, exact", "Linear", step(dora(NormGradient::exact))});
  const auto multi = step(Layer<MultiLora<float>>(W, three, rng));
  all.push_back({"MultiLoRA of 3", "Linear of rank 24", multi, measure::at_most(1.1), 3 * rank});
  all.push_back({"MultiLoRA of 3", "Linear", multi});
  for (const Index bases : {64, 512})
    all.push_back({"NOLA of " + std::to_string(bases) + " bases", "Linear", step(nola(samples, bases, rng))});
  const LowRank<float> start = low_rank();
  all.push_back({"OffsetLowRank", "Linear", step(Layer<OffsetLowRank<float>>(W, OffsetLowRank<float>(start.A, start.B, start.options)))});
  all.push_back({"Chain of 2", "Linear", step(Layer<Chain<LowRank<float>>>(W, {{low_rank(), low_rank()}, {}}))});
  all.push_back({"Proportional", "Linear", step(Layer<Proportional<LowRank<float>>>(W, {low_rank(), 2 * rank}), 2 * rank)});
  all.push_back({"Flow of 2", "Linear", step(Layer<Flow<float>>(W, Flow<float>({low_rank(), low_rank()})))});
  if (W.rows() != W.cols()) return all;  // links of a chain give what the next one takes

  using Stack = ResidualStack<float, Shortcut::block, Weight>;
  const auto layer = [&] { return Layer<>(W, low_rank()); };
  all.push_back({"4 Linears", "", step(Linears{{layer(), layer(), layer(), layer()}})});
  all.push_back({"ResLoRA of 4 links", "4 Linears", step(Stack({W, W, W, W}, {.adapter = {.max_rank = rank}}, rng))});
  return all;
}

}  // namespace method_ratio

#endif
