#ifndef DYLORA_CORE_PARAMETERS_HPP
#define DYLORA_CORE_PARAMETERS_HPP

#include <cmath>
#include <cstddef>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"

/// The one traversal over what is trained, and what follows from it alone.
///
/// A trainable type T names its parameters once:
///
///     template <class F, class... T>
///     static void zip_parameters(F&& f, T&... t) {
///       f(Parameter{"lora_A", RankAxis::rows, Factor::A}, t.A...);
///       f(Parameter{"lora_B", RankAxis::cols, Factor::B}, t.B...);
///     }
///
/// The same call walks the layer, its gradients and an optimiser's moments in step. Whoever traverses (optimisers, clipping, counting,
/// checkpoints, the gradient check) knows no layer; whoever writes a layer knows none of them.
namespace dylora {

/// Along which side of a parameter its rank components lie, if it has any.
enum class RankAxis { none, rows, cols };

/// Which factor of one product B A a parameter is, whose component i is row i of A and column i of B; none for everything else: a magnitude,
/// a gain, a gate, the factors of a sum of several products.
enum class Factor { none, A, B };

/// What a parameter is. Whoever traverses decides by this, never by the name.
struct Parameter {
  std::string_view name;  ///< dotted path, valid during the visit: "q_proj.lora_A"
  RankAxis rank_axis = RankAxis::none;
  Factor factor = Factor::none;
  bool embedding = false;  ///< whether it belongs to the adapter of a table whose columns are looked up
};

/// The derivative of a loss with respect to a parameter of type M, summed over the backward calls since it was cleared, and the rank
/// components that those calls trained. Without a rank axis `components` is empty and the whole parameter counts as trained.
template <class M>
struct Gradient : M {
  using M::M;
  using M::operator=;
  ComponentSet components;
};

/// Something trainable: it names its parameters and knows the type of their gradients.
template <class T>
concept Trainable =
    requires(T& trained, typename T::Gradients& gradients) { T::zip_parameters([](Parameter, auto&, auto&) {}, trained, gradients); };

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

template <class F>
struct Scoped {
  std::string_view name;
  F& f;

  void operator()(Parameter parameter, auto&... members) const {
    const std::string path = std::string(name) + '.' + std::string(parameter.name);
    parameter.name = path;
    f(parameter, members...);
  }

  void layer(std::string_view inner, auto&... layers) const
    requires requires { f.layer(inner, layers...); }
  {
    f.layer(inner.empty() ? std::string(name) : std::string(name) + '.' + std::string(inner), layers...);
  }
};

template <class F>
struct LayerVisitor {
  F& f;

  void operator()(Parameter, auto&...) const {}
  auto layer(std::string_view name, auto& layer) const -> decltype(void(layer.base)) { f(name, layer); }
};

template <class Element>
void match_size(std::vector<Element>& elements, std::size_t size, std::string_view /*name*/) {
  elements.resize(size);
}
template <class Element>
void match_size(const std::vector<Element>& elements, std::size_t size, std::string_view name) {
  require_equal(static_cast<Index>(elements.size()), static_cast<Index>(size), std::string(name) + ": number of elements");
}

}  // namespace detail

/// f as it looks from inside a member called `name`: parameters become "name.parameter". How a composite traverses its members:
///
///     Attention<float>::zip_parameters(scoped("attn", f), t.attention...);
template <class F>
auto scoped(std::string_view name, F& f) {
  return detail::Scoped<F>{name, f};
}

/// The traversal over a vector of elements: "name.0.parameter", "name.1.parameter" and so on. The first vector says how many there are.
/// Those beside it are resized to as many; one that is const and has another number is refused with a ShapeError.
///
///     zip_elements<Block>("h", f, t.blocks...);
template <class Element, class F, class First, class... Rest>
void zip_elements(std::string_view name, F& f, First& first, Rest&... rest) {
  (detail::match_size(rest, first.size(), name), ...);
  for (std::size_t i = 0; i < first.size(); ++i) {
    const std::string path = std::string(name) + '.' + std::to_string(i);
    Element::zip_parameters(scoped(path, f), first[i], rest[i]...);
  }
}

/// Calls f(name, layer) for each layer that is a frozen weight and its adapter (`base` and `adapter`), wherever it is inside `model`, itself
/// included (its name is then empty). A type takes part by one line in its zip_parameters:
///
///     if constexpr (requires { f.layer("", t...); }) return f.layer("", t...);
template <class T, class F>
void for_each_layer(T& model, F&& f) {
  T::zip_parameters(detail::LayerVisitor<F>{f}, model);
}

/// Gradients of the shape of `trained`, all zero, no component trained.
template <class T>
typename T::Gradients zeros_like(const T& trained) {
  typename T::Gradients gradients;
  T::zip_parameters(
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
  T::zip_parameters(
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
  T::zip_parameters([&](Parameter parameter, const auto& p,
                        const auto&... s) { (detail::require_gradient(s, p, parameter.rank_axis, what, parameter.name), ...); },
                    trained, shaped...);
}

/// sum += other: how the gradients of several workers come together. Add them in a fixed order, and the bits stay fixed too.
/// Throws ShapeError, with nothing added, if one is not of the shapes of `trained`.
template <class T>
void add(const T& trained, typename T::Gradients& sum, const typename T::Gradients& other) {
  require_shapes(trained, "add: gradient of", sum, other);
  T::zip_parameters(
      [](Parameter, auto& s, const auto& o) {
        s += o;
        if constexpr (requires { s.components; }) s.components.insert(o.components);
      },
      sum, other);
}

/// snapshot = the values of all parameters, in the shape of the gradients: a state that training can go back to.
template <class T>
void save_parameters(const T& trained, typename T::Gradients& snapshot) {
  T::zip_parameters(
      [](Parameter parameter, const auto& p, auto& s) {
        s = p;
        if constexpr (requires { s.components; }) s.components = ComponentSet(detail::component_count(parameter.rank_axis, p));
      },
      trained, snapshot);
}

/// The parameters become those of a snapshot that save_parameters made.
/// Throws ShapeError, with nothing changed, if it was made from something of other shapes.
template <class T>
void restore_parameters(T& trained, const typename T::Gradients& snapshot) {
  require_shapes(trained, "restore_parameters: snapshot of", snapshot);
  T::zip_parameters([](Parameter, auto& p, const auto& s) { p = s; }, trained, snapshot);
}

/// √ Σ g² over all parameters, summed in double. Components that were not trained hold zeros and are not read.
template <class T>
double norm(const T& /*trained*/, const typename T::Gradients& gradients) {
  double sum = 0;
  T::zip_parameters(
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
  T::zip_parameters([&](Parameter, const auto& p) { count += p.size(); }, trained);
  return count;
}

}  // namespace dylora

#endif
