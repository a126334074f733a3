#ifndef DYLORA_RANKS_GROUPS_HPP
#define DYLORA_RANKS_GROUPS_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <vector>

#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/sequences.hpp"
#include "dylora/core/types.hpp"
#include "dylora/ranks/plan.hpp"

/// The parts of a step as groups of sequences of one batch: one forward, one backward, every sequence at the rank of its group.
///
///     const std::vector<RankGroup> groups = divide_sequences(plan(step, rng), sequences.count());
///     model.forward(x, sequences, batch_ranks(groups, sequences), cache, y);
///     const double loss = weighted_loss(groups, sequences, [&](Index begin, Index count, double weight) {
///       return mse<float>(y.middleCols(begin, count), target.middleCols(begin, count), dy.middleCols(begin, count), weight);
///     });
///     model.backward(dy, cache, gradients, dx);
///
/// Where there are no sequences, each sample is one of its own: Sequences::equal(samples, 1).
namespace dylora {

/// A run of sequences of one batch that share a rank.
struct RankGroup {
  RankSlice rank;
  Index first, count;  ///< sequences [first, first + count)
  double weight;       ///< of the group's mean loss in the loss of the step

  bool operator==(const RankGroup&) const = default;
};

/// Gives each part of a step its share of `sequences`, the highest rank first, parts of the same rank as one group: every part at least one
/// sequence, then by its share, what is left over to the largest remainders. A part of weight 0 takes part and trains nothing. Throws
/// std::invalid_argument if there are more parts than sequences, a share is not a number in (0, 1] or a weight not a finite one ≥ 0.
inline std::vector<RankGroup> divide_sequences(const StepRanks& ranks, Index sequences) {
  StepRanks parts;
  for (const RankShare& part : ranks) {
    require_option(part.share > 0 && part.share <= 1, part.share, "divide_sequences: share", "a number in (0, 1]");
    require_option(part.weight >= 0 && std::isfinite(part.weight), part.weight, "divide_sequences: weight", "a finite number ≥ 0");
    const auto same = std::find_if(parts.begin(), parts.end(), [&](const RankShare& other) { return other.rank == part.rank; });
    if (same == parts.end()) {
      parts.push_back(part);
    } else {
      same->share += part.share;
      same->weight += part.weight;
    }
  }
  require_in_range(static_cast<Index>(parts.size()), 1, sequences, "divide_sequences: parts of a step, against its sequences");
  std::stable_sort(parts.begin(), parts.end(), [](const RankShare& a, const RankShare& b) { return a.rank.active > b.rank.active; });

  double total = 0;
  for (const RankShare& part : parts) total += part.share;
  std::vector<RankGroup> groups;
  std::vector<double> wanted;
  Index left = sequences;
  for (const RankShare& part : parts) {
    wanted.push_back(part.share / total * static_cast<double>(sequences));
    const Index count = std::max<Index>(1, static_cast<Index>(wanted.back()));
    const bool idle = part.weight == 0 && part.rank.active > 0;
    const RankSlice rank = idle ? RankSlice(part.rank.active, part.rank.active) : part.rank;
    groups.push_back({rank, 0, count, part.weight});
    left -= count;
  }
  for (; left != 0; left += left > 0 ? -1 : 1) {  // the group that is furthest from what it should have
    std::size_t chosen = groups.size();
    const auto lacks = [&](std::size_t i) { return wanted[i] - static_cast<double>(groups[i].count); };
    for (std::size_t i = 0; i < groups.size(); ++i) {
      if (left < 0 && groups[i].count == 1) continue;
      if (chosen == groups.size() || (left > 0 ? lacks(i) > lacks(chosen) : lacks(i) < lacks(chosen))) chosen = i;
    }
    groups[chosen].count += left > 0 ? 1 : -1;
  }
  for (std::size_t i = 1; i < groups.size(); ++i) groups[i].first = groups[i - 1].first + groups[i - 1].count;
  return groups;
}

/// The ranks of a batch divided so. Throws ShapeError unless the groups cover the sequences.
inline BatchRanks batch_ranks(const std::vector<RankGroup>& groups, const Sequences& sequences) {
  std::vector<RankSlice> ranks;
  for (const RankGroup& group : groups) ranks.insert(ranks.end(), static_cast<std::size_t>(group.count), group.rank);
  return BatchRanks::per_sequence(sequences, ranks);
}

/// Σ weight · loss / Σ weight over the groups, where loss(begin, count, weight) gives the mean loss of so many columns from `begin` on and
/// scales its gradient by the weight. Throws std::invalid_argument if all weights are 0, ShapeError unless the groups cover the sequences.
template <class GroupLoss>
  requires std::invocable<GroupLoss&, Index, Index, double>
double weighted_loss(const std::vector<RankGroup>& groups, const Sequences& sequences, GroupLoss&& loss) {
  require_samples(static_cast<Index>(groups.size()), "weighted_loss: groups");
  require_equal(groups.back().first + groups.back().count, sequences.count(), "weighted_loss: sequences in the groups");
  double sum = 0, weights = 0;
  for (const RankGroup& group : groups) {
    const Index begin = sequences.begin(group.first), end = sequences.begin(group.first + group.count);
    sum += group.weight * loss(begin, end - begin, group.weight);
    weights += group.weight;
  }
  require_option(weights > 0, weights, "weighted_loss: sum of the weights", "a number > 0");
  return sum / weights;
}

}  // namespace dylora

#endif
