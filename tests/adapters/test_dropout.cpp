#include "dylora/adapters/dropout.hpp"

#include <cmath>

#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

template <class S>
using Adapted = Dropout<LowRank<S>>;
template <class S>
using Twice = Dropout<Dropout<LowRank<S>>>;

using AdaptersUnderTest = InFloatAndDouble<Adapted, Twice>;

}  // namespace dylora::test

#include "laws/adapter_laws.hpp"

namespace dylora::test {

namespace {

/// An adapter whose output is its input: what y holds is the mask times x.
Dropout<LowRank<double>> identity(double probability) {
  const Index n = 20;
  return {LowRank<double>(RowMatrix<double>::Identity(n, n), MatrixX<double>::Identity(n, n), {.alpha = 20}), probability};
}

MatrixX<double> mask(const Dropout<LowRank<double>>& adapter, Dropout<LowRank<double>>::Cache& cache, Index samples = 50) {
  MatrixX<double> y = MatrixX<double>::Zero(20, samples);
  adapter.add_forward(MatrixX<double>::Ones(20, samples), 20, cache, y);
  return y;
}

}  // namespace

TEST_CASE("without a generator in the cache nothing is dropped") {
  Dropout<LowRank<double>>::Cache cache;
  CHECK(mask(identity(0.5), cache).isOnes(0));
}

TEST_CASE("with probability 0 nothing is dropped and nothing is drawn") {
  Dropout<LowRank<double>>::Cache cache;
  cache.rng = Rng(3);
  CHECK(mask(identity(0), cache).isOnes(0));
  CHECK(cache.rng->state() == Rng(3).state());
}

TEST_CASE("an input is dropped or scaled up by one over what is kept") {
  Dropout<LowRank<double>>::Cache cache;
  cache.rng = Rng(3);
  const MatrixX<double> kept = mask(identity(0.75), cache);
  CHECK(((kept.array() == 0) || (kept.array() == 4)).all());
}

TEST_CASE("the mask has the expectation 1 and the probability that was asked for") {
  for (const double p : {0.1, 0.5, 0.9}) {
    Dropout<LowRank<double>>::Cache cache;
    cache.rng = Rng(3);
    const Index samples = 2000;
    const MatrixX<double> kept = mask(identity(p), cache, samples);
    const double n = 20 * samples, dropped = static_cast<double>((kept.array() == 0).count()) / n;
    CHECK(std::abs(dropped - p) < 3 * std::sqrt(p * (1 - p) / n));
    CHECK(std::abs(kept.mean() - 1) < 3 * std::sqrt(p / (1 - p) / n));
    // Neighbours are dropped independently, also those that share a random word.
    double both = 0;
    for (Index i = 1; i < kept.size(); ++i) both += kept.data()[i] == 0 && kept.data()[i - 1] == 0 ? 1 : 0;
    CHECK(std::abs(both / n - p * p) < 4 * std::sqrt(p * p * (1 - p * p) / n));
  }
}

TEST_CASE("the same seed drops the same inputs and every forward draws a fresh mask") {
  const auto adapter = identity(0.5);
  Dropout<LowRank<double>>::Cache one, same, other;
  one.rng = Rng(3);
  same.rng = Rng(3);
  other.rng = Rng(4);
  const MatrixX<double> first = mask(adapter, one);
  CHECK(same_bits(mask(adapter, same), first));
  CHECK_FALSE(same_bits(mask(adapter, other), first));
  const MatrixX<double> second = mask(adapter, one);
  CHECK_FALSE(same_bits(second, first));
  CHECK(same_bits(mask(adapter, same), second));
}

TEST_CASE("the backward drops what its forward dropped") {
  const auto adapter = identity(0.5);
  Dropout<LowRank<double>>::Cache cache;
  cache.rng = Rng(3);
  const MatrixX<double> dropped = mask(adapter, cache);
  auto gradients = zeros_like(adapter);
  MatrixX<double> dx = MatrixX<double>::Zero(20, 50);
  adapter.add_backward(MatrixX<double>::Ones(20, 50), MatrixX<double>::Ones(20, 50), cache, gradients, dx);
  CHECK(same_bits(dx, dropped));
}

TEST_CASE("the base of a layer never loses an input") {
  Linear<double, Dropout<LowRank<double>>> layer = MakeLayer<Linear<double, Dropout<LowRank<double>>>>::make(0, law_rank);
  const MatrixX<double> x = noise<double>(7, 30, 1);
  auto cache = fresh_cache<decltype(layer)>();
  CHECK(same_bits(layer.forward(x, 3, cache), layer.forward(x, RankSlice::none())));  // B = 0
  randomize<decltype(layer)>(layer, 2);
  CHECK_FALSE(same_bits(layer.forward(x, 3, cache), layer.forward(x, 3)));
}

TEST_CASE("dropout adds no parameter of its own and no level to their names") {
  const auto adapter = identity(0.5);
  CHECK(names(adapter) == std::vector<std::string>{"lora_A", "lora_B"});
  CHECK(parameter_count(adapter) == 800);
}

TEST_CASE("dropout refuses a probability outside of 0 to 1") {
  for (const double p : {-0.1, 1.0, 1.5, nan<double>})
    CHECK_THROWS_SAYING(std::invalid_argument, identity(p), "Dropout: probability", "[0, 1)", "got");
  Rng rng(1);
  CHECK_THROWS_SAYING(std::invalid_argument, Dropout<LowRank<float>>(9, 7, {.adapter = {.max_rank = 8}}, rng), "LowRank: max_rank",
                      "got 8");
}

}  // namespace dylora::test
