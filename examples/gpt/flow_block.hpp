#ifndef DYLORA_EXAMPLES_GPT_FLOW_BLOCK_HPP
#define DYLORA_EXAMPLES_GPT_FLOW_BLOCK_HPP

#include <dylora/dylora.hpp>
#include <dylora/methods/lora_flow/gate.hpp>
#include <dylora/methods/lora_flow/gated_adapters.hpp>
#include <utility>

#include "gpt/block.hpp"

namespace gpt {

/// A block whose projections have several frozen adapters each, weighed by one gate that sees the block's input: LoRA-Flow.
template <std::floating_point S, dylora::Projection Linear, class SelfAttention = dylora::Attention<S, Linear>>
struct FlowBlock : Block<S, Linear, SelfAttention> {
  using Plain = Block<S, Linear, SelfAttention>;

  struct Gradients : Plain::Gradients {
    typename dylora::FlowGate<S>::Gradients gate;
  };

  struct Cache : Plain::Cache {
    dylora::Buffer<S> input;
    typename dylora::FlowGate<S>::Cache gate;
  };

  struct Workspace : Plain::Workspace {
    dylora::Buffer<S> d_weights;
    typename dylora::FlowGate<S>::Workspace gate;
  };

  using typename Plain::Buffers;

  dylora::FlowGate<S> gate;

  /// With a fresh gate, which gives every adapter the same weight.
  FlowBlock(Plain block) : Plain(std::move(block)), gate(this->fc.in_features(), {.adapters = this->fc.adapter.count()}) {}

  void forward(dylora::MatrixRef<S> x, const dylora::Sequences& sequences, const dylora::BatchRanks& ranks, Cache& cache,
               Buffers& buffers) const {
    cache.input.assign(x);
    gate.forward(cache.input.view(), ranks, cache.gate);
    for_each_projection(cache, [&](auto& projection) { projection.adapter.weights = &cache.gate.weights; });
    Plain::forward(x, sequences, ranks, cache, buffers);
  }

  void backward(dylora::MatrixRef<S> dx, const Cache& cache, Gradients& gradients, Buffers& buffers, Workspace& workspace) const {
    auto d_weights = workspace.d_weights.resize(gate.adapters(), dx.cols());
    d_weights.setZero();
    for_each_projection(workspace, [&](auto& projection) { projection.adapter.d_weights = &workspace.d_weights; });
    Plain::backward(dx, cache, gradients, buffers, workspace);
    gate.add_backward(cache.input.view(), d_weights, cache.gate, gradients.gate, workspace.gate, dx);
  }

  void extend(dylora::MatrixRef<S> x, dylora::RankSlice rank, dylora::KeyValueCache<S>& past) const = delete;  // its past has no gate

  static void members(const auto& f, auto&... t) {
    Plain::members(f, t...);
    f(dylora::Child<dylora::FlowGate<S>>{"gate"}, t.gate...);
  }
};

template <std::floating_point S, class W, class Attention>
struct BlockOf<S, dylora::Linear<S, dylora::GatedAdapters<S>, W>, Attention> {
  using Type = FlowBlock<S, dylora::Linear<S, dylora::GatedAdapters<S>, W>, Attention>;
};

}  // namespace gpt

#endif
