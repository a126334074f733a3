#ifndef DYLORA_TESTS_ADAPTERS_INITIALIZED_UNDER_TEST_HPP
#define DYLORA_TESTS_ADAPTERS_INITIALIZED_UNDER_TEST_HPP

#include "dylora/methods/pissa/offset_low_rank.hpp"
#include "support/make.hpp"

namespace dylora::test {

/// Fresh, at factors of which none is zero, and of which fewer components are a prefix.
template <class S>
struct OffsetLowRankUnderTest : OffsetLowRank<S> {
  OffsetLowRankUnderTest(Index in, Index out, const LowRankOptions& options, Rng& rng)
      : OffsetLowRankUnderTest(in, out, options, Rng(rng.state() + 1), Rng(rng.state() + 2)) {}

 private:
  OffsetLowRankUnderTest(Index in, Index out, const LowRankOptions& options, Rng of_A, Rng of_B)
      : OffsetLowRank<S>(random_uniform<S, RowMatrix<S>>(options.max_rank, in, 1, of_A), random_uniform<S>(out, options.max_rank, 1, of_B),
                         options) {}
};

template <class S>
LowRankOptions options_of(As<OffsetLowRankUnderTest<S>>, Index /*out*/, Index max_rank) {
  return {.max_rank = max_rank, .alpha = law_alpha};
}

}  // namespace dylora::test

#endif
