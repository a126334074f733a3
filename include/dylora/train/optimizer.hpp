#ifndef DYLORA_TRAIN_OPTIMIZER_HPP
#define DYLORA_TRAIN_OPTIMIZER_HPP

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"
#include "dylora/train/parameter_groups.hpp"

/// What every optimiser does around its formula: look at the gradients before it changes anything, clip them, choose the components that a
/// step updates, and describe itself to a checkpoint.
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
    for_each_parameter<T>(
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
    for_each_parameter(
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

/// What a formula is told about the elements that it updates.
struct ElementUpdate {
  double lr;            ///< of their parameter's group
  double weight_decay;  ///< of their parameter's group
  double clip;          ///< to multiply the gradient by, in (0, 1]
  Index count;          ///< how often they have been updated, this time included
};

/// An optimiser over anything Trainable, but for its formula. A Formula has
///
///     using Options = ...;                              // an aggregate; among its members lr, weight_decay, max_norm, update, groups
///     static constexpr std::string_view name;           // for messages and checkpoints: "AdamW"
///     static constexpr std::array moments{"m"sv, ...};  // the names of what it keeps for each parameter, zero at first
///     static void require(const Options&);              // throws std::invalid_argument if an option of its own is out of its range
///     static void same(archive, const Options&);        // calls archive.same(name, option) for each option of its own
///     static void update(const Options&, const ElementUpdate&, Index size, S* parameters, const S* gradients, S*... moments);
///
/// and is called for runs of contiguous elements. Owns the moments, as much memory again as the gradients for each.
template <Trainable T, class Formula>
class Optimizer {
 public:
  using Options = typename Formula::Options;

  /// Throws std::invalid_argument if an option is out of its range.
  explicit Optimizer(const T& trained, Options options = {})
      : options_(options), counters_(trained, options.update), groups_(trained, options.groups, Formula::name) {
    require_learning_rate(options.lr);
    Formula::require(options);
    require_option(options.weight_decay >= 0 && std::isfinite(options.weight_decay), options.weight_decay, said("weight_decay"),
                   "a finite number ≥ 0");
    require_option(options.max_norm >= 0, options.max_norm, said("max_norm"), "a number ≥ 0, where 0 means no clipping");
    for (auto& moment : moments_) moment = zeros_like(trained);
  }

  const Options& options() const { return options_; }
  Index steps() const { return steps_; }

  /// Throws std::invalid_argument, with nothing changed, unless it is a finite number ≥ 0.
  void set_learning_rate(double lr) {
    require_learning_rate(lr);
    options_.lr = lr;
  }

  /// Moves the parameters of `trained`. Throws, with nothing changed, ShapeError if gradients or moments do not have its shapes and
  /// NonFiniteError if a gradient is not finite. Reads and writes the updated components only.
  void step(T& trained, const typename T::Gradients& gradients) {
    require_shapes(trained, said("gradient of"), gradients);
    for (const auto& moment : moments_) require_shapes(trained, said("moments of"), moment);
    const double clip = detail::clip_factor(trained, gradients, options_.max_norm, said("step " + std::to_string(steps_)));
    ++steps_;
    std::size_t index = 0;
    const auto visit = [&](Parameter parameter, auto& p, const auto& g, auto&... moments) {
      const ParameterGroup& group = groups_[index];
      const double lr = options_.lr * group.lr_ratio, weight_decay = group.decays ? options_.weight_decay : 0;
      counters_.for_each_updated_block(index++, parameter.rank_axis, g, [&](Index count, Index begin, Index end) {
        const auto block = [&](auto& matrix) { return detail::component_block(parameter.rank_axis, matrix, begin, end); };
        const ElementUpdate update{lr, weight_decay, clip, count};
        detail::for_each_span([&](Index size, auto*... values) { Formula::update(options_, update, size, values...); }, block(p), block(g),
                              block(moments)...);
      });
    };
    std::apply([&](auto&... moments) { for_each_parameter(visit, trained, gradients, moments...); }, moments_);
  }

  /// What a checkpoint keeps of it (io/checkpoint/checkpoint.hpp). The learning rate is part of the state, since schedules set it; the
  /// other options must be the same.
  template <class Archive>
  void state(Archive& archive) {
    archive.same("method", Formula::name);
    Formula::same(archive, options_);
    archive.same("weight_decay", options_.weight_decay);
    archive.same("max_norm", options_.max_norm);
    archive.same("update", detail::name_of(options_.update));
    archive("lr", options_.lr, require_learning_rate);
    archive("steps", steps_, detail::require_step_count);
    for (std::size_t i = 0; i < moments_.size(); ++i) archive.template parameters<T>(Formula::moments[i], moments_[i]);
    archive("counters", counters_);
    archive("groups", groups_);
  }

 private:
  static std::string said(std::string_view what) { return std::string(Formula::name) + ": " + std::string(what); }

  static void require_learning_rate(double lr) { require_option(lr >= 0 && std::isfinite(lr), lr, said("lr"), "a finite number ≥ 0"); }

  Options options_;
  std::array<typename T::Gradients, Formula::moments.size()> moments_;
  detail::StepCounters counters_;
  detail::GroupOfEach groups_;
  Index steps_ = 0;
};

}  // namespace dylora

#endif
