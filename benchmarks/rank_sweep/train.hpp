#ifndef DYLORA_BENCHMARKS_RANK_SWEEP_TRAIN_HPP
#define DYLORA_BENCHMARKS_RANK_SWEEP_TRAIN_HPP

#include <algorithm>
#include <dylora/dylora.hpp>
#include <dylora/ranks/order.hpp>

#include "rank_sweep/contender.hpp"

namespace rank_sweep {

/// Trains `model` as the contender does, with the optimiser and the schedule that all share: AdamW, clipped, 40 steps of warm-up, half a
/// cosine. `batch(ranks)` computes one batch at the ranks of the step and adds its gradients.
template <class Model, class Batch>
void train(Model& model, const Contender& contender, double lr, Rng& rank_rng, typename Model::Gradients& gradients, Batch&& batch) {
  const auto fresh = [&] { return AdamW(model, {.beta2 = 0.99, .max_norm = 1}); };
  auto optimizer = fresh();
  const Schedule schedule(Decay::cosine, {.peak = lr, .steps = contender.steps, .warmup_steps = std::min<Index>(40, contender.steps)});
  for (Index step = 0; step < contender.steps; ++step) {
    if (step > 0 && step == contender.ordered_before) {
      order_components(model);
      optimizer = fresh();
    }
    optimizer.set_learning_rate(schedule(step));
    const StepRanks ranks = contender.plan(step, rank_rng);
    train_step(model, optimizer, gradients, [&] { return batch(ranks); });
  }
  if (contender.ordered_before == contender.steps) order_components(model);
}

}  // namespace rank_sweep

#endif
