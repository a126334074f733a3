#ifndef DYLORA_METHODS_PRILORA_RANK_ALLOCATION_HPP
#define DYLORA_METHODS_PRILORA_RANK_ALLOCATION_HPP

#include <cstdlib>
#include <limits>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

/// r_l = first + (last − first) · (l − 1) / (L − 1) for l = 1..L, to the nearest integer: a rank for each layer that grows with its depth.
///
/// PRILoRA (Benedek and Wolf, arXiv 2401.11316), whose example is believed to be 4 to 12 over 12 layers (unconfirmed, as is how it rounds):
///
///     const std::vector<Index> ranks = linear_ranks(4, 12, 12);     // 4 5 5 6 7 8 8 9 10 11 11 12, of the size of 8 everywhere
///     Linear<float, Proportional<LowRank<float>>> layer(W, {.adapter = {.max_rank = ranks[l]}, .max_rank = 12}, rng);
///
/// A rank half-way between two integers goes to the nearer end, so that the two halves mirror each other: their sum is
/// layers · (first + last) / 2, but for the half that a middle layer may lose. Under alpha_over_rank, the layers of low rank are the louder
/// ones at one α; a rule that leaves the rank out, as [](double alpha, Index, Index) { return alpha; }, makes them alike.
/// Throws std::invalid_argument if a rank is negative or there are fewer than two layers.
inline std::vector<Index> linear_ranks(Index first, Index last, Index layers) {
  constexpr Index most = std::numeric_limits<int>::max();
  require_in_range(first, 0, most, "linear_ranks: first");
  require_in_range(last, 0, most, "linear_ranks: last");
  require_in_range(layers, 2, most, "linear_ranks: layers");
  std::vector<Index> ranks;
  const Index steps = layers - 1, rise = std::abs(last - first), sign = last < first ? -1 : 1;
  const auto nearest = [&](Index step) { return sign * ((2 * rise * step + steps - 1) / (2 * steps)); };  // a half goes down
  for (Index l = 0; l < layers; ++l) ranks.push_back(2 * l <= steps ? first + nearest(l) : last - nearest(steps - l));
  return ranks;
}

}  // namespace dylora

#endif
