#ifndef DYLORA_METHODS_CHAIN_STAGES_HPP
#define DYLORA_METHODS_CHAIN_STAGES_HPP

#include <concepts>
#include <limits>
#include <stdexcept>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"

/// When a stage of a run ends, and something is done between two steps: stages.ends_after(step).
///
///     const EveryInterval stages(250);                           // PeriodicLoRA: after every 250 steps
///     const StageLengths stages = StageLengths::equal(3, 900);   // Chain of LoRA: three links in 900 steps, two knots between them
///
///     for (Index step = 0; step < steps; ++step) {
///       optimizer.set_learning_rate(schedule(stages.local_step(step)));    // a schedule for each stage
///       train_step(model, optimizer, gradients, …);
///       if (!stages.ends_after(step)) continue;
///       fold(model, model.max_rank(), rng);                                // methods/chain/fold.hpp
///       optimizer = AdamW(model, optimizer.options());                     // no moments, no steps
///     }
///
/// Values, like schedules and rank plans: they count nothing, so a resumed run needs no state of theirs.
namespace dylora {

template <class T>
concept Stages = requires(const T& stages, Index step) {
  { stages.ends_after(step) } -> std::same_as<bool>;
  { stages.index(step) } -> std::same_as<Index>;
  { stages.local_step(step) } -> std::same_as<Index>;
};

/// A stage for every `interval` steps, without end: PeriodicLoRA (Meng et al., arXiv 2402.16141), whose interval is some hundred steps.
/// What an unfinished last stage has trained stays in the adapter.
class EveryInterval {
 public:
  /// Throws std::invalid_argument if interval < 1.
  explicit EveryInterval(Index interval) : interval_(interval) {
    require_in_range(interval, 1, std::numeric_limits<Index>::max(), "EveryInterval: interval");
  }

  /// Whether `step`, counted from 0, is the last of a stage.
  bool ends_after(Index step) const { return local_step(step) == interval_ - 1; }
  /// The stage that the step belongs to.
  Index index(Index step) const { return step / interval_; }
  /// The step counted from the beginning of its stage.
  Index local_step(Index step) const { return step % interval_; }

 private:
  Index interval_;
};

/// Stages of given lengths, with knots between them: Chain of LoRA (Xia et al., arXiv 2401.04151). After the last of its steps nothing
/// ends: what was trained then stays in the adapter, to be saved, merged or folded. Steps past it belong to the last stage.
class StageLengths {
 public:
  /// Throws std::invalid_argument unless there is a stage and each has a step.
  explicit StageLengths(const std::vector<Index>& steps) {
    if (steps.empty()) throw std::invalid_argument("StageLengths: expected the steps of at least one stage, got none");
    Index end = 0;
    for (const Index length : steps) {
      require_in_range(length, 1, std::numeric_limits<Index>::max() - end, "StageLengths: steps of a stage");
      begins_.push_back(end);
      end += length;
    }
  }

  /// As many stages in `steps` steps, of one length but for what does not divide. Throws std::invalid_argument unless 1 ≤ stages ≤ steps.
  static StageLengths equal(Index stages, Index steps) {
    require_in_range(stages, 1, steps, "StageLengths: stages, against the steps");
    std::vector<Index> lengths;
    for (Index i = 0; i < stages; ++i) lengths.push_back(steps / stages + (i < steps % stages ? 1 : 0));
    return StageLengths(lengths);
  }

  /// Whether `step`, counted from 0, is the last of a stage with another after it.
  bool ends_after(Index step) const { return index(step + 1) != index(step); }
  /// The stage that the step belongs to.
  Index index(Index step) const {
    std::size_t stage = begins_.size() - 1;
    while (stage > 0 && begins_[stage] > step) --stage;
    return static_cast<Index>(stage);
  }
  /// The step counted from the beginning of its stage.
  Index local_step(Index step) const { return step - begins_[static_cast<std::size_t>(index(step))]; }

 private:
  std::vector<Index> begins_;
};

}  // namespace dylora

#endif
