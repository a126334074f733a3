#ifndef DYLORA_BENCHMARKS_STEP_RATIO_READ_HPP
#define DYLORA_BENCHMARKS_STEP_RATIO_READ_HPP

#include <cstddef>
#include <cstring>
#include <dylora/linalg/parallel.hpp>
#include <functional>
#include <numeric>
#include <vector>

namespace step_ratio {

using dylora::Index;

/// The sum of `size` elements, read as `streams` sequences side by side, each in steps of 256 bytes. What is left over at the end of a
/// sequence is not read: nothing of a large matrix whose sides are powers of two.
template <int streams>
float sum(const float* data, Index size) {
  using Wide [[gnu::vector_size(64)]] = float;
  constexpr Index lanes = sizeof(Wide) / sizeof(float), step = 4 * lanes;
  const Index part = size / streams;
  Wide sums[streams][4] = {};
  for (Index i = 0; i + step <= part; i += step) {
    for (int s = 0; s < streams; ++s) {
      for (int v = 0; v < 4; ++v) {
        Wide wide;
        std::memcpy(&wide, data + s * part + i + v * lanes, sizeof wide);
        sums[s][v] += wide;
      }
    }
  }
  float total = 0;
  for (const auto& stream : sums) {
    for (const Wide& wide : stream) {
      for (Index i = 0; i < lanes; ++i) total += wide[i];
    }
  }
  return total;
}

/// The same by all threads, in `chunks` equal pieces: whatever else is done with so many elements takes at least as long.
template <int streams>
float parallel_sum(const float* data, Index size, Index chunks) {
  std::vector<float> sums(static_cast<std::size_t>(chunks));
  const Index part = size / chunks;
  dylora::for_each_task(chunks, static_cast<double>(size),
                        [&](Index i) { sums[static_cast<std::size_t>(i)] = sum<streams>(data + i * part, part); });
  return std::accumulate(sums.begin(), sums.end(), 0.0F);
}

/// Ways to read the same memory, with nothing else to do. Which of them is fastest depends on the machine's prefetchers.
inline std::vector<std::function<float()>> ways_to_read(const float* data, Index size, int threads) {
  std::vector<std::function<float()>> ways;
  for (const Index chunks : {Index{threads}, Index{64} * threads}) {
    ways.emplace_back([=] { return parallel_sum<1>(data, size, chunks); });
    ways.emplace_back([=] { return parallel_sum<2>(data, size, chunks); });
    ways.emplace_back([=] { return parallel_sum<4>(data, size, chunks); });
    ways.emplace_back([=] { return parallel_sum<8>(data, size, chunks); });
  }
  return ways;
}

}  // namespace step_ratio

#endif
