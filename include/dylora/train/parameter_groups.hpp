#ifndef DYLORA_TRAIN_PARAMETER_GROUPS_HPP
#define DYLORA_TRAIN_PARAMETER_GROUPS_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"

/// Learning rates and weight decay that differ between parameters: a function of what they are, in the options of an optimiser.
///
///     AdamW optimizer(model, {.lr = 1e-4, .weight_decay = 0.1, .groups = without_decay({"lora_magnitude_vector"})});
///     AdamW optimizer(model, {.groups = [](const Parameter& parameter) {
///       return parameter.name.starts_with("h.0.") ? ParameterGroup{.lr_ratio = 0.1} : ParameterGroup{};
///     }});
namespace dylora {

/// What an optimiser does with one parameter.
struct ParameterGroup {
  double lr_ratio = 1;  ///< its learning rate, relative to the optimiser's; schedules move all of them together
  bool decays = true;   ///< whether the optimiser's weight decay applies to it

  bool operator==(const ParameterGroup&) const = default;
};

/// The group of each parameter, with its whole name, "h.0.attn.q_proj.lora_B". Asked once for each, when an optimiser is made. None means
/// one group for all.
using ParameterGroups = std::function<ParameterGroup(const Parameter& parameter)>;

namespace detail {

inline std::string_view last_segment(std::string_view name) { return name.substr(name.rfind('.') + 1); }

/// The groups of the parameters of an optimiser, in traversal order.
class GroupOfEach {
 public:
  /// Throws std::invalid_argument, naming the parameter, if a ratio is not a finite number ≥ 0.
  template <class T>
  GroupOfEach(const T& trained, const ParameterGroups& groups, std::string_view who) {
    for_each_parameter(
        [&](Parameter parameter, const auto&) {
          const ParameterGroup group = groups ? groups(parameter) : ParameterGroup{};
          require_option(group.lr_ratio >= 0 && std::isfinite(group.lr_ratio), group.lr_ratio,
                         std::string(who) + ": lr_ratio of " + std::string(parameter.name), "a finite number ≥ 0");
          groups_.emplace_back(parameter.name, group);
        },
        trained);
  }

  const ParameterGroup& operator[](std::size_t parameter) const { return groups_[parameter].second; }

  /// For a checkpoint (io/checkpoint/checkpoint.hpp): a run goes on with the groups that it began with. Only what differs from one group
  /// for all is written.
  template <class Archive>
  void state(Archive& archive) {
    for (const auto& [name, group] : groups_) {
      if (group.lr_ratio != 1) archive.same(name + ".lr_ratio", group.lr_ratio);
      if (!group.decays) archive.same(name + ".decays", group.decays);
    }
  }

 private:
  std::vector<std::pair<std::string, ParameterGroup>> groups_;
};

}  // namespace detail

/// The groups of `others`, where parameters with one of these names after the last dot do not decay: a magnitude or a gain has nothing to
/// gain from being pulled to zero.
inline ParameterGroups without_decay(std::vector<std::string> names, ParameterGroups others = {}) {
  return [names = std::move(names), others = std::move(others)](const Parameter& parameter) {
    ParameterGroup group = others ? others(parameter) : ParameterGroup{};
    if (std::find(names.begin(), names.end(), detail::last_segment(parameter.name)) != names.end()) group.decays = false;
    return group;
  };
}

}  // namespace dylora

#endif
