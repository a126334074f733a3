#include "dylora/core/batch_ranks.hpp"

#include <span>
#include <vector>

#include "support/catch.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

struct Run {
  Index begin, count;
  RankSlice rank;
  bool operator==(const Run&) const = default;
};

std::vector<Run> runs(const BatchRanks& ranks, Index columns) {
  std::vector<Run> result;
  ranks.for_each_run(columns, [&](Index begin, Index count, RankSlice rank) { result.push_back({begin, count, rank}); });
  return result;
}

constexpr RankSlice none = RankSlice::none();

}  // namespace

TEST_CASE("one rank is for any number of columns") {
  for (const BatchRanks& ranks : {BatchRanks(4, 3), BatchRanks(RankSlice{4, 3}), BatchRanks{4, 3}}) {
    CHECK(ranks.columns() == 0);
    CHECK(ranks.highest() == 4);
    for (const Index columns : {1, 7, 1000}) CHECK(runs(ranks, columns) == std::vector<Run>{{0, columns, {4, 3}}});
  }
  CHECK(runs(4, 2) == std::vector<Run>{{0, 2, 4}});
  CHECK(runs(none, 2) == std::vector<Run>{{0, 2, none}});
  CHECK(BatchRanks(none).highest() == 0);
}

TEST_CASE("a rank per sample is a run for each change of rank") {
  const BatchRanks ranks = BatchRanks::per_sample({8, 8, 2, none, none, {8, 3}, 8});
  CHECK(ranks.columns() == 7);
  CHECK(ranks.highest() == 8);
  CHECK(runs(ranks, 7) == std::vector<Run>{{0, 2, 8}, {2, 1, 2}, {3, 2, none}, {5, 1, {8, 3}}, {6, 1, 8}});

  const std::vector<RankSlice> slices{1, 5, 2};
  CHECK(runs(BatchRanks::per_sample(slices), 3) == std::vector<Run>{{0, 1, 1}, {1, 1, 5}, {2, 1, 2}});
  CHECK(BatchRanks::per_sample(slices).highest() == 5);
  CHECK(BatchRanks::per_sample({none, none}).highest() == 0);
  CHECK(runs(BatchRanks::per_sample({3}), 1) == std::vector<Run>{{0, 1, 3}});
}

TEST_CASE("a rank per sequence is that of all its tokens and neighbours of equal rank are one run") {
  const Sequences sequences({3, 1, 4, 2});
  const BatchRanks ranks = BatchRanks::per_sequence(sequences, {8, 8, none, {4, 3}});
  CHECK(ranks.columns() == 10);
  CHECK(runs(ranks, 10) == std::vector<Run>{{0, 4, 8}, {4, 4, none}, {8, 2, {4, 3}}});
  const std::vector<RankSlice> slices{1, 5, 1, 5};
  CHECK(runs(BatchRanks::per_sequence(sequences, slices), 10) == std::vector<Run>{{0, 3, 1}, {3, 1, 5}, {4, 4, 1}, {8, 2, 5}});
}

TEST_CASE("ranks are cut to the largest that there is") {
  CHECK(BatchRanks(5, 4).at_most(3) == BatchRanks(3, 3));
  CHECK(BatchRanks(2).at_most(3) == BatchRanks(2));
  CHECK(BatchRanks(5).at_most(0) == BatchRanks(none));

  const BatchRanks ranks = BatchRanks::per_sample({5, 1, none, {4, 2}});
  CHECK(ranks.at_most(5) == ranks);
  CHECK(ranks.at_most(3) == BatchRanks::per_sample({3, 1, none, {3, 2}}));
  CHECK(ranks.at_most(3).highest() == 3);
  CHECK(ranks.at_most(3).columns() == 4);
  CHECK(ranks.at_most(0).highest() == 0);
  CHECK(ranks.at_most(0).columns() == 4);
  // Runs that come to the same rank stay apart: gradients are summed run after run, whatever an adapter has of their ranks.
  CHECK(runs(BatchRanks::per_sample({5, 4, 4, 1}).at_most(2), 4) == std::vector<Run>{{0, 1, 2}, {1, 2, 2}, {3, 1, 1}});
}

