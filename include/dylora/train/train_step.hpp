#ifndef DYLORA_TRAIN_TRAIN_STEP_HPP
#define DYLORA_TRAIN_TRAIN_STEP_HPP

#include <cmath>
#include <concepts>
#include <cstddef>
#include <string>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/ranks/plan.hpp"

namespace dylora {

namespace detail {

/// The loss that f gives, or a NonFiniteError that begins with where().
template <class Where, class F>
double finite_loss(const Where& where, F&& f) {
  double loss = 0;
  try {
    loss = f();
  } catch (const NonFiniteError& error) {
    throw NonFiniteError(where() + ": " + error.what());
  }
  if (!std::isfinite(loss)) {
    throw NonFiniteError(where() + ": loss: expected a finite number, got " + std::to_string(loss) +
                         "; parameters and moments are as they were");
  }
  return loss;
}

}  // namespace detail

/// One optimiser step: clears the gradients, lets batch() add to them, updates the parameters, and returns the loss that batch() gave.
///
///     train_step(model, optimizer, gradients, [&] {
///       model.forward(x, ranks, cache, y);
///       const double loss = mse<float>(y, target, dy);
///       model.backward(dy, cache, gradients, dx);                       // adds
///       return loss;
///     });
///
/// Throws NonFiniteError with the step, or the parameter, if the loss or a gradient is not finite; parameters and moments are then as they
/// were.
template <class T, class Optimizer, class Batch>
  requires std::invocable<Batch&>
double train_step(T& trained, Optimizer& optimizer, typename T::Gradients& gradients, Batch&& batch) {
  set_zero(trained, gradients);
  const double loss = detail::finite_loss([&] { return "step " + std::to_string(optimizer.steps()); }, batch);
  optimizer.step(trained, gradients);
  return loss;
}

/// The same over micro-batches, one for each part of a step's ranks:
///
///     g = Σᵢ wᵢ ∂Lᵢ(bᵢ)/∂θ,   returns Σᵢ wᵢ Lᵢ(bᵢ) / Σᵢ wᵢ,   with rank bᵢ and weight wᵢ from the plan; those of weight 0 are skipped
///
///     train_step(model, optimizer, gradients, Sandwich{1, 8}(step, rng), [&](Index i, RankSlice rank, double weight) {
///       model.forward(x[i], rank, cache, y);
///       const double loss = mse<float>(y, target[i], dy, weight);       // the gradient times the weight
///       model.backward(dy, cache, gradients, dx);
///       return loss;
///     });
///
/// Throws std::invalid_argument, before anything is done, unless there is a part and each weight is a finite number ≥ 0, one above 0;
/// NonFiniteError also with the micro-batch and its rank.
template <class T, class Optimizer, class MicroBatch>
  requires std::invocable<MicroBatch&, Index, RankSlice, double>
double train_step(T& trained, Optimizer& optimizer, typename T::Gradients& gradients, const StepRanks& ranks, MicroBatch&& micro_batch) {
  double weights = 0;
  for (const RankShare& part : ranks) {
    require_option(part.weight >= 0 && std::isfinite(part.weight), part.weight, "train_step: weight of a micro-batch",
                   "a finite number ≥ 0");
    weights += part.weight;
  }
  require_option(weights > 0, weights, "train_step: sum of the micro-batches' weights", "a number > 0");
  set_zero(trained, gradients);
  double sum = 0;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    const RankShare& part = ranks[i];
    if (part.weight == 0) continue;  // nothing to learn from it, and its components must not count as trained
    const auto where = [&] {
      return "step " + std::to_string(optimizer.steps()) + ", micro-batch " + std::to_string(i) + ", rank " +
             std::to_string(part.rank.active);
    };
    sum += part.weight * detail::finite_loss(where, [&] { return micro_batch(static_cast<Index>(i), part.rank, part.weight); });
  }
  optimizer.step(trained, gradients);
  return sum / weights;
}

}  // namespace dylora

#endif
