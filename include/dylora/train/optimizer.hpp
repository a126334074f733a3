#ifndef DYLORA_TRAIN_OPTIMIZER_HPP
#define DYLORA_TRAIN_OPTIMIZER_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
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

inline std::string_view name_of(Update update) { return update == Update::dense ? "dense" : "active_only"; }

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

/// Throws std::invalid_argument for what no run has counted: a double tells all steps up to 2⁵³ apart.
inline void require_step_count(Index count) { require_in_range(count, 0, Index{1} << 53, "number of steps"); }

/// How often each component of each parameter has been updated, in traversal order; one counter for a parameter that is updated whole.
class StepCounters {
 public:
  template <class T>
  StepCounters(const T& trained, Update update) : update_(update) {
    T::zip_parameters(
        [&](Parameter parameter, const auto& p) {
          const Index count = is_whole(parameter.rank_axis) ? 1 : component_count(parameter.rank_axis, p);
          counters_.push_back({std::string(parameter.name), std::vector<Index>(static_cast<std::size_t>(count))});
        },
        trained);
  }

  /// Calls f(counter, begin, end) for every block of components that the step updates, the counter already advanced.
  template <class G, class F>
  void for_each_updated_block(std::size_t parameter, RankAxis axis, const G& gradient, F&& f) {
    std::vector<Index>& counts = counters_[parameter].counts;
    if (is_whole(axis)) return f(++counts[0], Index{0}, axis == RankAxis::rows ? gradient.rows() : gradient.cols());
    for_each_trained_range(axis, gradient, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) f(++counts[static_cast<std::size_t>(i)], i, i + 1);
    });
  }

  /// What a checkpoint keeps of it (io/checkpoint/checkpoint.hpp).
  template <class Archive>
  void state(Archive& archive) {
    for (Counter& counter : counters_) {
      archive(counter.parameter, counter.counts, [&](const std::vector<Index>& counts) {
        require_equal(static_cast<Index>(counts.size()), static_cast<Index>(counter.counts.size()), "counters");
        for (const Index count : counts) require_step_count(count);
      });
    }
  }

 private:
  struct Counter {
    std::string parameter;
    std::vector<Index> counts;
  };

  bool is_whole(RankAxis axis) const { return update_ == Update::dense || axis == RankAxis::none; }

  Update update_;
  std::vector<Counter> counters_;
};

}  // namespace detail
}  // namespace dylora

#endif
