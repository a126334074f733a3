#ifndef DYLORA_ANALYSIS_INTRUDERS_HPP
#define DYLORA_ANALYSIS_INTRUDERS_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/analysis/randomized_svd.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"
#include "dylora/linalg/svd.hpp"

/// Intruder dimensions: singular vectors of a tuned weight that none of the frozen one resembles. With u0_i and u1_j the left singular
/// vectors of W0 and of W0 + Δ,
///
///     cosine_j = max over i of |u1_j · u0_i|,        count = #{ j < top : cosine_j < threshold }.
///
/// Shuttleworth, Andreas, Torralba and Sharma, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv 2410.21228.
///
///     for (const LayerIntruders& layer : layer_intruders(model))              // every layer, every rank
///       std::cout << layer.name << ' ' << layer.curve[3].count << '\n';       // at rank 4
///
///     const BaseSpectrum base(W0);                                            // or one weight by itself
///     base.intruders(W_tuned, {.top = 10, .threshold = 0.5}).count;
///
/// Meant for matrices with at least 64 rows: among d orthonormal vectors, the one nearest to a random direction has a cosine of 0.53 on
/// average at d = 16, of 0.33 at d = 64 and of 0.19 at d = 256, so that with few rows even noise resembles something.
namespace dylora {

/// How the largest singular vectors of a tuned weight are found. automatic: exactly up to 512 rows or columns; beyond that randomized, and
/// exactly where that does not converge to a residual of 1e-6 in 50 power iterations. randomized: with at most 300, whatever comes of it.
enum class SvdMethod { automatic, exact, randomized };

struct IntruderOptions {
  Index top = 10;          ///< how many of the largest singular vectors are looked at; those of singular value 0 never are
  double threshold = 0.5;  ///< the cosine below which a direction is an intruder

  /// At 0, directions are compared one by one, as in the paper. Where singular values nearly agree, rounding or a small change turns their
  /// vectors among themselves, and each turned one counts as an intruder. With a window w, cosine_j is the largest norm of the projection
  /// of u1_j onto a span{ u0_k : |σ0_k − σ0_i| ≤ w σ0_i }, for each i with σ0_i > 0: turns within a window then count for nothing. Keep it
  /// small: onto n of d vectors, a random direction has a projection of norm √(n / d).
  double window = 0;

  SvdMethod method = SvdMethod::automatic;
  std::uint64_t seed = 0;  ///< of the randomized method
};

/// One of the largest singular vectors of a tuned weight.
struct TunedDirection {
  double singular_value;
  double cosine;  ///< with the nearest direction of the frozen weight, or with the window around it
  Index nearest;  ///< the place of that direction, or of the window's middle, among the singular vectors of the frozen weight

  bool operator==(const TunedDirection&) const = default;
};

struct Intruders {
  Index count = 0;
  std::vector<TunedDirection> directions;  ///< the largest first
  double residual = 0;                     ///< of the decomposition, as RandomizedSvd::residual; 0 for an exact one

