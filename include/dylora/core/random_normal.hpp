#ifndef DYLORA_CORE_RANDOM_NORMAL_HPP
#define DYLORA_CORE_RANDOM_NORMAL_HPP

#include <cmath>
#include <concepts>
#include <numbers>

#include "dylora/core/error.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

/// rows × cols, each element deviation · N(0, 1), drawn in storage order: column by column, or row by row for a RowMatrix.
///
/// Box and Muller (1958): two uniform numbers u, v make two normal ones, √(−2 ln(1 − u)) · cos 2πv and, with sin, its neighbour; what an
/// odd number of elements leaves over is dropped. std::normal_distribution differs between standard libraries, this does so only as far as
/// their log, cos and sin round differently. Throws std::invalid_argument unless deviation is a finite number ≥ 0.
template <std::floating_point S, class M = MatrixX<S>>
M random_normal(Index rows, Index cols, double deviation, Rng& rng) {
  require_option(deviation >= 0 && std::isfinite(deviation), deviation, "random_normal: deviation", "a finite number >= 0");
  M matrix(rows, cols);
  for (Index i = 0; i < matrix.size(); i += 2) {
    const double u = rng.uniform();
    const double v = rng.uniform();
    const double radius = deviation * std::sqrt(-2 * std::log1p(-u));  // u < 1, so that the logarithm is finite
    const double angle = 2 * std::numbers::pi * v;
    matrix.data()[i] = static_cast<S>(radius * std::cos(angle));
    if (i + 1 < matrix.size()) matrix.data()[i + 1] = static_cast<S>(radius * std::sin(angle));
  }
  return matrix;
}

}  // namespace dylora

#endif