TEST_CASE("ranks are equal where every column has the same and they are for the same number of columns") {
  CHECK(BatchRanks::per_sample({5, 5, 1}) == BatchRanks::per_sequence(Sequences({2, 1}), {5, 1}));
  CHECK_FALSE(BatchRanks::per_sample({5, 5, 1}) == BatchRanks::per_sample({5, 1, 1}));
  CHECK_FALSE(BatchRanks::per_sample({5, 1}) == BatchRanks::per_sample({5, 1, 1}));
  CHECK_FALSE(BatchRanks::per_sample({5, 1}) == BatchRanks::per_sample({5, {1, 1}}));
  CHECK_FALSE(BatchRanks::per_sample({5, 5}) == BatchRanks(5));
  CHECK(BatchRanks(5) == BatchRanks(RankSlice{5, 0}));
  CHECK_FALSE(BatchRanks(5) == BatchRanks(5, 1));
}

TEST_CASE("a batch refuses to have no ranks or another number of them than sequences") {
  const Sequences sequences({3, 1, 4});
  CHECK_THROWS_SAYING(ShapeError, BatchRanks::per_sample({}), "BatchRanks: ranks", "at least one", "empty batch");
  CHECK_THROWS_SAYING(ShapeError, BatchRanks::per_sample(std::span<const RankSlice>()), "BatchRanks: ranks", "empty batch");
  CHECK_THROWS_SAYING(ShapeError, BatchRanks::per_sequence(sequences, {}), "BatchRanks: ranks", "empty batch");
  CHECK_THROWS_SAYING(ShapeError, BatchRanks::per_sequence(Sequences(), {}), "BatchRanks: ranks", "empty batch");
  CHECK_THROWS_SAYING(ShapeError, BatchRanks::per_sequence(sequences, {1, 2}), "BatchRanks: number of ranks", "sequences", "expected 3",
                      "got 2");
  CHECK_THROWS_SAYING(ShapeError, BatchRanks::per_sequence(sequences, {1, 2, 3, 4}), "BatchRanks: number of ranks", "expected 3", "got 4");
  CHECK_THROWS_SAYING(ShapeError, BatchRanks::per_sequence(Sequences(), {1}), "BatchRanks: number of ranks", "expected 0", "got 1");
}

TEST_CASE("a rank of 0 is refused in a batch as anywhere") {
  CHECK_THROWS_SAYING(std::invalid_argument, BatchRanks(0), "rank", "at least 1", "none()", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, BatchRanks(-2), "rank", "at least 1", "got -2");
  CHECK_THROWS_SAYING(std::invalid_argument, BatchRanks(3, 4), "trainable_from", "[0, 3]", "got 4");
  CHECK_THROWS_SAYING(std::invalid_argument, BatchRanks::per_sample({2, 0}), "rank", "at least 1", "got 0");
}

TEST_CASE("ranks are held to the largest rank and to the number of columns") {
  const BatchRanks ranks = BatchRanks::per_sample({1, 6, none});
  CHECK_NOTHROW(require_ranks(ranks, 3, 6, "layer"));
  CHECK_NOTHROW(require_ranks(ranks, 3, 0, "layer"));  // no adapter: any rank
  CHECK_NOTHROW(require_ranks(6, 1000, 6, "layer"));
  CHECK_NOTHROW(require_ranks(none, 1000, 6, "layer"));
  CHECK_THROWS_SAYING(std::invalid_argument, require_ranks(ranks, 3, 5, "layer"), "layer: rank", "at most max_rank = 5", "got 6");
  CHECK_THROWS_SAYING(std::invalid_argument, require_ranks(6, 3, 5, "layer"), "layer: rank", "at most max_rank = 5", "got 6");
  CHECK_THROWS_SAYING(ShapeError, require_ranks(ranks, 4, 6, "layer"), "layer: columns that the ranks are for", "expected 4", "got 3");
  CHECK_THROWS_SAYING(ShapeError, require_ranks(ranks, 2, 0, "layer"), "layer: columns that the ranks are for", "expected 2", "got 3");
}

}  // namespace dylora::test
