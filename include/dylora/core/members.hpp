#ifndef DYLORA_CORE_MEMBERS_HPP
#define DYLORA_CORE_MEMBERS_HPP

#include <concepts>
#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"

/// The one traversal over what something trainable is made of. A type T names its members once, in this function:
///
///     static void members(const auto& f, auto&... t) {
///       f(Child<Query>{"q_proj"}, t.q...);                                 // "q_proj.lora_A", "q_proj.lora_B"
///       f(Child<Block>{"h"}, t.blocks...);                                 // a list: "h.0.…", "h.1.…"
///       f(Child<Inner>{}, t.inner...);                                     // its members bear no name in front
///       f(Parameter{"lora_A", RankAxis::rows, Factor::A}, t.A...);         // trained
///       f(Constant{"initial_A"}, &T::initial_A);                           // frozen, and kept in files
///       f(Setting{"seed"}, &T::seed);                                      // a file of another one is refused
///       f(Setting{"nesting"}, [](const T& self) { return name_of(self.nesting); });
///       scale_settings<T>(f);                                              // max_rank and the scales of an adapter: ranks/scale.hpp
///     }
///
/// `t` is what is walked in step, the members of one name at a time: the trained thing, and whatever has the shape of its gradients:
/// gradients, an optimiser's moments, a snapshot; or these alone. Constants and settings are of the trained thing: f takes them out of it
/// where it is walked. Optimisers, clipping, counting, checkpoints, files, truncation and the gradient check are made of this function, and
/// know no layer; who writes a layer knows none of them.
namespace dylora {

/// Along which side of a parameter its rank components lie, if it has any.
enum class RankAxis { none, rows, cols };

/// Which factor of one product B A a parameter is, whose component i is row i of A and column i of B; none for everything else: a
/// magnitude, a gain, a gate, the factors of a sum of several products.
enum class Factor { none, A, B };

/// What a parameter is. Whoever traverses decides by this, never by the name.
struct Parameter {
  std::string_view name;  ///< dotted path, valid during the visit: "q_proj.lora_A"
  RankAxis rank_axis = RankAxis::none;
  Factor factor = Factor::none;
  bool embedding = false;  ///< whether it belongs to the adapter of a table whose columns are looked up
};

/// A tensor that is not trained, and without which the parameters are another function. Or something that has members, or a list of such
/// things: all of its parameters are constants then.
struct Constant {
  std::string_view name;  ///< as a Parameter's
};

/// A value without which the parameters are another function: what nlohmann::json can hold, or an std::optional of it, which is left out
/// where it is empty.
struct Setting {
  std::string_view name;          ///< as a Parameter's
  bool only_in_training = false;  ///< whether it matters to a run that goes on and not to who uses its result: how much is dropped
};

/// Something with members of its own, of the type T.
template <class T>
struct Child {
  std::string_view name = "";  ///< what the names of its members begin with, or nothing
};

namespace detail {

template <class T>
concept ListOfChildren = requires(T& list) {
  list.size();
  list[0];
  list.begin();
};

/// What is walked beside a list has as many elements: one that can grow is made to, another is refused.
template <class List>
void match_size(List& list, std::size_t size, std::string_view name) {
  if constexpr (requires { list.resize(size); } && std::default_initializable<typename List::value_type>) list.resize(size);
  if (!name.empty() && name.back() == '.') name.remove_suffix(1);
  require_equal(static_cast<Index>(list.size()), static_cast<Index>(size), std::string(name.empty() ? "list" : name) + ": number of elements");
}

/// Hands the parameters of what is constant to a visitor as constants.
template <class Visitor>
struct AsConstants {
  Visitor& visitor;

  void parameter(Parameter parameter, auto& value) const
    requires requires { visitor.constant(Constant{parameter.name}, value); }
  {
    visitor.constant(Constant{parameter.name}, value);
  }
  void constant(Constant constant, auto& value) const
    requires requires { visitor.constant(constant, value); }
  {
    visitor.constant(constant, value);
  }
  void setting(Setting setting, const auto& value) const
    requires requires { visitor.setting(setting, value); }
  {
    visitor.setting(setting, value);
  }
};

/// Stands for the trained thing where its gradients are walked alone.
struct NotWalked {};

/// The f of T::members: knows where in the model it is, and tells the visitor what it asks for.
template <class Visitor, class Self>
class Walk {
 public:
  Walk(Visitor& visitor, Self& self, const std::string& path) : visitor_(visitor), self_(self), path_(path) {}

  template <class T>
  void operator()(Child<T> child, auto& first, auto&... beside) const;

  void operator()(Parameter parameter, auto& value, auto&... beside) const {
    if constexpr (requires { visitor_.parameter(parameter, value, beside...); }) {
      if (path_.empty()) return visitor_.parameter(parameter, value, beside...);
      const std::string name = joined(parameter.name);
      parameter.name = name;
      visitor_.parameter(parameter, value, beside...);
    }
  }

  template <class Get>
  void operator()(Constant constant, Get get) const {
    if constexpr (!std::same_as<Self, NotWalked>) tell(constant, std::invoke(get, self_));
  }

  template <class Get>
  void operator()(Setting setting, Get get) const {
    if constexpr (!std::same_as<Self, NotWalked>) {
      if constexpr (requires { visitor_.setting(setting, 0); }) tell(setting, std::invoke(get, std::as_const(self_)));
    }
  }

 private:
  std::string joined(std::string_view name) const { return path_ + std::string(name); }

