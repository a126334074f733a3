#ifndef DYLORA_TESTS_ADAPTERS_FLOW_UNDER_TEST_HPP
#define DYLORA_TESTS_ADAPTERS_FLOW_UNDER_TEST_HPP

#include <algorithm>
#include <vector>

#include "dylora/methods/lora_flow/flow.hpp"
#include "support/make.hpp"

namespace dylora::test {

/// Three trained adapters, of different ranks and scales, under a gate that starts with the weights 0: the base, until the gate is trained.
template <class S>
struct FlowUnderTest : Flow<S> {
  using Options = LowRankOptions;

  FlowUnderTest(Index in, Index out, const Options& options, Rng& rng)
      : Flow<S>(trained(in, out, options.max_rank, rng), {.start = {0, 0, 0}}) {}

  static std::vector<LowRank<S>> trained(Index in, Index out, Index max_rank, const Rng& rng) {
    std::vector<LowRank<S>> adapters;
    std::uint64_t seed = rng.state();
    for (const Index rank : {max_rank, std::min<Index>(2, max_rank), max_rank}) {
      Rng of_A(++seed), of_B(++seed);
      adapters.emplace_back(random_uniform<S, RowMatrix<S>>(rank, in, 1, of_A), random_uniform<S>(out, rank, 1, of_B),
                            LowRankOptions{.alpha = 1.0 + static_cast<double>(adapters.size()),
                                           .scale = adapters.empty() ? alpha_over_sqrt_rank : alpha_over_rank});
    }
    return adapters;
  }
};

template <class S>
LowRankOptions options_of(As<FlowUnderTest<S>>, Index /*out*/, Index max_rank) {
  return {.max_rank = max_rank};
}

}  // namespace dylora::test

#endif
