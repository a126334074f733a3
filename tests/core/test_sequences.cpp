#include "dylora/core/sequences.hpp"

#include <vector>

#include "support/catch.hpp"
#include "support/throws.hpp"

namespace dylora::test {

TEST_CASE("sequences lie end to end") {
  const Sequences sequences({3, 1, 4});
  CHECK(sequences.count() == 3);
  CHECK(sequences.tokens() == 8);
  CHECK(sequences.begin(0) == 0);
  CHECK(sequences.begin(1) == 3);
  CHECK(sequences.begin(2) == 4);
  CHECK(sequences.length(0) == 3);
  CHECK(sequences.length(1) == 1);
  CHECK(sequences.length(2) == 4);
}

TEST_CASE("equal sequences are sequences of one length") {
  CHECK(Sequences::equal(3, 5) == Sequences({5, 5, 5}));
  CHECK_FALSE(Sequences::equal(3, 5) == Sequences({5, 5, 4}));
}

TEST_CASE("without sequences there is no token") {
  CHECK(Sequences().count() == 0);
  CHECK(Sequences().tokens() == 0);
}

TEST_CASE("sequences refuse an empty batch and a sequence without a token") {
  CHECK_THROWS_SAYING(ShapeError, Sequences(std::vector<Index>{}), "Sequences", "at least one sequence", "empty batch");
  CHECK_THROWS_SAYING(ShapeError, Sequences({3, 0, 4}), "Sequences", "length of sequence 1", "at least 1 token", "got 0");
  CHECK_THROWS_SAYING(ShapeError, Sequences({-2}), "Sequences", "length of sequence 0", "got -2");
  CHECK_THROWS_SAYING(ShapeError, Sequences::equal(0, 5), "Sequences", "at least one sequence", "got 0");
  CHECK_THROWS_SAYING(ShapeError, Sequences::equal(-1, 5), "Sequences", "at least one sequence", "got -1");
  CHECK_THROWS_SAYING(ShapeError, Sequences::equal(2, 0), "Sequences", "length of sequence 0", "got 0");
}

}  // namespace dylora::test
