#include "dylora/ranks/scale.hpp"

#include <cmath>

#include "support/catch.hpp"

namespace dylora::test {

TEST_CASE("the paper's scale is alpha over the active rank exactly") {
  for (const double alpha : {1.0, 3.0, 16.0}) {
    for (Index b = 1; b <= 64; ++b) CHECK(alpha_over_rank(alpha, b, 64) == alpha / static_cast<double>(b));
  }
  CHECK(alpha_over_rank(16, 8, 8) == 2);
  CHECK(alpha_over_rank(16, 1, 8) == 16);
}

TEST_CASE("the rank-stabilised scale is alpha over the root of the active rank") {
  CHECK(alpha_over_sqrt_rank(16, 1, 8) == 16);
  CHECK(alpha_over_sqrt_rank(16, 4, 8) == 8);
  CHECK(alpha_over_sqrt_rank(3, 2, 8) == 3 / std::sqrt(2.0));
}

TEST_CASE("the constant scale is alpha over the largest rank at every rank") {
  for (Index b = 1; b <= 8; ++b) CHECK(alpha_over_max_rank(16, b, 8) == 2);
}

TEST_CASE("a rule can be told from the others") {
  const ScaleRule rule = alpha_over_sqrt_rank;
  CHECK(rule == alpha_over_sqrt_rank);
  CHECK(rule != alpha_over_rank);
}

}  // namespace dylora::test
