#ifndef DYLORA_TESTS_SUPPORT_LAW_HPP
#define DYLORA_TESTS_SUPPORT_LAW_HPP

#include <cstdio>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "dylora/core/rank_slice.hpp"
#include "support/catch.hpp"

namespace dylora::test {

/// Counts what the laws were shown on, and says so when the program ends: "laws: 14, cases: 212".
class LawCount {
 public:
  /// The law is the test case that runs; over a list of types it is one law.
  static void add_case() {
    const std::string name(Catch::getResultCapture().getCurrentTestName());
    ++instance().cases_[name.substr(0, name.find(" - "))];
  }

 private:
  LawCount() = default;
  LawCount(const LawCount&) = delete;
  LawCount& operator=(const LawCount&) = delete;
  ~LawCount() {
    long cases = 0;
    for (const auto& [law, count] : cases_) cases += count;
    if (cases > 0) std::fprintf(stderr, "laws: %zu, cases: %ld\n", cases_.size(), cases);
  }

  static LawCount& instance() {
    static LawCount count;
    return count;
  }

  std::map<std::string, long> cases_;
};

/// What the laws are shown on: a type over a scalar, and the same over the other one.
template <class S, template <class> class Family>
struct Of {
  using Scalar = S;
  using Type = Family<S>;
  using InDouble = Of<double, Family>;
};

template <template <class> class... Family>
using InFloatAndDouble = std::tuple<Of<float, Family>..., Of<double, Family>...>;

/// The largest rank in the laws, and the slices that they are shown at: nested at 1, the middle and the largest, frozen prefixes, a block.
inline constexpr Index law_rank = 5;
inline const std::vector<RankSlice>& law_slices() {
  static const std::vector<RankSlice> slices{1, 3, 5, {3, 2}, {5, 4}, {4, 2}};
  return slices;
}

/// Ranks for the samples of a case, or of its sequences, one each.
inline const std::vector<std::vector<RankSlice>>& law_mixes() {
  static const std::vector<std::vector<RankSlice>> mixes{
      {5, 5, 1, RankSlice::none(), {3, 2}}, {RankSlice::none(), {4, 4}, 2, {5, 3}, {5, 1}}, {5, 4, 1, 2, 3}, {3, 3, 3, 3, 3}};
  return mixes;
}

inline std::string describe(RankSlice rank) {
  return "rank " + std::to_string(rank.active) + ", trainable from " + std::to_string(rank.trainable_from);
}

}  // namespace dylora::test

#endif
