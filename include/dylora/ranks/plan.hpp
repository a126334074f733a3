#ifndef DYLORA_RANKS_PLAN_HPP
#define DYLORA_RANKS_PLAN_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/ranks/sampler.hpp"

/// Which ranks a training step works at, and how much of it each gets: StepRanks ranks = plan(step, rng).
///
///     FreshRanks{UniformRank{1, 8}}                               the paper: one rank per step
///     FreshRanks{UniformRank{1, 8}, 4}                            a fresh rank for each quarter of the step
///     Sandwich{1, 8}                                              1, 8 and two random ranks, a quarter each
///     EveryRank{1, 8}                                             all of them, an eighth each
///     MixedRanks({{UniformRank{8, 8}, 0.5}, …})                   parts of any size, each with a sampler of its own
///     WeightedRanks{EveryRank{1, 8}, {2, 1, 1, 1, 1, 1, 1, 2}}    the same with a loss weight for each rank
///     MovingRange({.from = {8, 8}, .to = {1, 8}, .steps = 400})   a range whose ends move
///     Phases{FreshRanks{UniformRank{8, 8}}, 100, Sandwich{1, 8}}  one plan for 100 steps, then another
///     recommended_plan(8, 1200)                                   what worked best, for a run of 1200 steps
///
/// A step's parts are either micro-batches, each with a forward and a backward of its own (train_step calls them in turn), or groups of one
/// batch, each sequence at the rank of its group (ranks/groups.hpp). Gradients are those of micro-batches that are the groups, bit for
/// bit; one batch takes less time.
namespace dylora {

/// A part of a step: all of its samples at one rank.
struct RankShare {
  RankSlice rank;
  double share;   ///< of the step's samples; the shares of a step sum to 1
  double weight;  ///< of its mean loss in the loss of the step; equal to the share where every sample counts the same

  bool operator==(const RankShare&) const = default;
};

using StepRanks = std::vector<RankShare>;

template <class P>
concept RankPlan = requires(const P& plan, Index step, Rng& rng) {
  { plan(step, rng) } -> std::same_as<StepRanks>;
};

namespace detail {

/// Equal shares of the given ranks.
inline StepRanks equal_shares(const std::vector<RankSlice>& ranks) {
  StepRanks result;
  const double share = 1 / static_cast<double>(ranks.size());
  for (const RankSlice rank : ranks) result.push_back({rank, share, share});
  return result;
}

}  // namespace detail

/// `draws` equal parts, each at a rank drawn by itself. The author of DyLoRA advises a fresh rank per micro-batch, the more the better; one
/// draw is the algorithm of the paper (arXiv 2210.07558, algorithm 1). Throws std::invalid_argument if draws < 1.
template <RankSampler Sampler>
class FreshRanks {
 public:
  explicit FreshRanks(Sampler sampler, Index draws = 1) : sampler_(std::move(sampler)), draws_(draws) {
    require_in_range(draws, 1, std::numeric_limits<Index>::max(), "FreshRanks: draws");
  }

  StepRanks operator()(Index /*step*/, Rng& rng) const {
    std::vector<RankSlice> ranks;
    for (Index i = 0; i < draws_; ++i) ranks.push_back(sampler_(rng));
    return detail::equal_shares(ranks);
  }

 private:
  Sampler sampler_;
  Index draws_;
};

/// The lowest rank, the highest, and `random` ranks uniform between them, in equal parts: the sandwich rule of slimmable networks
/// (arXiv 1903.05134), whose ends bound what all ranks between them can do. Throws std::invalid_argument unless 1 ≤ lowest ≤ highest and
/// random ≥ 0.
class Sandwich {
 public:
  Sandwich(Index lowest, Index highest, Index random = 2) : lowest_(lowest), highest_(highest), random_(random) {
    require_in_range(lowest, 1, highest, "Sandwich: lowest rank");
    require_in_range(random, 0, std::numeric_limits<Index>::max(), "Sandwich: random ranks");
  }

  StepRanks operator()(Index /*step*/, Rng& rng) const {
    std::vector<RankSlice> ranks{highest_, lowest_};
    const UniformRank between(lowest_, highest_);
    for (Index i = 0; i < random_; ++i) ranks.push_back(between(rng));
    return detail::equal_shares(ranks);
  }

 private:
  Index lowest_, highest_, random_;
};

/// Parts of any size, each with ranks from a sampler of its own: what to reach for when the plans above divide a step otherwise than
/// wished.
///
///     MixedRanks({{UniformRank{8, 8}, 0.5}, {UniformRank{1, 1}, 0.25}, {UniformRank{1, 8}, 0.25}})
///
/// Throws std::invalid_argument unless there is a part and the shares are numbers in (0, 1] that sum to 1.
class MixedRanks {
 public:
  struct Part {
    std::function<RankSlice(Rng&)> sampler;
    double share;
  };

  explicit MixedRanks(std::vector<Part> parts) : parts_(std::move(parts)) {
    double sum = 0;
    for (const Part& part : parts_) {
      require_option(part.share > 0 && part.share <= 1, part.share, "MixedRanks: share", "a number in (0, 1]");
      if (!part.sampler) throw std::invalid_argument("MixedRanks: expected a sampler for each part, got an empty one");
      sum += part.share;
    }
    require_option(std::abs(sum - 1) < 1e-9, sum, "MixedRanks: sum of the shares", "1");
  }

  StepRanks operator()(Index /*step*/, Rng& rng) const {
    StepRanks ranks;
    for (const Part& part : parts_) ranks.push_back({part.sampler(rng), part.share, part.share});
    return ranks;
  }

