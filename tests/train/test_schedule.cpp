#include "dylora/train/schedule.hpp"

#include <cmath>
#include <limits>

#include "support/catch.hpp"
#include "support/throws.hpp"

namespace dylora::test {

TEST_CASE("the warm-up rises linearly to the peak whatever follows") {
  for (const Decay decay : {Decay::constant, Decay::linear, Decay::cosine}) {
    const Schedule schedule(decay, {.peak = 2, .steps = 20, .warmup_steps = 4});
    CHECK(schedule(0) == 0.5);
    CHECK(schedule(1) == 1);
    CHECK(schedule(3) == 2);
    CHECK(schedule(4) == 2);
  }
}

TEST_CASE("a constant schedule stays at its peak") {
  const Schedule schedule(Decay::constant, {.peak = 2, .steps = 20});
  for (const Index step : {0, 10, 19, 20, 1000}) CHECK(schedule(step) == 2);
}

TEST_CASE("a linear schedule falls along a line to its final rate") {
  const Schedule schedule(Decay::linear, {.peak = 2, .steps = 20, .warmup_steps = 4, .final_fraction = 0.25});
  CHECK(schedule(4) == 2);
  CHECK(schedule(8) == Approx(2 - 0.25 * 1.5).epsilon(1e-15));
  CHECK(schedule(12) == Approx(1.25).epsilon(1e-15));
  CHECK(schedule(20) == 0.5);
  CHECK(schedule(1000) == 0.5);
  CHECK(Schedule(Decay::linear, {.peak = 2, .steps = 20})(20) == 0);
}

TEST_CASE("a cosine schedule falls along half a cosine to its final rate") {
  const Schedule schedule(Decay::cosine, {.peak = 2, .steps = 24, .warmup_steps = 4, .final_fraction = 0.1});
  CHECK(schedule(4) == 2);
  CHECK(schedule(9) == Approx(0.2 + 1.8 * (1 + std::sqrt(0.5)) / 2).epsilon(1e-14));
  CHECK(schedule(14) == Approx(1.1).epsilon(1e-14));
  CHECK(schedule(24) == Approx(0.2).epsilon(1e-14));
  CHECK(schedule(1000) == schedule(24));
}

TEST_CASE("a schedule that only warms up ends at its peak") {
  const Schedule schedule(Decay::cosine, {.peak = 3, .steps = 5, .warmup_steps = 5});
  CHECK(schedule(0) == Approx(0.6).epsilon(1e-15));
  CHECK(schedule(4) == 3);
}

TEST_CASE("a schedule refuses options out of range and names them") {
  for (const double peak : {-1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    CHECK_THROWS_SAYING(std::invalid_argument, Schedule(Decay::linear, {.peak = peak}), "Schedule: peak", "got");
  }
  CHECK_THROWS_SAYING(std::invalid_argument, Schedule(Decay::linear, {.steps = 0}), "Schedule: steps", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, Schedule(Decay::linear, {.steps = 5, .warmup_steps = 6}), "Schedule: warmup_steps", "[0, 5]",
                      "got 6");
  CHECK_THROWS_SAYING(std::invalid_argument, Schedule(Decay::linear, {.warmup_steps = -1}), "Schedule: warmup_steps", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, Schedule(Decay::linear, {.final_fraction = 1.5}), "Schedule: final_fraction", "[0, 1]",
                      "got 1.5");
  CHECK_THROWS_SAYING(std::invalid_argument, Schedule(Decay::linear, {.final_fraction = std::nan("")}), "Schedule: final_fraction", "got");
}

}  // namespace dylora::test
