#ifndef DYLORA_IO_SETTINGS_HPP
#define DYLORA_IO_SETTINGS_HPP

#include <cstddef>
#include <string>
#include <string_view>
#include <type_traits>

#include "dylora/adapters/adapter.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"

/// What the function of a model depends on besides its parameters: settings, which a file names so that another's are refused, and
/// constants, frozen tensors which are kept beside the parameters.
///
/// Asked are each layer of for_each_layer, its adapter, and the model itself. Both members are optional:
///
///     template <class F>
///     void for_each_setting(F&& f) const {          // what nlohmann::json can hold
///       f("seed", seed);
///     }
///     template <class F, class... T>
///     static void zip_constants(F&& f, T&... t) {   // as zip_parameters; what is trained is no constant
///       f(Parameter{"initial_A"}, t.initial_A...);
///     }
///
/// An adapter's max_rank and scales are settings by themselves, and one that is made of others (`inner`, `slices`, `links`) has theirs too.
namespace dylora::detail {

/// Calls f(prefix, part) for an adapter and those that it is made of, each with what its names begin with.
template <class A, class F>
void for_each_part(const std::string& prefix, A& adapter, F&& f) {
  const auto each = [&](auto& parts, const std::string& before) {
    for (std::size_t i = 0; i < parts.size(); ++i) for_each_part(before + std::to_string(i) + '.', parts[i], f);
  };
  f(prefix, adapter);
  if constexpr (requires { adapter.inner; }) {
    for_each_part(prefix, adapter.inner, f);
  } else if constexpr (requires { adapter.slices; }) {
    each(adapter.slices, prefix);
  } else if constexpr (requires { adapter.links.front().max_rank(); }) {
    each(adapter.links, prefix + "links.");
  }
}

/// Calls f(prefix, part) for each layer inside the model, its adapter and what that is made of; for the model itself, if it is no layer.
template <class T, class F>
void for_each_model_part(T& model, F&& f) {
  bool itself = false;
  for_each_layer(model, [&](std::string_view name, auto& layer) {
    const std::string prefix = std::string(name) + (name.empty() ? "" : ".");
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(layer)>, std::remove_cvref_t<T>>) itself = itself || &layer == &model;
    f(prefix, layer);
    for_each_part(prefix, layer.adapter, f);
  });
  if constexpr (Adapter<std::remove_cvref_t<T>>) {
    for_each_part("", model, f);
  } else if (!itself) {
    f(std::string(), model);
  }
}

/// Calls f(name, value) for max_rank and the scales that scale_at(rank) gives.
template <class A, class ScaleAt, class F>
void for_each_scale(const A& adapter, ScaleAt&& scale_at, F&& f) {
  f("max_rank", adapter.max_rank());
  if (adapter.max_rank() == 0) return;
  f("scale at rank 1", scale_at(1));
  f("scale at max_rank", scale_at(adapter.max_rank()));
}

/// Calls f(name, value) for the settings of one part: its own, and the max_rank and scales of an adapter that has any and is not made of
/// others. Scale rules that agree at the first and the last rank are the same one, as far as those of ranks/scale.hpp go.
template <class A, class F>
void for_each_setting(const std::string& prefix, const A& part, F&& f) {
  const auto own = [&](std::string_view name, const auto& value) { f(prefix + std::string(name), value); };
  if constexpr (requires { part.for_each_setting(own); }) part.for_each_setting(own);
  constexpr bool made_of_others = requires { part.inner; } || requires { part.slices; } || requires { part.links; };
  if constexpr (PortableAdapter<A> && !made_of_others) {
    for_each_scale(
        part, [&](Index rank) { return part.factors(rank).scale; }, own);
  } else if constexpr (Adapter<A> && !made_of_others && requires { part.scale(Index{1}); }) {
    for_each_scale(
        part, [&](Index rank) -> double { return part.scale(rank); }, own);
  }
}

/// Calls f(name, matrix) for the constants of all parts of the model.
template <class T, class F>
void for_each_model_constant(T& model, F&& f) {
  for_each_model_part(model, [&](const std::string& prefix, auto& part) {
    using Part = std::remove_cvref_t<decltype(part)>;
    const auto own = [&](Parameter constant, auto& matrix) { f(prefix + std::string(constant.name), matrix); };
    if constexpr (requires { Part::zip_constants(own, part); }) Part::zip_constants(own, part);
  });
}

}  // namespace dylora::detail

#endif
