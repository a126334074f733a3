#ifndef DYLORA_EXAMPLES_TEXT_PROGRESS_HPP
#define DYLORA_EXAMPLES_TEXT_PROGRESS_HPP

#include <chrono>
#include <cstdio>
#include <dylora/dylora.hpp>
#include <string>

#include "text/platform.hpp"

namespace text {

/// What a training run says while it works: one line that is redrawn on a terminal, about ten plain lines elsewhere.
class Progress {
 public:
  /// Without a name it only counts. `first` is the step that a resumed run begins with.
  Progress(std::string name, dylora::Index steps, dylora::Index tokens_per_step, dylora::Index first = 0)
      : name_(std::move(name)), steps_(steps), tokens_per_step_(tokens_per_step), first_(first), terminal_(output_is_terminal()) {}

  /// After step `step`; `rank` 0 says nothing about ranks.
  void update(dylora::Index step, double loss, dylora::Index rank) {
    if (name_.empty()) return;
    smoothed_ = step == first_ ? loss : 0.95 * smoothed_ + 0.05 * loss;
    const double now = seconds();
    const bool last = step + 1 == steps_;
    const bool due = terminal_ ? now - shown_ > 0.1 : (step + 1) * 10 / steps_ != step * 10 / steps_;
    if (!due && !last) return;
    shown_ = now;
    const auto done = static_cast<double>(step + 1 - first_);
    const double left = now / done * static_cast<double>(steps_ - step - 1);
    std::printf("%s%s  step %td/%td  loss %.3f", terminal_ ? "\r\033[K" : "", name_.c_str(), step + 1, steps_, smoothed_);
    if (rank > 0) std::printf("  rank %td", rank);
    std::printf("  %.0f tokens/s  %.0f s left%s", tokens_per_second(step + 1), left, terminal_ && !last ? "" : "\n");
    std::fflush(stdout);
  }

  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }
  double tokens_per_second(dylora::Index steps) const {
    return static_cast<double>(steps - first_) * static_cast<double>(tokens_per_step_) / std::max(seconds(), 1e-9);
  }

 private:
  std::string name_;
  dylora::Index steps_, tokens_per_step_, first_;
  bool terminal_;
  double smoothed_ = 0, shown_ = -1;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace text

#endif
