#include "dylora/core/random.hpp"

#include <cmath>
#include <cstdint>
#include <vector>

#include "support/catch.hpp"
#include "support/values.hpp"

namespace dylora::test {

TEST_CASE("the generator draws the published words of SplitMix64") {
  Rng zero(0), forty_two(42);
  for (const std::uint64_t word : {0xe220a8397b1dcdafu, 0x6e789e6aa1b965f4u, 0x06c45d188009454fu, 0xf88bb8a8724c81ecu})
    CHECK(zero.next() == word);
  for (const std::uint64_t word : {0xbdd732262feb6e95u, 0x28efe333b266f103u, 0x47526757130f9f52u}) CHECK(forty_two.next() == word);
}

TEST_CASE("uniform numbers are the upper 53 bits of the words") {
  Rng words(42), numbers(42);
  for (int i = 0; i < 1000; ++i) {
    const double u = numbers.uniform();
    CHECK(u == std::ldexp(static_cast<double>(words.next() >> 11), -53));
    CHECK((u >= 0 && u < 1));
  }
  CHECK(Rng(42).uniform() == 0x1.7bae644c5fd6d0p-1);
}

TEST_CASE("a generator made from the state of another continues where that is") {
  Rng rng(7);
  for (int i = 0; i < 10; ++i) rng.next();
  Rng copy(rng.state());
  for (int i = 0; i < 10; ++i) CHECK(copy.next() == rng.next());
}

TEST_CASE("integers below a count cover it evenly") {
  Rng rng(1);
  std::vector<double> drawn(7, 0);
  for (int i = 0; i < 70000; ++i) ++drawn[static_cast<std::size_t>(rng.below(7))];
  double chi_square = 0;
  for (const double count : drawn) chi_square += (count - 10000) * (count - 10000) / 10000;
  CHECK(chi_square < 16.81);  // 1 % of the distribution with 6 degrees of freedom lies above
  for (int i = 0; i < 100; ++i) CHECK(rng.below(1) == 0);
}

TEST_CASE("a random matrix is drawn in storage order and lies within its bound") {
  Rng a(3), b(3), c(3);
  const MatrixX<double> by_columns = random_uniform<double>(4, 3, 0.5, a);
  const RowMatrix<double> by_rows = random_uniform<double, RowMatrix<double>>(4, 3, 0.5, b);
  for (Index i = 0; i < 12; ++i) {
    const double expected = 0.5 * (2 * c.uniform() - 1);
    CHECK(by_columns(i % 4, i / 4) == expected);
    CHECK(by_rows(i / 3, i % 3) == expected);
    CHECK(std::abs(expected) <= 0.5);
  }
}

TEST_CASE("a float matrix is the rounded double matrix") {
  const MatrixX<float> rounded = noise<double>(5, 5, 1).cast<float>();
  CHECK(same_bits(noise<float>(5, 5, 1), rounded));
}

}  // namespace dylora::test