  bool operator==(const Intruders&) const = default;
};

namespace detail {

inline void require_options(const IntruderOptions& options) {
  require_in_range(options.top, 1, std::numeric_limits<Index>::max(), "IntruderOptions: top");
  require_option(options.threshold >= 0 && std::isfinite(options.threshold), options.threshold, "IntruderOptions: threshold",
                 "a finite number ≥ 0");
  require_option(options.window >= 0 && options.window < 1, options.window, "IntruderOptions: window", "a number in [0, 1)");
}

/// The options.top largest singular values of W and their vectors, or all there are.
template <class S>
RandomizedSvd largest_singular_vectors(const MatrixX<S>& W, const IntruderOptions& options) {
  constexpr Index exact_up_to = 512;
  constexpr double converged = 1e-6;  // a vector is then off by that over its relative distance to the next singular value
  const Index limit = std::min(W.rows(), W.cols()), top = std::min(options.top, limit);
  const bool randomized = options.method == SvdMethod::randomized;
  if (randomized || (options.method == SvdMethod::automatic && limit > exact_up_to)) {
    Rng rng(options.seed);
    const Index oversampling = top + 10, worth_it = randomized ? 300 : 50;  // beyond that the exact one is about as fast
    RandomizedSvd svd = randomized_svd(W, top, {.oversampling = oversampling, .power_iterations = worth_it, .tolerance = converged}, rng);
    if (randomized || svd.residual <= converged) return svd;
  }
  const Svd svd = thin_svd(W);
  return {{svd.U.leftCols(top), svd.singular_values.head(top), svd.V.leftCols(top)}};
}

/// A layer whose frozen weight can be read, alone and merged with the adapter.
template <class L>
concept MergeableLayer = requires(const L& layer, RankSlice rank) {
  { layer.max_rank() } -> std::same_as<Index>;
  layer.base.dense();
  layer.merged(rank).dense();
};

}  // namespace detail

/// The singular values and left vectors of a frozen weight: what its tuned versions are compared with. Decomposed once.
class BaseSpectrum {
 public:
  /// Throws ShapeError if W0 has no elements, NonFiniteError if it holds a NaN or an infinity. Costs as thin_svd; keeps a matrix of
  /// rows × min(rows, cols) in double.
  template <class M>
  explicit BaseSpectrum(const Eigen::MatrixBase<M>& W0) : cols_(W0.cols()) {
    Svd svd = detail::thin_svd(detail::finite_matrix(W0, "BaseSpectrum: W0"));
    U_ = std::move(svd.U);
    singular_values_ = std::move(svd.singular_values);
  }

  Index rows() const { return U_.rows(); }
  Index cols() const { return cols_; }
  const MatrixX<double>& left_vectors() const { return U_; }  ///< rows × min(rows, cols)
  const VectorX<double>& singular_values() const { return singular_values_; }

  /// The intruders among the largest singular vectors of `tuned`, the merged weight and not its change alone. Throws ShapeError if its
  /// shape is another, NonFiniteError if it holds a NaN or an infinity, std::invalid_argument for an option out of range; `what` is its
  /// name there.
  template <class M>
  Intruders intruders(const Eigen::MatrixBase<M>& tuned, const IntruderOptions& options = {},
                      std::string_view what = "BaseSpectrum::intruders: tuned weight") const {
    detail::require_options(options);
    require_equal(tuned.rows(), rows(), std::string(what) + ": rows");
    require_equal(tuned.cols(), cols(), std::string(what) + ": columns");
    const RandomizedSvd svd = detail::largest_singular_vectors(detail::finite_matrix(tuned, what), options);
    Intruders result = intruders_among(svd, options);
    result.residual = svd.residual;
    return result;
  }

  /// The intruders among the vectors of a decomposition of a tuned weight: directions[j] is about column j.
  Intruders intruders_among(const Svd& tuned, const IntruderOptions& options) const {
    detail::require_options(options);
    require_equal(tuned.U.rows(), rows(), "BaseSpectrum::intruders_among: rows of U");
    const std::vector<std::pair<Index, Index>> windows = windows_of(options.window);
    MatrixX<double> cosines(U_.cols(), tuned.U.cols());
    set_product(cosines, U_.transpose(), tuned.U);
    Intruders result;
    for (Index j = 0; j < cosines.cols() && tuned.singular_values[j] > negligible(tuned.singular_values[0]); ++j) {
      TunedDirection direction{tuned.singular_values[j], 0, 0};
      for (std::size_t i = 0; i < windows.size(); ++i) {
        const auto [begin, end] = windows[i];
        const double cosine = cosines.col(j).segment(begin, end - begin).norm();
        if (cosine > direction.cosine) direction = {direction.singular_value, cosine, static_cast<Index>(i)};
      }
      direction.cosine = std::min(direction.cosine, 1.0);
      if (direction.cosine < options.threshold) ++result.count;
      result.directions.push_back(direction);
    }
    return result;
  }