 private:
  std::vector<Part> parts_;
};

/// Every rank in [lowest, highest] in equal parts. Throws std::invalid_argument unless 1 ≤ lowest ≤ highest.
class EveryRank {
 public:
  EveryRank(Index lowest, Index highest) {
    require_in_range(lowest, 1, highest, "EveryRank: lowest rank");
    for (Index rank = lowest; rank <= highest; ++rank) ranks_.push_back(rank);
  }

  StepRanks operator()(Index /*step*/, Rng& /*rng*/) const { return detail::equal_shares(ranks_); }

 private:
  std::vector<RankSlice> ranks_;
};

/// A range of ranks whose ends go from one place to another in equal strides over `steps`, and then stay; ranks are drawn uniformly from
/// it.
struct MovingRangeOptions {
  struct Range {
    Index lowest, highest;
  };
  Range from, to;
  Index steps;
  Index draws = 1;  ///< equal parts of a step, each at a rank of its own
};

class MovingRange {
 public:
  /// Throws std::invalid_argument unless 1 ≤ lowest ≤ highest in both ranges, steps ≥ 1 and draws ≥ 1.
  MovingRange(MovingRangeOptions options) : options_(options) {
    for (const auto& range : {options.from, options.to}) require_in_range(range.lowest, 1, range.highest, "MovingRange: lowest rank");
    require_in_range(options.steps, 1, std::numeric_limits<Index>::max(), "MovingRange: steps");
    require_in_range(options.draws, 1, std::numeric_limits<Index>::max(), "MovingRange: draws");
  }

  MovingRangeOptions::Range range(Index step) const {
    const double progress = std::min(1.0, static_cast<double>(step) / static_cast<double>(options_.steps));
    const auto between = [&](Index from, Index to) {
      return from + static_cast<Index>(std::lround(progress * static_cast<double>(to - from)));
    };
    return {between(options_.from.lowest, options_.to.lowest), between(options_.from.highest, options_.to.highest)};
  }

  StepRanks operator()(Index step, Rng& rng) const {
    const auto now = range(step);
    return FreshRanks(UniformRank(now.lowest, now.highest), options_.draws)(step, rng);
  }

 private:
  MovingRangeOptions options_;
};

/// A plan with the loss of rank b multiplied by weights[b − 1]. Throws std::invalid_argument, naming it, if a weight is not a finite number
/// ≥ 0, and when the plan draws a rank that has none.
template <RankPlan Plan>
class WeightedRanks {
 public:
  WeightedRanks(Plan plan, std::vector<double> weights) : plan_(std::move(plan)), weights_(std::move(weights)) {
    for (const double weight : weights_) {
      require_option(weight >= 0 && std::isfinite(weight), weight, "WeightedRanks: weight", "a finite number ≥ 0");
    }
  }

  StepRanks operator()(Index step, Rng& rng) const {
    StepRanks ranks = plan_(step, rng);
    for (RankShare& part : ranks) {
      require_in_range(part.rank.active, 1, static_cast<Index>(weights_.size()), "WeightedRanks: rank with a weight");
      part.weight *= weights_[static_cast<std::size_t>(part.rank.active - 1)];
    }
    return ranks;
  }

 private:
  Plan plan_;
  std::vector<double> weights_;
};

/// `first` for so many steps, then `second`, which counts its steps from 0. Throws std::invalid_argument if steps < 0.
template <RankPlan First, RankPlan Second>
class Phases {
 public:
  Phases(First first, Index steps, Second second) : first_(std::move(first)), steps_(steps), second_(std::move(second)) {
    require_in_range(steps, 0, std::numeric_limits<Index>::max(), "Phases: steps of the first");
  }

  StepRanks operator()(Index step, Rng& rng) const { return step < steps_ ? first_(step, rng) : second_(step - steps_, rng); }

 private:
  First first_;
  Index steps_;
  Second second_;
};

/// The plan that kept most of what a LoRA trained at each rank gains, at the rank where it kept least (max_rank 8 on a small text model,
/// benchmarks/rank_sweep): for the first quarter of the run all
/// samples at one rank, which grows from 1 to the half of max_rank; then in each step 3/8 of them at max_rank, 1/8 at rank 1, 1/8 at rank 2
/// and the rest at three random ranks between, the loss of rank b with weight b^(−3/4) throughout. Made for the constant scale, and
/// for batches of at least 6 sequences, one for each part of a step:
///
///     Linear<float> layer(W, {.max_rank = 8, .scale = alpha_over_max_rank}, rng);
///     const auto plan = recommended_plan(8, steps);
///     … for each step, as in ranks/groups.hpp, divide_sequences(plan(step, rng), samples)
///
/// Throws std::invalid_argument if max_rank < 1 or steps < 1.
inline auto recommended_plan(Index max_rank, Index steps) {
  require_in_range(max_rank, 1, std::numeric_limits<Index>::max(), "recommended_plan: max_rank");
  require_in_range(steps, 1, std::numeric_limits<Index>::max(), "recommended_plan: steps");
  const Index growing = std::max<Index>(1, steps / 4), second = std::min<Index>(2, max_rank), half = (max_rank + 1) / 2;
  const UniformRank between{std::min<Index>(3, max_rank), std::max(max_rank - 1, std::min<Index>(3, max_rank))};
  std::vector<double> weights;
  for (Index b = 1; b <= max_rank; ++b) weights.push_back(std::pow(static_cast<double>(b), -0.75));
  return WeightedRanks{Phases{MovingRange({.from = {1, 1}, .to = {half, half}, .steps = growing}), growing,
                              MixedRanks({{UniformRank{max_rank, max_rank}, 0.375},
                                          {UniformRank{1, 1}, 0.125},
                                          {UniformRank{second, second}, 0.125},
                                          {between, 0.125},
                                          {between, 0.125},
                                          {between, 0.125}})},
                       weights};
}

}  // namespace dylora

#endif
