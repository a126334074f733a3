#ifndef DYLORA_TRAIN_TRAIN_STEP_HPP
#define DYLORA_TRAIN_TRAIN_STEP_HPP

#include <cmath>
#include <concepts>
#include <limits>
#include <string>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_sampler.hpp"

namespace dylora {

/// One optimiser step over k micro-batches, each at a rank of its own:
///
///     g = Σᵢ (1/k) ∂Lᵢ(b_i)/∂θ,   b_i drawn from the sampler;   returns (1/k) Σᵢ Lᵢ(b_i)
///
/// The author of DyLoRA advises a fresh rank per micro-batch, the more the better, since one step then averages over several ranks; k = 1 is
/// the paper's algorithm.
///
///     train_step(model, optimizer, gradients, 4, UniformRank{1, 8}, rng, [&](Index i, RankSlice rank, double weight) {
///       model.forward(batch[i], rank, cache, y);
///       const double loss = mse<float>(y, target[i], dy, weight);       // the gradient times 1/k
///       model.backward(dy, cache, gradients, dx);                       // adds
///       return loss;
///     });
///
/// Clears the gradients first. Throws NonFiniteError with the step, the micro-batch and the rank, or the parameter, if a loss or a gradient
/// is not finite; parameters and moments are then as they were.
template <class T, class Optimizer, RankSampler Sampler, class MicroBatch>
  requires std::invocable<MicroBatch&, Index, RankSlice, double>
double train_step(T& trained, Optimizer& optimizer, typename T::Gradients& gradients, Index micro_batches, const Sampler& sampler, Rng& rng,
                  MicroBatch&& micro_batch) {
  require_in_range(micro_batches, 1, std::numeric_limits<Index>::max(), "train_step: micro_batches");
  const double weight = 1 / static_cast<double>(micro_batches);
  double sum = 0;
  set_zero(trained, gradients);
  for (Index i = 0; i < micro_batches; ++i) {
    const RankSlice rank = sampler(rng);
    const auto where = [&] {
      return "step " + std::to_string(optimizer.steps()) + ", micro-batch " + std::to_string(i) + ", rank " + std::to_string(rank.active) +
             ": ";
    };
    double loss = 0;
    try {
      loss = micro_batch(i, rank, weight);
    } catch (const NonFiniteError& error) {
      throw NonFiniteError(where() + error.what());
    }
    if (!std::isfinite(loss)) {
      throw NonFiniteError(where() + "loss: expected a finite number, got " + std::to_string(loss) +
                           "; parameters and moments are as they were");
    }
    sum += loss;
  }
  optimizer.step(trained, gradients);
  return sum * weight;
}

}  // namespace dylora

#endif
