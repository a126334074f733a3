#ifndef DYLORA_TRAIN_UPDATE_HPP
#define DYLORA_TRAIN_UPDATE_HPP

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"

/// What every optimiser does around its formula: look at the gradients before it changes anything, clip them, and choose the components
/// that a step updates.
namespace dylora {

/// What a step does to rank components that took no part since the gradients were cleared.
enum class Update {
  active_only,  ///< nothing: no moments, no decay, and their step counters stand still
  dense,        ///< what a zero gradient does, as in the reference implementation: momentum and decay still move them
};

namespace detail {

/// The factor that brings the global norm down to max_norm, as torch.nn.utils.clip_grad_norm_ computes it and never above 1; 1 if max_norm
/// is 0. Throws NonFiniteError naming the parameter, nearest to the output, whose gradient holds a NaN or an infinity.
template <class T>
double clip_factor(const T& trained, const typename T::Gradients& gradients, double max_norm, std::string_view who) {
  const double length = norm(trained, gradients);
  if (!std::isfinite(length)) {
    std::string name = "(their norm)";
    T::zip_parameters(
        [&](Parameter parameter, const auto& g) {
          if (!g.allFinite()) name = parameter.name;
        },
        gradients);
    throw NonFiniteError(std::string(who) + ": gradient of " + name +
                         ": expected finite numbers, got a NaN or an infinity; parameters and moments are as they were");
  }
  return max_norm > 0 ? std::min(1.0, max_norm / (length + 1e-6)) : 1;
}

/// How often each component of each parameter has been updated, in traversal order; one counter for a parameter that is updated whole.
class StepCounters {
 public:
  /// Calls f(counter, begin, end) for every block of components that the step updates, the counter already advanced.
  template <class G, class F>
  void for_each_updated_block(std::size_t parameter, RankAxis axis, const G& gradient, Update update, F&& f) {
    if (parameter >= counters_.size()) counters_.resize(parameter + 1);
    auto& counters = counters_[parameter];
    const Index extent = axis == RankAxis::rows ? gradient.rows() : gradient.cols();
    if (update == Update::dense || axis == RankAxis::none) {
      counters.resize(1);
      return f(++counters[0], Index{0}, extent);
    }
    counters.resize(static_cast<std::size_t>(extent));
    for_each_trained_range(axis, gradient, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) f(++counters[static_cast<std::size_t>(i)], i, i + 1);
    });
  }

 private:
  std::vector<std::vector<Index>> counters_;
};

}  // namespace detail
}  // namespace dylora

#endif
