#ifndef DYLORA_CORE_MAP_RANKS_HPP
#define DYLORA_CORE_MAP_RANKS_HPP

#include <vector>

#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/sequences.hpp"
#include "dylora/core/types.hpp"

namespace dylora::detail {

/// The ranks of the same columns with f(rank) in the place of each. Neighbouring runs that come to have one rank become one run.
template <class F>
BatchRanks map_ranks(const BatchRanks& ranks, F&& f) {
  std::vector<Index> lengths;
  std::vector<RankSlice> mapped;
  ranks.for_each_run(ranks.columns(), [&](Index, Index count, RankSlice rank) {
    lengths.push_back(count);
    mapped.push_back(f(rank));
  });
  return ranks.columns() == 0 ? BatchRanks(mapped.front()) : BatchRanks::per_sequence(Sequences(lengths), mapped);
}

}  // namespace dylora::detail

#endif
