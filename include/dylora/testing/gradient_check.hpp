#ifndef DYLORA_TESTING_GRADIENT_CHECK_HPP
#define DYLORA_TESTING_GRADIENT_CHECK_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <string>
#include <type_traits>

#include "dylora/adapters/adapter.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/layers/layer.hpp"

/// Certify a layer or an adapter of your own with one call.
namespace dylora {

/// What a gradient check found.
struct GradientReport {
  double error = 0;   ///< the largest gap, relative to the larger of the two values and of 1 % of the largest gradient beside it
  std::string where;  ///< the entry with that gap: "lora_A(2, 5): backward 0.31, differences 0.29"
  Index entries = 0;  ///< how many entries were compared
};

namespace detail {

/// An adapter as a layer of its own, over no base at all.
template <Adapter A>
struct AdapterLayer {
  using Scalar = typename A::Scalar;
  using Workspace = typename A::Workspace;
  struct Gradients {
    typename A::Gradients adapter;
  };
  struct Cache {
    MatrixX<Scalar> x;
    typename A::Cache adapter;
  };

  A adapter;

  Index in_features() const { return adapter.in_features(); }
  Index out_features() const { return adapter.out_features(); }

  MatrixX<Scalar> forward(ConstMatrixRef<Scalar> x, RankSlice rank, Cache& cache) const {
    cache.x = x;
    MatrixX<Scalar> y = MatrixX<Scalar>::Zero(out_features(), x.cols());
    adapter.add_forward(x, rank, cache.adapter, y);
    return y;
  }
  void backward(ConstMatrixRef<Scalar> dy, const Cache& cache, Gradients& gradients, Workspace& workspace, MatrixRef<Scalar> dx) const {
    adapter.add_backward(cache.x, dy, cache.adapter, gradients.adapter, workspace, dx);
  }

  static void members(const auto& f, auto&... t) { f(Child<A>{}, t.adapter...); }
};

/// Collects the largest gap.
class GradientComparison {
 public:
  void compare(const std::string& name, Index row, Index col, double analytic, double numeric, double floor) {
    const double size = std::max({std::abs(analytic), std::abs(numeric), floor, std::numeric_limits<double>::min()});
    record(std::abs(analytic - numeric) / size, name, row, col, analytic, numeric);
  }

  /// Where the derivative is known to be left alone: anything else is an infinite gap.
  void require_untouched(const std::string& name, Index row, Index col, double analytic) {
    record(analytic == 0 ? 0 : std::numeric_limits<double>::infinity(), name + " (not trained)", row, col, analytic, 0);
  }

  /// What a gradient does not hold to be trained, no optimiser updates.
  void require_noted(const std::string& name, const ComponentSet& components, RankSlice rank) {
    for (Index i = 0; i < components.size(); ++i) {
      const bool trained = i >= rank.trainable_from && i < rank.active;
      if (components.contains(i) == trained || std::isinf(report.error)) continue;
      report.error = std::numeric_limits<double>::infinity();
      report.where = name + ": component " + std::to_string(i) + (trained ? " was trained and not noted" : " was noted and not trained") +
                     " in the gradient's components";
    }
  }

  GradientReport report;