 private:
  /// What rounding makes of a singular value of 0.
  double negligible(double largest) const {
    return static_cast<double>(std::max(rows(), cols())) * std::numeric_limits<double>::epsilon() * largest;
  }

  /// For each i, the range of base vectors that its window holds.
  std::vector<std::pair<Index, Index>> windows_of(double window) const {
    std::vector<std::pair<Index, Index>> windows;
    const VectorX<double>& sigma = singular_values_;
    for (Index i = 0, begin = 0, end = 0; i < sigma.size(); ++i) {
      if (window == 0) {
        windows.emplace_back(i, i + 1);
        continue;
      }
      if (sigma[i] <= negligible(sigma[0])) break;
      while (sigma[begin] > (1 + window) * sigma[i]) ++begin;
      while (end < sigma.size() && sigma[end] >= (1 - window) * sigma[i]) ++end;
      windows.emplace_back(begin, end);
    }
    return windows;
  }

  MatrixX<double> U_;
  VectorX<double> singular_values_;
  Index cols_;
};

/// The intruders of merged(b) for every rank b from 1 to max_rank: element b − 1 is rank b. merged(b) returns W0 + Δ_b; it may be called on
/// several threads at once. Throws as BaseSpectrum::intruders, naming the rank, and what merged throws. Each rank costs one decomposition
/// of a tuned weight.
template <std::invocable<Index> Merged>
std::vector<Intruders> intruder_curve(const BaseSpectrum& base, Index max_rank, const Merged& merged, const IntruderOptions& options = {}) {
  require_in_range(max_rank, 0, std::numeric_limits<Index>::max(), "intruder_curve: max_rank");
  detail::require_options(options);
  std::vector<Intruders> curve(static_cast<std::size_t>(max_rank));
  detail::for_each_decomposition(max_rank, [&](Index i) {
    curve[static_cast<std::size_t>(i)] =
        base.intruders(merged(i + 1), options, "intruder_curve: merged weight at rank " + std::to_string(i + 1));
  });
  return curve;
}

/// One layer of a model at every rank of its own.
struct LayerIntruders {
  std::string name;              ///< as for_each_layer gives it: "h.0.attn.q_proj"
  std::vector<Intruders> curve;  ///< element b − 1 is rank b
};

/// intruder_curve of each layer with an adapter inside `model`, against the `base` of that layer. Left out are layers without components
/// and those whose adapter cannot be merged. A base that has been changed to make room for its adapter is not what was pretrained: compare
/// with that by intruder_curve. Throws as intruder_curve, naming the layer for what is not finite.
template <class T>
std::vector<LayerIntruders> layer_intruders(const T& model, const IntruderOptions& options = {}) {
  std::vector<LayerIntruders> result;
  for_each_layer(model, [&](std::string_view name, const auto& layer) {
    if constexpr (detail::MergeableLayer<std::remove_cvref_t<decltype(layer)>>) {
      if (layer.max_rank() == 0) return;
      try {
        const auto merged = [&](Index rank) { return layer.merged(RankSlice(rank)).dense(); };
        result.push_back({std::string(name), intruder_curve(BaseSpectrum(layer.base.dense()), layer.max_rank(), merged, options)});
      } catch (const NonFiniteError& error) {
        throw NonFiniteError("layer \"" + std::string(name) + "\": " + error.what());
      }
    }
  });
  return result;
}

/// The intruders of all layers together at `rank`; a layer with fewer components counts with all it has. Throws std::invalid_argument
/// unless rank ≥ 1.
inline Index total_intruders(const std::vector<LayerIntruders>& layers, Index rank) {
  require_in_range(rank, 1, std::numeric_limits<Index>::max(), "total_intruders: rank");
  Index total = 0;
  for (const LayerIntruders& layer : layers) {
    if (layer.curve.empty()) continue;
    total += layer.curve[std::min(static_cast<std::size_t>(rank), layer.curve.size()) - 1].count;
  }
  return total;
}

}  // namespace dylora

#endif
