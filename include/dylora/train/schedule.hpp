#ifndef DYLORA_TRAIN_SCHEDULE_HPP
#define DYLORA_TRAIN_SCHEDULE_HPP

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

enum class Decay { constant, linear, cosine };

struct ScheduleOptions {
  double peak = 1e-3;         ///< the learning rate after warm-up
  Index steps = 1000;         ///< steps of the whole run
  Index warmup_steps = 0;     ///< rising linearly: the first step runs at peak / warmup_steps
  double final_fraction = 0;  ///< what is left of the peak after the last step (linear and cosine)
};

/// The learning rate of each step: linear warm-up to the peak, then constant, or down to peak · final_fraction along a line or half a
/// cosine (Loshchilov and Hutter, arXiv 1608.03983).
///
///     const Schedule schedule(Decay::cosine, {.peak = 3e-3, .steps = 800, .warmup_steps = 40});
///     optimizer.set_learning_rate(schedule(step));
class Schedule {
 public:
  /// Throws std::invalid_argument if an option is out of its range.
  Schedule(Decay decay, ScheduleOptions options) : decay_(decay), options_(options) {
    require_option(options.peak >= 0 && std::isfinite(options.peak), options.peak, "Schedule: peak", "a finite number ≥ 0");
    require_in_range(options.steps, 1, std::numeric_limits<Index>::max(), "Schedule: steps");
    require_in_range(options.warmup_steps, 0, options.steps, "Schedule: warmup_steps");
    require_option(options.final_fraction >= 0 && options.final_fraction <= 1, options.final_fraction, "Schedule: final_fraction",
                   "a number in [0, 1]");
  }

  /// For step 0, 1, …; steps past the end stay at the final rate.
  double operator()(Index step) const {
    if (step < options_.warmup_steps) return options_.peak * static_cast<double>(step + 1) / static_cast<double>(options_.warmup_steps);
    const auto decaying = static_cast<double>(options_.steps - options_.warmup_steps);
    const double progress = step < options_.steps ? static_cast<double>(step - options_.warmup_steps) / decaying : 1;
    return options_.peak * (options_.final_fraction + (1 - options_.final_fraction) * remaining(progress));
  }

 private:
  double remaining(double progress) const {
    switch (decay_) {
      case Decay::linear: return 1 - progress;
      case Decay::cosine: return (1 + std::cos(std::numbers::pi * progress)) / 2;
      case Decay::constant: break;
    }
    return 1;
  }

  Decay decay_;
  ScheduleOptions options_;
};

}  // namespace dylora

#endif
