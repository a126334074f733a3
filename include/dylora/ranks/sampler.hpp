#ifndef DYLORA_RANKS_SAMPLER_HPP
#define DYLORA_RANKS_SAMPLER_HPP

#include <concepts>
#include <cstddef>
#include <limits>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"

/// Distributions over ranks, called once per training step (or per micro-batch, or per layer): RankSlice rank = sampler(rng).
///
///     UniformRank{1, 8}                                     the paper's default: nested, every rank equally often
///     FrozenPrefix{UniformRank{1, 8}}                       the paper's frozen mode: component b − 1 learns on top of the others
///     BlockRank{UniformRank{1, 4}, 2}                       ranks 2, 4, 6, 8
///     BlockRank{FrozenPrefix{UniformRank{1, 4}}, 2}         the same, only the newest block of 2 learns
namespace dylora {

template <class T>
concept RankSampler = requires(const T& sampler, Rng& rng) {
  { sampler(rng) } -> std::same_as<RankSlice>;
};

/// Each rank in [lowest, highest] with the same probability. Throws std::invalid_argument unless 1 ≤ lowest ≤ highest.
class UniformRank {
 public:
  UniformRank(Index lowest, Index highest) : lowest_(lowest), highest_(highest) {
    require_in_range(lowest, 1, highest, "UniformRank: lowest rank");
  }

  RankSlice operator()(Rng& rng) const { return lowest_ + rng.below(highest_ - lowest_ + 1); }

 private:
  Index lowest_, highest_;
};

/// Rank lowest + i with probability weights[i] / Σ weights.
/// Throws std::invalid_argument if lowest < 1, or a weight is negative or not finite, or all are zero.
class CategoricalRank {
 public:
  explicit CategoricalRank(const std::vector<double>& weights, Index lowest = 1) : lowest_(lowest) {
    require_in_range(lowest, 1, std::numeric_limits<Index>::max(), "CategoricalRank: lowest rank");
    double sum = 0;
    for (const double weight : weights) {
      require_option(weight >= 0 && weight <= std::numeric_limits<double>::max(), weight, "CategoricalRank: weight", "a finite number ≥ 0");
      cumulative_.push_back(sum += weight);
      if (weight > 0) last_ = static_cast<Index>(cumulative_.size()) - 1;
    }
    require_option(sum > 0 && sum <= std::numeric_limits<double>::max(), sum, "CategoricalRank: sum of the weights", "a finite number > 0");
  }

  RankSlice operator()(Rng& rng) const {
    const double drawn = rng.uniform() * cumulative_.back();
    Index i = 0;
    while (i < last_ && cumulative_[static_cast<std::size_t>(i)] <= drawn) ++i;
    return lowest_ + i;
  }

 private:
  Index lowest_;
  Index last_ = 0;  // the last with a weight above zero, whatever rounding makes of the draw
  std::vector<double> cumulative_;
};

/// Rank b in [lowest, highest] with probability proportional to (1 − p)^(b − lowest): low ranks more often, the more so the larger p.
/// Throws std::invalid_argument unless 1 ≤ lowest ≤ highest and 0 < p < 1.
class GeometricRank {
 public:
  GeometricRank(Index lowest, Index highest, double p) : ranks_(weights(lowest, highest, p), lowest) {}

  RankSlice operator()(Rng& rng) const { return ranks_(rng); }

 private:
  static std::vector<double> weights(Index lowest, Index highest, double p) {
    require_in_range(lowest, 1, highest, "GeometricRank: lowest rank");
    require_option(p > 0 && p < 1, p, "GeometricRank: p", "a number in (0, 1)");
    std::vector<double> result;
    double weight = 1;
    for (Index b = lowest; b <= highest; ++b, weight *= 1 - p) result.push_back(weight);
    return result;
  }

  CategoricalRank ranks_;
};

/// Frozen mode: the ranks of `sampler`, with only the newest component learning.
template <RankSampler Sampler>
struct FrozenPrefix {
  Sampler sampler;

  RankSlice operator()(Rng& rng) const {
    const Index b = sampler(rng).active;
    return {b, b - 1};
  }
};

template <class Sampler>
FrozenPrefix(Sampler) -> FrozenPrefix<Sampler>;

/// Ranks in blocks of `unit` components: what `sampler` draws is counted in blocks.
template <RankSampler Sampler>
struct BlockRank {
  BlockRank(Sampler sampler_, Index unit_) : sampler(std::move(sampler_)), unit(unit_) {
    require_in_range(unit, 1, std::numeric_limits<Index>::max(), "BlockRank: unit");
  }

  RankSlice operator()(Rng& rng) const {
    const RankSlice blocks = sampler(rng);
    return {blocks.active * unit, blocks.trainable_from * unit};
  }

  Sampler sampler;
  Index unit;
};

}  // namespace dylora

#endif
