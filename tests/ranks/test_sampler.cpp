#include "dylora/ranks/sampler.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

constexpr int draws = 40000;

/// χ² of the drawn ranks against the probabilities of the ranks lowest, lowest + 1, …; infinite if one outside of them was drawn.
template <RankSampler Sampler>
double chi_square(const Sampler& sampler, const std::vector<double>& probabilities, Index lowest = 1) {
  Rng rng(1);
  std::vector<double> drawn(probabilities.size(), 0);
  for (int i = 0; i < draws; ++i) {
    const Index k = sampler(rng).active - lowest;
    if (k < 0 || k >= static_cast<Index>(drawn.size())) return std::numeric_limits<double>::infinity();
    ++drawn[static_cast<std::size_t>(k)];
  }
  double sum = 0;
  for (std::size_t k = 0; k < drawn.size(); ++k) {
    const double expected = draws * probabilities[k];
    if (expected == 0 && drawn[k] > 0) return std::numeric_limits<double>::infinity();
    if (expected > 0) sum += (drawn[k] - expected) * (drawn[k] - expected) / expected;
  }
  return sum;
}

template <RankSampler Sampler>
std::vector<RankSlice> first_draws(const Sampler& sampler) {
  Rng rng(42);
  std::vector<RankSlice> result;
  for (int i = 0; i < 8; ++i) result.push_back(sampler(rng));
  return result;
}

}  // namespace

// The bounds are exceeded by 1 % of all seeds; this seed is fixed.

TEST_CASE("uniform ranks are equally frequent") {
  CHECK(chi_square(UniformRank{1, 8}, std::vector<double>(8, 0.125)) < 18.48);
  CHECK(chi_square(UniformRank{3, 5}, std::vector<double>(3, 1.0 / 3), 3) < 9.21);
  CHECK(chi_square(UniformRank{4, 4}, {1}, 4) == 0);
}

TEST_CASE("categorical ranks have the frequencies of their weights") {
  CHECK(chi_square(CategoricalRank({1, 2, 0, 5}), {0.125, 0.25, 0, 0.625}) < 9.21);
  CHECK(chi_square(CategoricalRank({0, 1, 1, 0}, 4), {0, 0.5, 0.5, 0}, 4) < 6.63);
  CHECK(chi_square(CategoricalRank({0.25}), {1}) == 0);
}

TEST_CASE("geometric ranks fall by the factor 1 - p") {
  std::vector<double> probabilities;
  double sum = 0;
  for (int i = 0; i < 6; ++i) sum += std::pow(0.7, i);
  for (int i = 0; i < 6; ++i) probabilities.push_back(std::pow(0.7, i) / sum);
  CHECK(chi_square(GeometricRank(1, 6, 0.3), probabilities) < 15.09);
  CHECK(chi_square(GeometricRank(3, 8, 0.3), probabilities, 3) < 15.09);
  CHECK(chi_square(GeometricRank(2, 2, 0.5), {1}, 2) == 0);
}

TEST_CASE("a frozen prefix keeps the ranks of its sampler and trains the newest component") {
  CHECK(chi_square(FrozenPrefix{UniformRank{1, 8}}, std::vector<double>(8, 0.125)) < 18.48);
  Rng nested(3), frozen(3);
  for (int i = 0; i < 100; ++i) {
    const Index b = UniformRank{1, 8}(nested).active;
    CHECK(FrozenPrefix{UniformRank{1, 8}}(frozen) == RankSlice{b, b - 1});
  }
}

TEST_CASE("blocks multiply what is drawn by their size") {
  Rng single(3), blocks(3), frozen(3);
  for (int i = 0; i < 100; ++i) {
    const Index b = UniformRank{1, 4}(single).active;
    CHECK(BlockRank{UniformRank{1, 4}, 3}(blocks) == RankSlice{3 * b, 0});
    CHECK(BlockRank{FrozenPrefix{UniformRank{1, 4}}, 3}(frozen) == RankSlice{3 * b, 3 * b - 3});
  }
}

TEST_CASE("the first ranks of a seed are the same on every platform") {
  CHECK(first_draws(UniformRank{1, 8}) == std::vector<RankSlice>{6, 2, 3, 3, 1, 7, 2, 7});
  CHECK(first_draws(FrozenPrefix{UniformRank{1, 8}})[0] == RankSlice{6, 5});
  CHECK(first_draws(GeometricRank(1, 8, 0.25)) == std::vector<RankSlice>{4, 1, 2, 2, 1, 6, 1, 5});
}

TEST_CASE("samplers of one seed draw the same ranks and samplers share nothing") {
  CHECK(first_draws(UniformRank{1, 8}) == first_draws(UniformRank{1, 8}));
}

TEST_CASE("samplers refuse options out of range and name them") {
  CHECK_THROWS_SAYING(std::invalid_argument, UniformRank(0, 8), "UniformRank: lowest rank", "[1, 8]", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, UniformRank(5, 4), "UniformRank: lowest rank", "[1, 4]", "got 5");
  CHECK_THROWS_SAYING(std::invalid_argument, CategoricalRank({1, 1}, 0), "CategoricalRank: lowest rank", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, CategoricalRank({1, -1}), "CategoricalRank: weight", "finite number ≥ 0", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, CategoricalRank({1, std::nan("")}), "CategoricalRank: weight", "got");
  CHECK_THROWS_SAYING(std::invalid_argument, CategoricalRank({std::numeric_limits<double>::infinity()}), "CategoricalRank: weight",
                      "got inf");
  CHECK_THROWS_SAYING(std::invalid_argument, CategoricalRank({1e308, 1e308}), "CategoricalRank: sum of the weights", "finite", "got inf");
  CHECK_THROWS_SAYING(std::invalid_argument, CategoricalRank({0, 0}), "CategoricalRank: sum of the weights", "> 0", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, CategoricalRank({}), "CategoricalRank: sum of the weights", "> 0", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, GeometricRank(0, 8, 0.5), "GeometricRank: lowest rank", "[1, 8]", "got 0");
  for (const double p : {0.0, 1.0, -0.5, std::nan("")})
    CHECK_THROWS_SAYING(std::invalid_argument, GeometricRank(1, 8, p), "GeometricRank: p", "(0, 1)", "got");
  CHECK_THROWS_SAYING(std::invalid_argument, BlockRank(UniformRank(1, 4), 0), "BlockRank: unit", "got 0");
}

TEST_CASE("a categorical rank draws no weight of zero, however small the others") {
  Rng rng(3);
  const CategoricalRank tiny({5e-324, 0, 0});
  for (int i = 0; i < 100; ++i) CHECK(tiny(rng).active == 1);
}

}  // namespace dylora::test
