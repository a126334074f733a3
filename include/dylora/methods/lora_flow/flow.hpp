#ifndef DYLORA_METHODS_LORA_FLOW_FLOW_HPP
#define DYLORA_METHODS_LORA_FLOW_FLOW_HPP

#include <concepts>
#include <string_view>
#include <utility>
#include <vector>

#include "dylora/adapters/checked.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/buffer.hpp"
#include "dylora/methods/lora_flow/gate.hpp"
#include "dylora/methods/lora_flow/gated_adapters.hpp"

namespace dylora {

/// Δ_b(x) = Σ_i ω_i · s_i(b_i) · B_i · A_i · x   with   ω = softmax(W_g x) + b_g   for each column of x
///
/// LoRA-Flow (Wang et al., arXiv 2402.11455) for one layer by itself: k trained adapters, frozen, and a gate over the layer's own input,
/// which is all that learns. Where several layers share a gate, as in the paper, they hold GatedAdapters and the gate stands beside them.
///
///     Flow<float> flow({translation, mathematics}, {.start = only_adapter(1, 2)});     // LowRank<float> each; mathematics alone at the start
///     Linear<float, Flow<float>> layer(W, flow);
///     AdamW optimizer(layer, {.lr = 1e-3});                                            // trains gate.weight and gate.bias
///
/// At rank b every adapter uses its first b components, or all it has. A parameter of the gate belongs to no component, so it learns at
/// every rank. The weights depend on x, so there is no delta: to merge this does not compile. See constant_delta.
template <std::floating_point S>
struct Flow : Checked<Flow<S>, S> {
  using Scalar = S;
  static constexpr std::string_view name = "Flow";

  struct Gradients {
    typename FlowGate<S>::Gradients gate;
  };

  struct Workspace {
    typename FlowGate<S>::Workspace gate;
    typename GatedAdapters<S>::Workspace adapters;
    Buffer<S> d_weights;
  };

  /// Filled by one add_forward, read by any number of add_backward.
  struct Cache {
    typename FlowGate<S>::Cache gate;
    typename GatedAdapters<S>::Cache adapters;
  };

  FlowGate<S> gate;
  GatedAdapters<S> adapters;

  /// Throws ShapeError if they disagree about in_features or the number of adapters.
  Flow(FlowGate<S> gate_, GatedAdapters<S> adapters_) : gate(std::move(gate_)), adapters(std::move(adapters_)) { check_parts(); }

  /// With a fresh gate; options.adapters is taken from the adapters. Throws as FlowGate and GatedAdapters do.
  explicit Flow(const std::vector<LowRank<S>>& adapters_, FlowGateOptions options = {})
      : Flow(fresh_gate(adapters_, std::move(options)), GatedAdapters<S>(adapters_)) {}

  Index in_features() const { return adapters.in_features(); }
  Index out_features() const { return adapters.out_features(); }
  Index max_rank() const { return adapters.max_rank(); }

  /// y += Δ(x). x in × n, keep it until add_backward; y out × n, added to; cache overwritten. Throws ShapeError if x or y do not fit,
  /// std::invalid_argument if a rank is above max_rank. Costs 2·n·(k·in + b·(in + out)) flops for a b that is the components of all
  /// adapters.
  void add_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.gate.samples = 0;  // if this call throws, the cache counts as not filled
    check_parts();
    this->check_forward(x, ranks);
    this->check_y(x, y);
    gate.forward(x, ranks.at_most(max_rank()), cache.gate);
    cache.adapters.weights = &cache.gate.weights;
    adapters.add_forward(x, ranks, cache.adapters, y);
  }

  using LocalWorkspace<Flow, S>::add_backward;

  /// The vector-Jacobian product of add_forward: x is the input of the adapters and of the gate, and dx has both parts.
  /// Throws ShapeError, with nothing added, if something does not fit or the cache was not filled.
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    check_backward(x, dy, cache, gradients, workspace);
    this->check_dx(dy, dx);
    workspace.d_weights.resize(gate.adapters(), dy.cols()).setZero();
    workspace.adapters.d_weights = &workspace.d_weights;
    typename GatedAdapters<S>::Gradients none;
    adapters.add_backward(x, dy, cache.adapters, none, workspace.adapters, dx);
    gate.add_backward(x, workspace.d_weights.view(), cache.gate, gradients.gate, workspace.gate, dx);
  }

  /// Asks the adapters and the gate.
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& /*workspace*/) const {
    this->check_arguments(x, dy, cache.gate.samples, gradients);
    check_parts();
    adapters.check_cached(x, dy, cache.adapters, {});
    gate.check_backward(x, gate.adapters(), dy.cols(), cache.gate, gradients.gate);
  }

  /// Δ_b as a matrix while the gate's weight is 0, so that the weights are the same for every x. Throws std::invalid_argument if it is not
  /// 0.
  MatrixX<S> constant_delta(RankSlice rank) const {
    check_parts();
    return adapters.delta_at(gate.constant_weights(), rank);
  }

  static void members(const auto& f, auto&... t) {
    f(Child<FlowGate<S>>{"gate"}, t.gate...);
    f(Constant{"adapters"}, &Flow::adapters);
  }

 private:
  static FlowGate<S> fresh_gate(const std::vector<LowRank<S>>& adapters, FlowGateOptions options) {
    options.adapters = static_cast<Index>(adapters.size());
    return {adapters.empty() ? 0 : adapters.front().in_features(), options};
  }

  void check_parts() const {
    require_equal(gate.in_features(), adapters.in_features(), "Flow: in_features of the gate, against the adapters");
    require_equal(gate.adapters(), adapters.count(), "Flow: adapters of the gate, against the adapters there are");
  }
};

}  // namespace dylora

#endif
