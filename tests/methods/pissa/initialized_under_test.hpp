#ifndef DYLORA_TESTS_ADAPTERS_INITIALIZED_UNDER_TEST_HPP
#define DYLORA_TESTS_ADAPTERS_INITIALIZED_UNDER_TEST_HPP

#include "dylora/methods/pissa/initialized.hpp"
#include "support/make.hpp"

namespace dylora::test {

/// Fresh, at factors of which none is zero, and of which fewer components are a prefix.
template <class S>
struct InitializedUnderTest : Initialized<S> {
  InitializedUnderTest(Index in, Index out, const LowRankOptions& options, Rng& rng)
      : InitializedUnderTest(in, out, options, Rng(rng.state() + 1), Rng(rng.state() + 2)) {}

 private:
  InitializedUnderTest(Index in, Index out, const LowRankOptions& options, Rng of_A, Rng of_B)
      : Initialized<S>(random_uniform<S, RowMatrix<S>>(options.max_rank, in, 1, of_A), random_uniform<S>(out, options.max_rank, 1, of_B),
                       options) {}
};

template <class S>
LowRankOptions options_of(As<InitializedUnderTest<S>>, Index /*out*/, Index max_rank) {
  return {.max_rank = max_rank, .alpha = law_alpha};
}

}  // namespace dylora::test

#endif