 private:
  void record(double gap, const std::string& name, Index row, Index col, double analytic, double numeric) {
    ++report.entries;
    if (gap <= report.error) return;  // a NaN gap is recorded
    report.error = std::isnan(gap) ? std::numeric_limits<double>::infinity() : gap;
    report.where = name + '(' + std::to_string(row) + ", " + std::to_string(col) + "): backward " + std::to_string(analytic) +
                   ", differences " + std::to_string(numeric);
  }
};

template <class L, class... Extra>
GradientReport check_layer_gradients(L layer, MatrixX<typename L::Scalar> x, RankSlice rank, Rng& rng, const typename L::Cache& prototype,
                                     bool backward_adds_dx, const Extra&... extra) {
  using S = typename L::Scalar;
  constexpr double step = 1e-5;
  const MatrixX<S> dy = random_uniform<S>(layer.out_features(), x.cols(), 1, rng);
  const auto value = [&] {
    typename L::Cache cache = prototype;
    return layer.forward(x, extra..., rank, cache).cwiseProduct(dy).sum();
  };
  const auto difference = [&](S& entry) {
    const S kept = entry;
    entry = static_cast<S>(kept + step);
    const double above = value();
    entry = static_cast<S>(kept - step);
    const double below = value();
    entry = kept;
    return (above - below) / (2 * step);
  };

  // Backward adds into the gradients (an adapter's into dx too): they start as noise, and what it added is looked at.
  typename L::Cache cache = prototype;
  (void)layer.forward(x, extra..., rank, cache);
  auto gradients = zeros_like(layer), noise = zeros_like(layer);
  for_each_parameter<L>(
      [&](Parameter, auto& g, auto& n) {
        for (Index i = 0; i < n.size(); ++i) n.data()[i] = static_cast<S>(rng.uniform());
        static_cast<typename std::remove_reference_t<decltype(g)>::PlainObject&>(g) = n;
      },
      gradients, noise);
  const MatrixX<S> before = random_uniform<S>(x.rows(), x.cols(), 1, rng);
  MatrixX<S> dx = before;
  typename L::Workspace workspace;
  layer.backward(dy, cache, gradients, workspace, dx);
  if (backward_adds_dx) dx -= before;

  GradientComparison comparison;
  for (Index j = 0; j < x.cols(); ++j) {
    for (Index i = 0; i < x.rows(); ++i) {
      comparison.compare("x", i, j, dx(i, j), difference(x(i, j)), 0.01 * static_cast<double>(dx.cwiseAbs().maxCoeff()));
    }
  }
  for_each_parameter(
      [&](Parameter parameter, auto& p, const auto& g, const auto& n) {
        const std::string name(parameter.name);
        if constexpr (requires { g.components; }) comparison.require_noted(name, g.components, rank);
        const double floor = p.size() > 0 ? 0.01 * static_cast<double>((g - n).cwiseAbs().maxCoeff()) : 0;
        for (Index j = 0; j < p.cols(); ++j) {
          for (Index i = 0; i < p.rows(); ++i) {
            const Index component = parameter.rank_axis == RankAxis::rows ? i : j;
            const double added = g(i, j) - n(i, j);
            if (parameter.rank_axis != RankAxis::none && (component < rank.trainable_from || component >= rank.active)) {
              comparison.require_untouched(name, i, j, added);
            } else {
              comparison.compare(name, i, j, added, difference(p(i, j)), floor);
            }
          }
        }
      },
      layer, gradients, noise);
  return comparison.report;
}

}  // namespace detail

/// Compares a layer's backward with central differences of ⟨forward(x), dy⟩ for a random dy, at every entry of x and of every trained
/// component; entries of the other components must have been left alone exactly, and the gradients must note which ones were trained.
///
///     CHECK(check_gradients(layer, x, {4, 3}, rng).error < 1e-6);
///
/// The layer must be over double. Gradients are filled with noise first, so a backward that assigns instead of adding is caught;
/// `prototype` is the cache that each forward starts from (seed a Dropout in it). `extra` goes between x and the rank, as Sequences does
/// for an Attention. Costs two forwards per entry: for small layers.
template <Layer L, class... Extra>
  requires std::same_as<typename L::Scalar, double>
GradientReport check_gradients(const L& layer, const MatrixX<double>& x, RankSlice rank, Rng& rng, const typename L::Cache& prototype = {},
                               const Extra&... extra) {
  return detail::check_layer_gradients(layer, x, rank, rng, prototype, false, extra...);
}

/// The same for an adapter by itself, whose backward must add into dx as well.
template <Adapter A>
  requires std::same_as<typename A::Scalar, double>
GradientReport check_gradients(const A& adapter, const MatrixX<double>& x, RankSlice rank, Rng& rng,
                               const typename A::Cache& prototype = {}) {
  return detail::check_layer_gradients(detail::AdapterLayer<A>{adapter}, x, rank, rng, {{}, prototype}, true);
}

/// The same at every rank b from 1 to max_rank, nested and frozen ({b, b − 1}), or without a rank where max_rank is 0: the report of the rank with the largest gap, whose `where`
/// begins with it, "rank 3, trainable from 2: gain(2, 0): …". Its entries are those of all ranks together.
template <class T>
  requires(Layer<T> || Adapter<T>) && std::same_as<typename T::Scalar, double>
GradientReport check_gradients(const T& trained, const MatrixX<double>& x, Rng& rng, const typename T::Cache& prototype = {}) {
  if (trained.max_rank() == 0) return check_gradients(trained, x, RankSlice::none(), rng, prototype);
  GradientReport worst;
  for (Index b = 1; b <= trained.max_rank(); ++b) {
    for (const RankSlice rank : {RankSlice(b), RankSlice(b, b - 1)}) {
      const GradientReport report = check_gradients(trained, x, rank, rng, prototype);
      worst.entries += report.entries;
      if (report.error <= worst.error) continue;
      worst.error = report.error;
      worst.where = "rank " + std::to_string(rank.active) + ", trainable from " + std::to_string(rank.trainable_from) + ": " + report.where;
    }
  }
  return worst;
}

}  // namespace dylora

#endif
