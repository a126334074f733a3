#include "dylora/methods/nola/counter_noise.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "support/catch.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

constexpr Index streams = 120, length = 3072;

/// Streams of streams, as the bases of an adapter are.
const std::vector<VectorX<double>>& samples() {
  static const std::vector<VectorX<double>> all = [] {
    std::vector<VectorX<double>> result;
    for (Index i = 0; i < streams; ++i) {
      const CounterNoise stream = CounterNoise(7).stream(i / 8).stream(i % 8);
      VectorX<double> values(length);
      for (Index p = 0; p < length; ++p) values[p] = stream.at<double>(p);
      result.push_back(values);
    }
    return result;
  }();
  return all;
}

/// The correlation of uniform numbers over ±1, in its own standard deviations: their product has the variance 1/9.
template <class A, class B>
double correlation(const A& a, const B& b) {
  return 3 * a.dot(b) / std::sqrt(static_cast<double>(a.size()));
}

}  // namespace

TEST_CASE("noise is a function of seed and stream and position with values fixed for all time") {
  const CounterNoise noise(1);
  CHECK(noise.at<double>(0) == CounterNoise(1).at<double>(0));
  const auto numerator = [](double value) { return static_cast<long>(value * 0x1p24); };
  CHECK(numerator(noise.at<double>(0)) == 3435065);
  CHECK(numerator(noise.at<double>(1)) == -13357881);
  CHECK(numerator(noise.stream(0).at<double>(0)) == 468529);
  CHECK(numerator(noise.stream(5).stream(3).at<double>(1000)) == 4588335);
  CHECK(numerator(CounterNoise(0).stream(1023).stream(7).at<double>(4095)) == 6364595);
}

TEST_CASE("a tile of noise holds the elements one by one in float and in double") {
  const CounterNoise noise = CounterNoise(3).stream(2);
  for (const Index begin : {0, 1, 256, 1000}) {
    CounterNoise::Tile<float> single;
    CounterNoise::Tile<double> exact;
    noise.read(begin, single);
    noise.read(begin, exact);
    for (Index i = 0; i < CounterNoise::tile_size; ++i) {
      const double value = noise.at<double>(begin + i);
      CHECK(exact[i] == value);
      CHECK(static_cast<double>(single[i]) == value);
      CHECK(noise.at<float>(begin + i) == single[i]);
      CHECK(std::abs(value) < 1);
      CHECK(std::fmod(std::abs(value) * 0x1p24, 2) == 1);  // an odd multiple
    }
  }
}

TEST_CASE("noise is uniform over minus one to one") {
  double sum = 0, squares = 0, fourth = 0, largest = 0;
  VectorX<double> bins = VectorX<double>::Zero(64);
  for (const VectorX<double>& values : samples()) {
    sum += values.sum();
    squares += values.squaredNorm();
    fourth += values.array().pow(4).sum();
    largest = std::max(largest, values.cwiseAbs().maxCoeff());
    for (const double value : values) ++bins[static_cast<Index>((value + 1) * 32)];
  }
  const double n = streams * length;
  CHECK(std::abs(sum / n) < 4 * std::sqrt(1 / (3 * n)));
  CHECK(std::abs(squares / n - 1.0 / 3) < 4 * std::sqrt(4 / (45 * n)));
  CHECK(std::abs(fourth / n - 1.0 / 5) < 4 * std::sqrt(16 / (225 * n)));
  CHECK(largest > 0.9999);
  const double chi_square = (bins.array() - n / 64).square().sum() / (n / 64);
  CHECK(std::abs(chi_square - 63) < 4 * std::sqrt(2 * 63.0));
}

TEST_CASE("streams of noise are uncorrelated with each other") {
  double squares = 0;
  Index pairs = 0;
  for (std::size_t i = 0; i < samples().size(); ++i) {
    for (std::size_t j = 0; j < i; ++j, ++pairs) {
      const double c = correlation(samples()[i], samples()[j]);
      CHECK(std::abs(c) < 5);
      squares += c * c;
    }
  }
  CHECK(std::abs(squares / static_cast<double>(pairs) - 1) < 4 * std::sqrt(2 / static_cast<double>(pairs)));
  // Seeds that follow each other, and the same position of streams that do.
  for (Index seed = 0; seed < 20; ++seed) {
    VectorX<double> one(length), next(length), across(length);
    for (Index p = 0; p < length; ++p) {
      one[p] = CounterNoise(static_cast<std::uint64_t>(seed)).at<double>(p);
      next[p] = CounterNoise(static_cast<std::uint64_t>(seed) + 1).at<double>(p);
      across[p] = CounterNoise(static_cast<std::uint64_t>(seed)).stream(p).at<double>(0);
    }
    CHECK(std::abs(correlation(one, next)) < 5);
    CHECK(std::abs(correlation(one, across)) < 5);
    CHECK(std::abs(correlation(across.head(length - 1), across.tail(length - 1))) < 5);
  }
}

TEST_CASE("neighbours in a stream of noise are uncorrelated") {
  double squares = 0;
  Index count = 0;
  for (const VectorX<double>& values : samples()) {
    for (Index lag = 1; lag <= 64; ++lag, ++count) {
      const double c = correlation(values.head(length - lag), values.tail(length - lag));
      CHECK(std::abs(c) < 5);
      squares += c * c;
    }
  }
  CHECK(std::abs(squares / static_cast<double>(count) - 1) < 4 * std::sqrt(2 / static_cast<double>(count)));
}

TEST_CASE("a change of one bit of the position or the seed changes half of the bits of noise") {
  double flips = 0;
  Index count = 0;
  const auto bits = [](double value) { return static_cast<std::uint32_t>(static_cast<std::int32_t>((value + 1) * 0x1p23)); };
  for (Index p = 0; p < 2000; ++p) {
    const std::uint32_t original = bits(CounterNoise(5).at<double>(p));
    for (int bit = 0; bit < 12; ++bit, count += 2) {
      flips += std::popcount(original ^ bits(CounterNoise(5).at<double>(p ^ (Index{1} << bit))));
      flips += std::popcount(original ^ bits(CounterNoise(5 ^ (std::uint64_t{1} << (5 * bit))).at<double>(p)));
    }
  }
  CHECK(std::abs(flips / static_cast<double>(count) / 24 - 0.5) < 0.01);
}

}  // namespace dylora::test
