#include "dylora/methods/prilora/proportional.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "dylora/adapters/dropout.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/methods/chain/fold.hpp"
#include "dylora/methods/prilora/rank_allocation.hpp"
#include "dylora/ranks/truncate.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

template <class S>
using Whole = Proportional<LowRank<S>>;
template <class S>
using Dropping = Proportional<Dropout<LowRank<S>>>;

template <class Inner>
typename Proportional<Inner>::Options options_of(As<Proportional<Inner>>, Index out, Index max_rank) {
  return {.adapter = options_of(As<Inner>{}, out, max_rank), .max_rank = max_rank};
}

using AdaptersUnderTest = InFloatAndDouble<Whole, Dropping>;

}  // namespace dylora::test

#include "laws/adapter_laws.hpp"

namespace dylora::test {

namespace {

constexpr Index in = 9, out = 8;

/// r components in a model of rank R, all at random.
template <class S>
Proportional<LowRank<S>> share_of(Index r, Index R) {
  Rng rng(1);
  Proportional<LowRank<S>> adapter(in, out, {.adapter = {.max_rank = r, .alpha = 3}, .max_rank = R}, rng);
  randomize<Proportional<LowRank<S>>>(adapter, 2);
  return adapter;
}

}  // namespace

TEST_CASE("a share of the components grows with the rank and reaches all of them at the last") {
  for (Index R = 1; R <= 8; ++R) {
    for (Index r = 1; r <= R; ++r) {
      const auto adapter = share_of<double>(r, R);
      CHECK(adapter.max_rank() == R);
      CHECK(adapter.components() == R);
      for (Index b = 1; b <= R; ++b) {
        CHECK(adapter.rank_of(b) == (b * r + R - 1) / R);
        CHECK(adapter.rank_of(b) >= adapter.rank_of(b - 1));
        CHECK(adapter.rank_of(b) >= 1);
      }
      CHECK(adapter.rank_of(R) == r);
    }
  }
}

TEST_CASE("oracle of PRILoRA: at every rank of the model the layers keep the profile of their ranks") {
  const std::vector<Index> ranks = linear_ranks(2, 8, 7);  // 2 3 4 5 6 7 8
  for (Index b = 1; b <= 8; ++b) {
    Index before = 1;
    for (const Index r : ranks) {
      const Index active = share_of<double>(r, 8).rank_of(b);
      CHECK(active >= before);
      CHECK(8 * active >= b * r);       // at least its share
      CHECK(8 * (active - 1) < b * r);  // and no component more
      before = active;
    }
  }
}

TEMPLATE_TEST_CASE("an adapter in a model of a higher rank is the adapter at its share of it bit for bit", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(in, 6, 1), dy = noise<S>(out, 6, 2);
  for (const auto& [r, R] : {std::pair<Index, Index>{3, 8}, {1, 5}, {5, 8}, {8, 8}, {2, 7}}) {
    const auto adapter = share_of<S>(r, R);
    for (Index b = 1; b <= R; ++b) {
      for (const Index t : {Index{0}, b - 1, b}) {
        const RankSlice own{adapter.rank_of(b), adapter.rank_of(t)};
        const auto got = run(adapter, x, dy, RankSlice(b, t), {});
        const auto expected = run(adapter.inner, x, dy, own, {});
        CHECK(same_bits(got.y, expected.y));
        CHECK(same_bits(got.dx, expected.dx));
        CHECK(same_bits(values<LowRank<S>>(got.gradients.inner), values<LowRank<S>>(expected.gradients)));
        CHECK(trained_components<LowRank<S>>(got.gradients.inner) == trained_components<LowRank<S>>(expected.gradients));
      }
      CHECK(same_bits(adapter.delta(b), adapter.inner.delta(adapter.rank_of(b))));
      CHECK(same_bits(adapter.factors(b).B, adapter.inner.factors(adapter.rank_of(b)).B));
    }
    // A mix of ranks, some of which come to have one share.
    const std::vector<RankSlice> mix{R, R, std::max<Index>(1, R - 1), RankSlice::none(), 1, {R, R - 1}};
    const auto mixed = run(adapter, x, dy, BatchRanks::per_sample(mix), {});
    for (std::size_t i = 0; i < mix.size(); ++i) {
      const MatrixX<S> one = run(adapter, x, dy, mix[i], {}).y.col(static_cast<Index>(i));
      CHECK(same_bits(MatrixX<S>(mixed.y.col(static_cast<Index>(i))), one));
    }
  }
}

TEST_CASE("a frozen sweep over the ranks of a model trains every component of an adapter once") {
  for (Index R = 1; R <= 8; ++R) {
    for (Index r = 1; r <= R; ++r) {
      const auto adapter = share_of<double>(r, R);
      std::vector<int> trained(static_cast<std::size_t>(r), 0);
      for (Index b = 1; b <= R; ++b) {
        const auto ran = run(adapter, noise<double>(in, 2, 1), noise<double>(out, 2, 2), RankSlice(b, b - 1), {});
        for (Index i = 0; i < r; ++i) trained[static_cast<std::size_t>(i)] += ran.gradients.inner.A.components.contains(i);
      }
      CHECK(trained == std::vector<int>(static_cast<std::size_t>(r), 1));
    }
  }
}

TEMPLATE_TEST_CASE("a cut adapter has at every rank of the model as many components as before or all that are left", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(in, 6, 1), dy = noise<S>(out, 6, 2);
  for (Index components = 0; components <= 3; ++components) {
    auto adapter = share_of<S>(3, 8), whole = adapter;
    truncate(adapter, components);
    CHECK(adapter.max_rank() == 8);
    CHECK(adapter.components() == components * 8 / 3);
    CHECK(adapter.rank_of(adapter.components()) == components);
    if (adapter.components() < 8) CHECK(adapter.rank_of(adapter.components() + 1) == components + 1);
    for (Index b = 1; b <= 8; ++b) {
      for (const Index t : {Index{0}, b - 1, b}) {
        const Index left = std::min(components, whole.rank_of(b));
        const RankSlice own = left == 0 ? RankSlice::none() : RankSlice(left, std::min(left, whole.rank_of(t)));
        const auto got = run(adapter, x, dy, RankSlice(b, t), {});
        const auto expected = run(whole.inner, x, dy, own, {});
        CHECK(same_bits(got.y, expected.y));
        CHECK(same_bits(got.dx, expected.dx));
        CHECK(same_bits(component_values<LowRank<S>>(got.gradients.inner, 0),
                        component_values<LowRank<S>>(expected.gradients, 0, components)));
        CHECK(same_bits(adapter.delta(b), whole.inner.delta(own)));
      }
    }
  }
}

TEST_CASE("a cut adapter refuses a cache of components that it had") {
  const auto whole = share_of<double>(3, 8);
  auto cut = whole;
  truncate(cut, 1);
  const MatrixX<double> x = noise<double>(in, 2, 1), dy = noise<double>(out, 2, 2);
  MatrixX<double> y = MatrixX<double>::Zero(out, 2), dx = MatrixX<double>::Zero(in, 2);
  auto gradients = zeros_like(cut);
  LowRank<double>::Cache cache;
  whole.add_forward(x, 3, cache, y);  // 2 of 3
  CHECK_THROWS_SAYING(std::invalid_argument, cut.add_backward(x, dy, cache, gradients, dx), "cache", "max_rank = 1", "got 2");
  CHECK_THROWS_SAYING(std::invalid_argument, cut.add_forward(x, 9, cache, y), "Proportional::add_forward", "max_rank = 8", "got 9");
  CHECK(dx.isZero(0));
  CHECK(values<LowRank<double>>(gradients.inner).isZero(0));
  whole.add_forward(x, 2, cache, y);  // 1 of 3
  cut.add_backward(x, dy, cache, gradients, dx);
  CHECK_FALSE(dx.isZero(0));
}

TEST_CASE("factors come back at the rank of the model") {
  const auto trained = share_of<double>(3, 8);
  auto fresh = share_of<double>(3, 8);
  fresh.set_factors(trained.factors(8));
  CHECK(fresh.max_rank() == 8);
  for (Index b = 1; b <= 8; ++b) CHECK(gap(fresh.delta(b), trained.delta(b)) < rounding<double>);
  fresh.set_factors({noise<double>(9, in, 1), noise<double>(out, 9, 2), 0.5});
  CHECK(fresh.max_rank() == 9);
  fresh.set_factors({RowMatrix<double>(0, in), MatrixX<double>(out, 0), 1});
  CHECK(fresh.max_rank() == 0);
  CHECK(fresh.components() == 0);
}

TEST_CASE("layers of different ranks in one model are folded and merged at their shares") {
  Linear<double, Proportional<LowRank<double>>> layer(MatrixX<double>(noise<double>(out, in, 3)), share_of<double>(3, 8));
  const MatrixX<double> merged = layer.merged(4).W;
  CHECK(gap(merged, layer.base.W + layer.adapter.inner.delta(2)) < rounding<double>);
  Rng rng(1);
  fold(layer, 4, rng);
  CHECK(same_bits(layer.base.W, merged));
  CHECK(layer.max_rank() == 8);
}

TEST_CASE("an adapter of more components than the model's rank is refused") {
  Rng rng(1);
  using P = Proportional<LowRank<double>>;
  const auto make = [&](Index r, Index R) { return P(in, out, {.adapter = {.max_rank = r}, .max_rank = R}, rng); };
  CHECK_THROWS_SAYING(std::invalid_argument, make(5, 4), "Proportional: max_rank of the adapter", "[0, 4]", "got 5");
  CHECK_THROWS_SAYING(std::invalid_argument, make(3, 8).delta(9), "Proportional::delta", "max_rank = 8", "got 9");
  CHECK_THROWS_SAYING(std::invalid_argument, make(3, 8).factors(9), "Proportional::factors", "[0, 8]", "got 9");
  CHECK(make(0, 8).max_rank() == 0);
}

}  // namespace dylora::test
