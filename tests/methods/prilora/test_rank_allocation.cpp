#include "dylora/methods/prilora/rank_allocation.hpp"

#include <numeric>
#include <vector>

#include "support/catch.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

Index sum(const std::vector<Index>& ranks) { return std::accumulate(ranks.begin(), ranks.end(), Index{0}); }

}  // namespace

TEST_CASE("oracle of PRILoRA: the ranks of all layers add up to the average of the ends and the ends are exact") {
  CHECK(linear_ranks(4, 12, 12) == std::vector<Index>{4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12});
  CHECK(sum(linear_ranks(4, 12, 12)) == 12 * 8);
  for (Index first = 0; first < 9; ++first) {
    for (Index last = 0; last < 9; ++last) {
      for (Index layers = 2; layers < 14; ++layers) {
        const std::vector<Index> ranks = linear_ranks(first, last, layers);
        CHECK(static_cast<Index>(ranks.size()) == layers);
        CHECK(ranks.front() == first);
        CHECK(ranks.back() == last);
        const Index twice = layers * (first + last), lost = 2 * sum(ranks) - twice;
        CHECK(lost * lost == twice % 2);  // half a rank where the sum is no integer
      }
    }
  }
}

TEST_CASE("linear ranks are within a half of the line and never turn back") {
  for (const auto& [first, last] : {std::pair<Index, Index>{4, 12}, {1, 2}, {0, 31}, {9, 2}, {3, 3}}) {
    for (const Index layers : {2, 3, 4, 7, 12, 33}) {
      const std::vector<Index> ranks = linear_ranks(first, last, layers);
      for (Index l = 0; l < layers; ++l) {
        const Index exact = first * (layers - 1) + (last - first) * l;  // times layers − 1
        const Index error = ranks[static_cast<std::size_t>(l)] * (layers - 1) - exact;
        CHECK(2 * std::abs(error) <= layers - 1);
        if (l > 0) CHECK((ranks[static_cast<std::size_t>(l)] - ranks[static_cast<std::size_t>(l - 1)]) * (last - first) >= 0);
      }
    }
  }
  const std::vector<Index> up = linear_ranks(2, 9, 7), down = linear_ranks(9, 2, 7);
  CHECK(linear_ranks(1, 2, 5) == std::vector<Index>{1, 1, 1, 2, 2});  // the middle is a half
  CHECK(sum(up) + sum(down) <= 7 * 11 + 1);
}

TEST_CASE("ranks and layers out of range are refused") {
  CHECK_THROWS_SAYING(std::invalid_argument, linear_ranks(-1, 4, 3), "linear_ranks: first", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, linear_ranks(1, -4, 3), "linear_ranks: last", "got -4");
  CHECK_THROWS_SAYING(std::invalid_argument, linear_ranks(1, 4, 1), "linear_ranks: layers", "got 1");
}

}  // namespace dylora::test
