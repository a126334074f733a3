#include "dylora/methods/prilora/observed.hpp"

#include "dylora/adapters/dropout.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/weights/dense.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

template <class S>
using Watching = Observed<LowRank<S>>;
template <class S>
using WatchingDropout = Observed<Dropout<LowRank<S>>>;

template <class Inner>
typename Inner::Options options_of(As<Observed<Inner>>, Index out, Index max_rank) {
  return options_of(As<Inner>{}, out, max_rank);
}

using AdaptersUnderTest = InFloatAndDouble<Watching, WatchingDropout>;

}  // namespace dylora::test

#include "laws/adapter_laws.hpp"

namespace dylora::test {

namespace {

constexpr Index in = 9, out = 7;

}  // namespace

TEMPLATE_TEST_CASE("every backward adds the squares of its inputs whatever the ranks and whatever was dropped", "", float, double) {
  using S = TestType;
  Rng rng(1);
  Linear<S, Observed<Dropout<LowRank<S>>>> dropping(MatrixX<S>(noise<S>(out, in, 1)), {.adapter = {.max_rank = 4}, .probability = 0.5},
                                                    rng);
  Linear<S, Observed<LowRank<S>>> fused(MatrixX<S>(noise<S>(out, in, 1)), {.max_rank = 4}, rng);
  const auto shown = [&](const auto& layer) {
    using L = std::remove_cvref_t<decltype(layer)>;
    auto gradients = zeros_like(layer);
    CHECK(gradients.adapter.input_squares.size() == 0);
    VectorX<double> expected = VectorX<double>::Zero(in);
    std::uint64_t seed = 5;
    for (const BatchRanks& ranks : {BatchRanks(4), BatchRanks(2, 2), BatchRanks(RankSlice::none()),
                                    BatchRanks::per_sample({4, 1, 1, RankSlice::none(), {3, 2}, 2})}) {
      typename L::Cache cache;
      seed_dropout(cache);
      const MatrixX<S> x = noise<S>(in, 6, seed++);
      (void)layer.forward(x, ranks);  // inference leaves no trace
      (void)layer.forward(x, ranks, cache);
      (void)layer.backward(noise<S>(out, 6, 2), cache, gradients);
      expected += x.template cast<double>().rowwise().squaredNorm();
      CHECK(gap(gradients.adapter.input_squares, expected) < rounding<double>);
    }
    set_zero(layer, gradients);
    CHECK(gap(gradients.adapter.input_squares, expected) < rounding<double>);  // whoever reads them clears them
  };
  shown(dropping);
  shown(fused);
}

TEST_CASE("an adapter that is observed computes what it computes bit for bit") {
  const MatrixX<float> W = noise<float>(out, in, 1), x = noise<float>(in, 6, 2), dy = noise<float>(out, 6, 3);
  Rng rng(1);
  Linear<float> plain(W, {.max_rank = 4}, rng);
  randomize<Linear<float>>(plain, 4);
  const Linear<float, Observed<LowRank<float>>> observed(W, Observed<LowRank<float>>(plain.adapter));
  Linear<float>::Cache cache;
  Linear<float, Observed<LowRank<float>>>::Cache observed_cache;
  auto gradients = zeros_like(plain);
  auto observed_gradients = zeros_like(observed);
  CHECK(same_bits(plain.forward(x, 3, cache), observed.forward(x, 3, observed_cache)));
  CHECK(same_bits(plain.backward(dy, cache, gradients), observed.backward(dy, observed_cache, observed_gradients)));
  CHECK(same_bits(gradients.adapter.A, observed_gradients.adapter.inner.A));
  CHECK(same_bits(plain.merged(3).W, observed.merged(3).W));
  STATIC_REQUIRE(FactoredAdapter<Observed<LowRank<float>>>);
  STATIC_REQUIRE_FALSE(FactoredAdapter<Observed<Dropout<LowRank<float>>>>);
}

}  // namespace dylora::test
