#ifndef DYLORA_BENCHMARKS_MEASURE_TURNS_HPP
#define DYLORA_BENCHMARKS_MEASURE_TURNS_HPP

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <functional>
#include <string>
#include <thread>
#include <vector>

/// Times of contenders that take turns in one run, and their ratios.
///
/// On a shared machine a time says little by itself: the clock rate and the neighbours change from second to second. Contenders that take
/// turns meet the same weather, so the ratio within a round is fair; its median over rounds is the result, its quartiles the spread.
/// (Google Benchmark runs one contender to its end before the next, and cannot time another process.)
namespace measure {

struct Contender {
  std::string name;
  std::function<double()> round;  ///< the seconds of one call, from as many calls as make a round
};

/// The seconds of one call of `work`, over about `seconds` of calls. A pause goes before, in which the threads of the last contender cease
/// to spin on the cores, and a quarter as many calls that do not count, in which the caches get our data.
template <class Work>
std::function<double()> timed(Work work, double seconds = 0.02) {
  return [work, seconds, calls = 0L]() mutable {
    const auto time = [&](long n) {
      const auto begin = std::chrono::steady_clock::now();
      for (long i = 0; i < n; ++i) work();
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    if (calls == 0) {
      time(1);  // cold
      calls = std::max(1L, std::lround(seconds / std::max(time(1), 1e-7)));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(15));
    time(calls / 4);
    return time(calls) / static_cast<double>(calls);
  };
}

/// For each contender the seconds of each of `rounds` rounds, in which all take a turn; one round before them warms up.
inline std::vector<std::vector<double>> take_turns(const std::vector<Contender>& contenders, int rounds) {
  std::vector<std::vector<double>> seconds(contenders.size());
  for (int round = -1; round < rounds; ++round) {
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      const double one = contenders[i].round();
      if (round >= 0) seconds[i].push_back(one);
    }
  }
  return seconds;
}

/// The value below which `fraction` of the values lie.
inline double quantile(std::vector<double> values, double fraction) {
  std::sort(values.begin(), values.end());
  const double place = fraction * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (place - static_cast<double>(below)) * (values[above] - values[below]);
}

inline double median(const std::vector<double>& values) { return quantile(values, 0.5); }

struct Ratio {
  double median, low, high;  ///< low and high are the quartiles over rounds

  Ratio operator*(double factor) const { return {median * factor, low * factor, high * factor}; }
};

/// Of what `of` took in each round over what `over` took in the same round.
inline Ratio ratio(const std::vector<double>& of, const std::vector<double>& over) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < of.size(); ++i) ratios.push_back(of[i] / over[i]);
  return {median(ratios), quantile(ratios, 0.25), quantile(ratios, 0.75)};
}

}  // namespace measure

#endif
