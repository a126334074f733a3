#include "dylora/methods/chain/stages.hpp"

#include <limits>
#include <vector>

#include "dylora/train/schedule.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

/// The steps of a run after which a stage ends.
template <Stages T>
std::vector<Index> ends(const T& stages, Index steps) {
  std::vector<Index> result;
  for (Index step = 0; step < steps; ++step) {
    if (stages.ends_after(step)) result.push_back(step);
  }
  return result;
}

}  // namespace

TEST_CASE("a stage ends after every interval") {
  CHECK(ends(EveryInterval(4), 13) == std::vector<Index>{3, 7, 11});
  CHECK(ends(EveryInterval(1), 3) == std::vector<Index>{0, 1, 2});
  CHECK(ends(EveryInterval(std::numeric_limits<Index>::max()), 1000).empty());
}

TEST_CASE("a chain of stages ends between them and not after the last") {
  CHECK(ends(StageLengths({3, 1, 2}), 20) == std::vector<Index>{2, 3});
  CHECK(ends(StageLengths({5}), 20).empty());
  CHECK(ends(StageLengths::equal(3, 9), 9) == std::vector<Index>{2, 5});
  CHECK(ends(StageLengths::equal(3, 11), 11) == std::vector<Index>{3, 7});  // 4, 4 and 3 steps
  CHECK(ends(StageLengths::equal(1, 9), 9).empty());
}

TEST_CASE("a step's stage and its place in it follow the stages' ends") {
  const auto shown = [](const auto& stages) {
    Index stage = 0, local = 0;
    for (Index step = 0; step < 12; ++step) {
      CHECK(stages.index(step) == stage);
      CHECK(stages.local_step(step) == local);
      ++local;
      if (stages.ends_after(step)) {
        ++stage;
        local = 0;
      }
    }
  };
  shown(EveryInterval(1));
  shown(EveryInterval(5));
  shown(StageLengths({3, 1, 2}));
  shown(StageLengths::equal(5, 12));
}

TEST_CASE("a schedule of local steps begins anew with each stage") {
  const StageLengths stages = StageLengths::equal(3, 30);
  const Schedule schedule(Decay::linear, {.peak = 1, .steps = 10});
  for (Index step = 0; step < 30; ++step) CHECK(schedule(stages.local_step(step)) == schedule(step % 10));
  CHECK(schedule(stages.local_step(20)) == 1);
}

TEST_CASE("stages without steps are refused") {
  CHECK_THROWS_SAYING(std::invalid_argument, EveryInterval(0), "EveryInterval: interval", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, StageLengths(std::vector<Index>{}), "StageLengths", "at least one stage", "got none");
  CHECK_THROWS_SAYING(std::invalid_argument, StageLengths({3, 0}), "StageLengths: steps of a stage", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, StageLengths({3, std::numeric_limits<Index>::max()}), "StageLengths: steps of a stage");
  CHECK_THROWS_SAYING(std::invalid_argument, StageLengths::equal(0, 3), "StageLengths: stages", "[1, 3]", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, StageLengths::equal(4, 3), "StageLengths: stages", "[1, 3]", "got 4");
}

}  // namespace dylora::test
