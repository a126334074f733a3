#include "dylora/core/rank_slice.hpp"

#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/throws.hpp"

namespace dylora::test {

TEST_CASE("a rank by itself is nested and trains all of its components") {
  const RankSlice rank = 4;
  CHECK(rank.active == 4);
  CHECK(rank.trainable_from == 0);
  CHECK(rank.trainable() == 4);
  CHECK(rank == RankSlice{4, 0});
  CHECK_FALSE(rank == RankSlice{4, 3});
}

TEST_CASE("a frozen slice trains what lies above its prefix") {
  CHECK(RankSlice{4, 3}.trainable() == 1);
  CHECK(RankSlice{6, 4}.trainable() == 2);
}

TEST_CASE("no component is a slice of its own") {
  CHECK(RankSlice::none().active == 0);
  CHECK(RankSlice::none().trainable() == 0);
}

TEST_CASE("a slice whose prefix is all of it takes part and learns nothing") {
  const RankSlice rank{4, 4};
  CHECK(rank.active == 4);
  CHECK(rank.trainable() == 0);
  CHECK_FALSE(rank == RankSlice{4});
  CHECK_FALSE(rank == RankSlice::none());
}

TEST_CASE("a slice is cut to the components that there are") {
  STATIC_REQUIRE(RankSlice{2}.at_most(3) == RankSlice{2});
  STATIC_REQUIRE(RankSlice{3, 2}.at_most(3) == RankSlice{3, 2});
  STATIC_REQUIRE(RankSlice{5}.at_most(3) == RankSlice{3});
  STATIC_REQUIRE(RankSlice{5, 2}.at_most(3) == RankSlice{3, 2});
  STATIC_REQUIRE(RankSlice{5, 3}.at_most(3) == RankSlice{3, 3});  // what it trains is cut off
  STATIC_REQUIRE(RankSlice{5, 4}.at_most(3) == RankSlice{3, 3});
  STATIC_REQUIRE(RankSlice{5, 5}.at_most(3) == RankSlice{3, 3});
  STATIC_REQUIRE(RankSlice{5, 4}.at_most(0) == RankSlice::none());
  STATIC_REQUIRE(RankSlice::none().at_most(3) == RankSlice::none());
  STATIC_REQUIRE(RankSlice::none().at_most(0) == RankSlice::none());
}

TEST_CASE("a slice refuses ranks below 1 and prefixes outside of it") {
  CHECK_THROWS_SAYING(std::invalid_argument, RankSlice(0), "rank", "at least 1", "none()", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, RankSlice(-3), "rank", "at least 1", "got -3");
  CHECK_THROWS_SAYING(std::invalid_argument, RankSlice(4, 5), "trainable_from", "[0, 4]", "got 5");
  CHECK_THROWS_SAYING(std::invalid_argument, RankSlice(4, -1), "trainable_from", "[0, 4]", "got -1");
}

TEST_CASE("a component set holds what was inserted and gives it back in runs") {
  ComponentSet set(8);
  CHECK(set.empty());
  const auto runs = [&] {
    std::vector<std::pair<Index, Index>> result;
    set.for_each_range([&](Index begin, Index end) { result.emplace_back(begin, end); });
    return result;
  };
  using Runs = std::vector<std::pair<Index, Index>>;
  CHECK(runs().empty());
  set.insert({3, 1});
  CHECK(runs() == Runs{{1, 3}});
  set.insert(RankSlice::none());
  CHECK(runs() == Runs{{1, 3}});
  set.insert({6, 6});  // takes part, learns nothing
  CHECK(runs() == Runs{{1, 3}});
  set.insert({8, 7});
  CHECK(runs() == Runs{{1, 3}, {7, 8}});
  set.insert(3, 5);
  CHECK(runs() == Runs{{1, 5}, {7, 8}});
  CHECK(set.contains(4));
  CHECK_FALSE(set.contains(5));
  CHECK_FALSE(set.empty());

  ComponentSet other(8);
  other.insert({6, 5});
  set.insert(other);
  CHECK(runs() == Runs{{1, 6}, {7, 8}});
  set.insert(6);
  CHECK(runs() == Runs{{0, 6}, {7, 8}});
  set.insert(8);
  CHECK(runs() == Runs{{0, 8}});
  set.clear();
  CHECK(set.empty());
  CHECK(set.size() == 8);
  CHECK(ComponentSet().size() == 0);
}

TEST_CASE("a component set refuses components that it does not have") {
  ComponentSet set(4);
  CHECK_THROWS_SAYING(ShapeError, set.insert(2, 5), "[0, 4)", "got [2, 5)");
  CHECK_THROWS_SAYING(ShapeError, set.insert(-1, 2), "[0, 4)", "got [-1, 2)");
  CHECK_THROWS_SAYING(ShapeError, set.insert(ComponentSet(3)), "expected 4", "got 3");
  CHECK(set.empty());
}

}  // namespace dylora::test
