#ifndef DYLORA_CORE_BATCH_RANKS_HPP
#define DYLORA_CORE_BATCH_RANKS_HPP

#include <algorithm>
#include <initializer_list>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/sequences.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

/// Neighbouring columns at one rank.
struct RankRun {
  Index begin, count;
  RankSlice rank;

  bool operator==(const RankRun&) const = default;
};

/// The ranks of a batch: one for every column, or one for each run of neighbouring columns.
///
///     layer.forward(x, 4)                                                                  all of x at rank 4
///     layer.forward(x, BatchRanks::per_sample({8, 8, 2, RankSlice::none()}))               a rank, or none, for each column
///     attention.forward(x, sequences, BatchRanks::per_sequence(sequences, {8, 1, 4}))      a rank for each sequence
///
/// Each column is computed exactly as if its run were alone: outputs, and the sums of gradients in the order of the runs, are equal bit for
/// bit. The frozen weight meets the whole batch at once; the adapter costs a product per run, so let equal ranks be neighbours.
class BatchRanks {
 public:
  class Runs;

  BatchRanks(RankSlice rank) : everywhere_(rank) {}
  /// As RankSlice. Throws std::invalid_argument unless 0 ≤ trainable_from ≤ active and active ≥ 1.
  BatchRanks(Index active, Index trainable_from = 0) : everywhere_(active, trainable_from) {}

  /// A rank for each column. Throws ShapeError if there is none.
  static BatchRanks per_sample(std::span<const RankSlice> ranks) {
    require_samples(static_cast<Index>(ranks.size()), "BatchRanks: ranks");
    BatchRanks result(RankSlice::none());
    for (const RankSlice rank : ranks) result.append(1, rank);
    return result;
  }
  static BatchRanks per_sample(std::initializer_list<RankSlice> ranks) { return per_sample(std::span(ranks.begin(), ranks.size())); }

  /// A rank for each sequence. Throws ShapeError unless there are as many ranks as sequences, and at least one.
  static BatchRanks per_sequence(const Sequences& sequences, std::span<const RankSlice> ranks) {
    require_samples(static_cast<Index>(ranks.size()), "BatchRanks: ranks");
    require_equal(static_cast<Index>(ranks.size()), sequences.count(), "BatchRanks: number of ranks, against the sequences");
    BatchRanks result(RankSlice::none());
    for (Index s = 0; s < sequences.count(); ++s) result.append(sequences.length(s), ranks[static_cast<std::size_t>(s)]);
    return result;
  }
  static BatchRanks per_sequence(const Sequences& sequences, std::initializer_list<RankSlice> ranks) {
    return per_sequence(sequences, std::span(ranks.begin(), ranks.size()));
  }

  /// The number of columns that these ranks are for; 0 if it is one rank for any number of them.
  Index columns() const { return runs_.empty() ? 0 : runs_.back().begin + runs_.back().count; }

  /// The largest rank of any column.
  Index highest() const {
    Index highest = everywhere_.active;
    for (const RankRun& run : runs_) highest = std::max(highest, run.rank.active);
    return highest;
  }

  /// The same, with no column above max_rank.
  BatchRanks at_most(Index max_rank) const {
    BatchRanks result = *this;
    result.everywhere_ = everywhere_.at_most(max_rank);
    for (RankRun& run : result.runs_) run.rank = run.rank.at_most(max_rank);
    return result;
  }

  /// The runs of a batch of `columns`, which must be columns() where that is not 0: for (const RankRun& run : ranks.runs(n)). They are
  /// those of these ranks, which must outlive them.
  Runs runs(Index columns) const&;
  Runs runs(Index columns) const&& = delete;

  /// Calls f(begin, count, rank) for each of them.
  template <class F>
  void for_each_run(Index columns, F&& f) const;

  bool operator==(const BatchRanks&) const = default;

 private:
  void append(Index count, RankSlice rank) {
    if (!runs_.empty() && runs_.back().rank == rank) {
      runs_.back().count += count;
    } else {
      runs_.push_back({columns(), count, rank});
    }
  }

  RankSlice everywhere_;       // where there are no runs
  std::vector<RankRun> runs_;  // neighbours differ, except where at_most made them alike: merged, their gradients would have other bits
};

class BatchRanks::Runs {
 public:
  Runs(const std::vector<RankRun>& runs, RankRun all) : runs_(runs), all_(all) {}

  const RankRun* begin() const { return runs_.empty() ? &all_ : runs_.data(); }
  const RankRun* end() const { return begin() + size(); }
  Index size() const { return runs_.empty() ? 1 : static_cast<Index>(runs_.size()); }

 private:
  std::span<const RankRun> runs_;
  RankRun all_;  // where one rank is for all columns
};

inline BatchRanks::Runs BatchRanks::runs(Index columns) const& { return {runs_, {0, columns, everywhere_}}; }

template <class F>
void BatchRanks::for_each_run(Index columns, F&& f) const {
  for (const RankRun& run : runs(columns)) f(run.begin, run.count, run.rank);
}

/// Throws std::invalid_argument if a rank is above max_rank, where 0 means that there is no adapter and any rank will do, and ShapeError if
/// the ranks are for another number of columns.
inline void require_ranks(const BatchRanks& ranks, Index columns, Index max_rank, std::string_view what) {
  if (max_rank > 0 && ranks.highest() > max_rank) {
    throw std::invalid_argument(std::string(what) + ": rank: expected at most max_rank = " + std::to_string(max_rank) + ", got " +
                                std::to_string(ranks.highest()));
  }
  if (ranks.columns() != 0) require_equal(ranks.columns(), columns, std::string(what) + ": columns that the ranks are for");
}

}  // namespace dylora

#endif
