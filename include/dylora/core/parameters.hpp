#ifndef DYLORA_CORE_PARAMETERS_HPP
#define DYLORA_CORE_PARAMETERS_HPP

#include <cmath>
#include <string>
#include <string_view>
#include <type_traits>

#include "dylora/core/error.hpp"
#include "dylora/core/members.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"

/// What follows from the traversal of members (core/members.hpp) alone: gradients and their sums, snapshots, counting.
namespace dylora {

/// The derivative of a loss with respect to a parameter of type M, summed over the backward calls since it was cleared, and the rank
/// components that those calls trained. Without a rank axis `components` is empty and the whole parameter counts as trained.
template <class M>
struct Gradient : M {
  using M::M;
  using M::operator=;
  ComponentSet components;
};

/// Something trainable: it names its members and knows the type of its gradients, which have the same names for what is trained.
template <class T>
concept Trainable = requires(const detail::Walk<detail::NoVisitor, T>& f, T& trained, typename T::Gradients& gradients) {
  T::members(f, trained);
  T::members(f, trained, gradients);
};

namespace detail {

template <class M>
Index component_count(RankAxis axis, const M& parameter) {
  return axis == RankAxis::rows ? parameter.rows() : axis == RankAxis::cols ? parameter.cols() : 0;
}

/// Components [begin, end) of a parameter as a block of it.
template <class M>
auto component_block(RankAxis axis, M& parameter, Index begin, Index end) {
  return axis == RankAxis::rows ? parameter.block(begin, 0, end - begin, parameter.cols())
                                : parameter.block(0, begin, parameter.rows(), end - begin);
}

/// Throws ShapeError unless `gradient` is what zeros_like makes for `parameter`.
template <class G, class M>
void require_gradient(const G& gradient, const M& parameter, RankAxis axis, std::string_view what, std::string_view name) {
  const auto describe = [](const auto& m, Index components) {
    return std::to_string(m.rows()) + " × " + std::to_string(m.cols()) + " with " + std::to_string(components) + " rank components";
  };
  const Index expected = component_count(axis, parameter);
  Index got = expected;
  if constexpr (requires { gradient.components; }) got = gradient.components.size();
  if (gradient.rows() == parameter.rows() && gradient.cols() == parameter.cols() && got == expected) return;
  throw ShapeError(std::string(what) + ' ' + std::string(name) + ": expected " + describe(parameter, expected) +
                   ", as zeros_like makes it, got " + describe(gradient, got));
}

/// Calls f(begin, end) for each run of components that `gradient` has trained; once, with its whole extent, where it does not say.
template <class G, class F>
void for_each_trained_range(RankAxis axis, const G& gradient, F&& f) {
  if constexpr (requires { gradient.components; }) {
    if (axis != RankAxis::none) return gradient.components.for_each_range(f);
  }
  f(Index{0}, axis == RankAxis::rows ? gradient.rows() : gradient.cols());
}

/// Calls f(size, pointers…) for each run of contiguous elements of blocks that have one shape and storage order: once where all are
/// contiguous. What it is given does not depend on the type of the blocks, so that f is compiled once.
template <class F, class First, class... Rest>
void for_each_span(F&& f, First&& first, Rest&&... rest) {
  static_assert(((bool(std::remove_cvref_t<First>::IsRowMajor) == bool(std::remove_cvref_t<Rest>::IsRowMajor)) && ...),
                "a parameter, its gradient and its moments must have one storage order");
  if (((first.outerStride() == first.innerSize()) && ... && (rest.outerStride() == rest.innerSize()))) {
    return f(first.size(), first.data(), rest.data()...);
  }
  for (Index i = 0; i < first.outerSize(); ++i) {
    f(first.innerSize(), first.data() + i * first.outerStride(), rest.data() + i * rest.outerStride()...);
  }
}

/// Elements that lie side by side.
template <class S>
using Span = Eigen::Map<Eigen::Array<S, Eigen::Dynamic, 1>>;
template <class S>
using ConstSpan = Eigen::Map<const Eigen::Array<S, Eigen::Dynamic, 1>>;

}  // namespace detail

/// Gradients of the shape of `trained`, all zero, no component trained.
template <class T>
typename T::Gradients zeros_like(const T& trained) {
  typename T::Gradients gradients;
  for_each_parameter(
      [](Parameter parameter, const auto& p, auto& g) {
        g.setZero(p.rows(), p.cols());
        if constexpr (requires { g.components; }) g.components = ComponentSet(detail::component_count(parameter.rank_axis, p));
      },
      trained, gradients);
  return gradients;
}

/// gradients = 0 and no component trained; what a training loop does before the first backward of a step.
template <class T>
void set_zero(const T& /*trained*/, typename T::Gradients& gradients) {
  for_each_parameter<T>(
      [](Parameter, auto& g) {
        g.setZero();
        if constexpr (requires { g.components; }) g.components.clear();
      },
      gradients);
}

/// Throws ShapeError, naming the parameter, unless each of `shaped` has the shapes that zeros_like makes for `trained`. Whoever is about to
/// write to several parameters asks this first, so that an error leaves all of them as they were.
template <class T, class... Shaped>
void require_shapes(const T& trained, std::string_view what, const Shaped&... shaped) {
  for_each_parameter([&](Parameter parameter, const auto& p,
                         const auto&... s) { (detail::require_gradient(s, p, parameter.rank_axis, what, parameter.name), ...); },
                     trained, shaped...);
}

/// sum += other: how the gradients of several workers come together. Add them in a fixed order, and the bits stay fixed too.
/// Throws ShapeError, with nothing added, if one is not of the shapes of `trained`.
template <class T>
void accumulate_gradients(const T& trained, typename T::Gradients& sum, const typename T::Gradients& other) {
  require_shapes(trained, "accumulate_gradients: gradient of", sum, other);
  for_each_parameter<T>(
      [](Parameter, auto& s, const auto& o) {
        s += o;
        if constexpr (requires { s.components; }) s.components.insert(o.components);
      },
      sum, other);
}

/// snapshot = the values of all parameters, in the shape of the gradients: a state that training can go back to.
template <class T>
void take_snapshot(const T& trained, typename T::Gradients& snapshot) {
  for_each_parameter(
      [](Parameter parameter, const auto& p, auto& s) {
        s = p;
        if constexpr (requires { s.components; }) s.components = ComponentSet(detail::component_count(parameter.rank_axis, p));
      },
      trained, snapshot);
}

/// The parameters become those of a snapshot that take_snapshot made.
/// Throws ShapeError, with nothing changed, if it was made from something of other shapes.
template <class T>
void restore_snapshot(T& trained, const typename T::Gradients& snapshot) {
  require_shapes(trained, "restore_snapshot: snapshot of", snapshot);
  for_each_parameter([](Parameter, auto& p, const auto& s) { p = s; }, trained, snapshot);
}

/// √ Σ g² over all parameters, summed in double. Components that were not trained hold zeros and are not read.
template <class T>
double norm(const T& /*trained*/, const typename T::Gradients& gradients) {
  double sum = 0;
  for_each_parameter<T>(
      [&](Parameter parameter, const auto& g) {
        detail::for_each_trained_range(parameter.rank_axis, g, [&](Index begin, Index end) {
          detail::for_each_span(
              [&](Index size, const auto* values) {
                using S = std::remove_cvref_t<decltype(*values)>;
                sum += detail::ConstSpan<S>(values, size).template cast<double>().square().sum();
              },
              detail::component_block(parameter.rank_axis, g, begin, end));
        });
      },
      gradients);
  return std::sqrt(sum);
}

/// The number of trainable values.
template <class T>
Index parameter_count(const T& trained) {
  Index count = 0;
  for_each_parameter([&](Parameter, const auto& p) { count += p.size(); }, trained);
  return count;
}

}  // namespace dylora

#endif