  void tell(Constant constant, auto&& value) const;

  void tell(Setting setting, const auto& value) const {
    if constexpr (requires { value.has_value(); }) {
      if (value.has_value()) tell(setting, *value);
    } else {
      const std::string name = joined(setting.name);
      setting.name = name;
      visitor_.setting(setting, value);
    }
  }

  Visitor& visitor_;
  Self& self_;
  const std::string& path_;  // empty, or with a dot at its end
};

template <class T, class Visitor, class First, class... Beside>
void walk_inside(Visitor& visitor, const std::string& path, First& first, Beside&... beside) {
  if constexpr (std::derived_from<First, T>) {
    T::members(Walk<Visitor, First>(visitor, first, path), first, beside...);
  } else {
    NotWalked nothing;
    T::members(Walk<Visitor, NotWalked>(visitor, nothing, path), first, beside...);
  }
}

/// The members of T, unless the visitor passes them by.
template <class T, class Visitor, class First, class... Beside>
void walk(Visitor& visitor, const std::string& path, First& first, Beside&... beside) {
  if constexpr (requires { visitor.enter(std::string_view(), first, beside...); }) {
    const std::string_view name = std::string_view(path).substr(0, path.empty() ? 0 : path.size() - 1);
    const auto enters = visitor.enter(name, first, beside...);
    if constexpr (enters) walk_inside<T>(visitor, path, first, beside...);
  } else {
    walk_inside<T>(visitor, path, first, beside...);
  }
}

/// Calls f(path, element, beside...) for each element of a list, with the path of its members.
template <class F, class First, class... Beside>
void for_each_element(const std::string& path, F&& f, First& first, Beside&... beside) {
  (match_size(beside, first.size(), path), ...);
  for (std::size_t i = 0; i < first.size(); ++i)
    f(path + (path.empty() || path.back() == '.' ? "" : ".") + std::to_string(i) + '.', first[i], beside[i]...);
}

template <class Visitor, class Self>
template <class T>
void Walk<Visitor, Self>::operator()(Child<T> child, auto& first, auto&... beside) const {
  if constexpr (ListOfChildren<decltype(first)>) {
    for_each_element(
        joined(child.name), [&](const std::string& path, auto&... elements) { walk<T>(visitor_, path, elements...); }, first, beside...);
  } else if (child.name.empty()) {
    walk<T>(visitor_, path_, first, beside...);
  } else {
    walk<T>(visitor_, joined(child.name) + '.', first, beside...);
  }
}

template <class Visitor, class Self>
void Walk<Visitor, Self>::tell(Constant constant, auto&& value) const {
  using Value = std::remove_cvref_t<decltype(value)>;
  AsConstants<Visitor> as_constants{visitor_};
  if constexpr (requires { typename Value::Gradients; }) {
    walk<Value>(as_constants, joined(constant.name) + '.', value);
  } else if constexpr (requires { typename Value::value_type::Gradients; }) {
    for_each_element(
        joined(constant.name),
        [&](const std::string& path, auto& element) { walk<typename Value::value_type>(as_constants, path, element); }, value);
  } else if constexpr (requires { visitor_.constant(constant, value); }) {
    const std::string name = joined(constant.name);
    visitor_.constant(Constant{name}, value);
  }
}

struct NoVisitor {};

template <class F>
struct ParameterVisitor {
  F& f;
  void parameter(Parameter parameter, auto& value, auto&... beside) const { f(parameter, value, beside...); }
};
template <class F>
struct ConstantVisitor {
  F& f;
  void constant(Constant constant, auto& value) const { f(constant, value); }
};
template <class F>
struct SettingVisitor {
  F& f;
  void setting(Setting setting, const auto& value) const { f(setting, value); }
};

}  // namespace detail

/// Walks through `trained` and what is beside it, and calls those of these members that the visitor has:
///
///     visitor.parameter(Parameter, value, beside...)     for each that is trained
///     visitor.constant(Constant, value)
///     visitor.setting(Setting, value)
///     visitor.enter(name, child, beside...)              for each child before its members, and first for `trained` itself, whose name is
///                                                        empty; returns std::true_type to be led inside, std::false_type to pass by
template <class Visitor, class T, class... Beside>
void visit_members(Visitor&& visitor, T& trained, Beside&... beside) {
  detail::walk<std::remove_const_t<T>>(visitor, std::string(), trained, beside...);
}

/// Calls f(Parameter, parameter, beside...) for each parameter of `trained`, and what is in its place in each of `beside`.
template <class F, class T, class... Beside>
void for_each_parameter(F&& f, T& trained, Beside&... beside) {
  visit_members(detail::ParameterVisitor<F>{f}, trained, beside...);
}

/// The same where only what has the shape of T's gradients is walked: for_each_parameter<T>(f, gradients...).
template <class T, class F, class... Shaped>
  requires requires { typename T::Gradients; }
void for_each_parameter(F&& f, Shaped&... gradients) {
  detail::ParameterVisitor<F> visitor{f};
  detail::walk<T>(visitor, std::string(), gradients...);
}

/// Calls f(Constant, value) for each constant of `trained`.
template <class F, class T>
void for_each_constant(F&& f, T& trained) {
  visit_members(detail::ConstantVisitor<F>{f}, trained);
}

/// Calls f(Setting, value) for each setting of `trained`.
template <class F, class T>
void for_each_setting(F&& f, const T& trained) {
  visit_members(detail::SettingVisitor<F>{f}, trained);
}

}  // namespace dylora

#endif
