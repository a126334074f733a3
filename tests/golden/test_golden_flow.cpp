#include <string>
#include <utility>
#include <vector>

#include "dylora/methods/lora_flow/gate.hpp"
#include "dylora/methods/lora_flow/gated_adapters.hpp"
#include "golden/golden.hpp"

using namespace dylora;

namespace {

template <class S>
Linear<S, GatedAdapters<S>> projection(const golden::File& file, const std::string& name) {
  const ScaleRule scales[] = {alpha_over_rank, alpha_over_sqrt_rank, alpha_over_rank};
  std::vector<LowRank<S>> adapters;
  for (int i = 0; i < 3; ++i) {
    adapters.push_back({file.matrix<S>(name + "/lora_A_" + std::to_string(i)),
                        file.matrix<S>(name + "/lora_B_" + std::to_string(i)),
                        {.alpha = file["alpha"](i), .scale = scales[i]}});
  }
  return {{file.matrix<S>(name + "/weight"), file.matrix<S>(name + "/bias")}, GatedAdapters<S>(adapters)};
}

}  // namespace

TEMPLATE_TEST_CASE("two projections under one LoRA-Flow gate compute what PyTorch does at every rank and at several", "[golden]", float,
                   double) {
  using S = TestType;
  const golden::File file("flow.txt");
  const auto q = projection<S>(file, "q"), v = projection<S>(file, "v");
  const FlowGate<S> gate(file.matrix<S>("gate/weight"), file.matrix<S>("gate/bias"));
  const MatrixX<S> h = file.matrix<S>("h"), x = file.matrix<S>("x"), dy_q = file.matrix<S>("dy_q"), dy_v = file.matrix<S>("dy_v");
  const auto none = RankSlice::none();
  const std::vector<std::pair<std::string, BatchRanks>> cases{
      {"1", 1}, {"2", 2}, {"3", 3}, {"4", 4}, {"mixed", BatchRanks::per_sample({4, 4, 1, none, none, 3, 3})}};

  typename FlowGate<S>::Cache gate_cache;
  typename Linear<S, GatedAdapters<S>>::Cache q_cache, v_cache;
  auto gate_gradients = zeros_like(gate);
  auto q_gradients = zeros_like(q), v_gradients = zeros_like(v);
  typename Linear<S, GatedAdapters<S>>::Workspace q_workspace, v_workspace;
  Buffer<S> d_weights;
  for (const auto& [name, ranks] : cases) {
    gate.forward(h, ranks, gate_cache);
    q_cache.adapter.weights = v_cache.adapter.weights = &gate_cache.weights;
    MatrixX<S> y_q(q.out_features(), x.cols()), y_v(v.out_features(), x.cols());
    q.apply(x, ranks, q_cache, y_q);
    v.apply(x, ranks, v_cache, y_v);
    golden::check(y_q, file, name + "/y_q");
    golden::check(y_v, file, name + "/y_v");

    set_zero(gate, gate_gradients);
    d_weights.resize(gate.adapters(), x.cols()).setZero();
    q_workspace.adapter.d_weights = v_workspace.adapter.d_weights = &d_weights;
    MatrixX<S> dx(x.rows(), x.cols()), dh = MatrixX<S>::Zero(h.rows(), h.cols());
    q.set_backward(x, dy_q, q_cache, q_gradients, q_workspace, dx);
    v.add_backward(x, dy_v, v_cache, v_gradients, v_workspace, dx);
    gate.add_backward(h, d_weights.view(), gate_cache, gate_gradients, dh);
    golden::check(dx, file, name + "/dx");
    golden::check(dh, file, name + "/dh");
    golden::check_gradients(gate, gate_gradients, file, name + "/gate/");
  }
}
