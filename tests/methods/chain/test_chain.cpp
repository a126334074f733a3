#include "dylora/methods/chain/chain.hpp"

#include <algorithm>
#include <concepts>
#include <string>
#include <utility>
#include <vector>

#include "dylora/adapters/dropout.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/methods/chain/fold.hpp"
#include "dylora/ranks/truncate.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/loss.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

template <class S>
using OneLink = Chain<LowRank<S>>;
template <class S>
using Dropping = Dropout<Chain<LowRank<S>>>;

/// A chain that was extended twice.
template <class S>
struct ThreeLinks : Chain<LowRank<S>> {
  ThreeLinks(Index in_features, Index out_features, LowRankOptions of_link, Rng& rng)
      : Chain<LowRank<S>>(in_features, out_features, of_link, rng) {
    this->extend(rng);
    this->extend(rng);
  }
};
template <class A>
concept HasThreeLinks = std::same_as<A, ThreeLinks<typename A::Scalar>>;

// What the laws do to the parameters of an adapter they do to the frozen links of this one as well.

template <HasThreeLinks A, std::same_as<A> P, class F>
void for_each_entry(P& chain, F&& f) {
  for (auto& link : chain.links) for_each_entry<LowRank<typename A::Scalar>>(link, f);
}
template <HasThreeLinks A>
void copy_prefix(const A& whole, A& part) {
  for (std::size_t j = 0; j < whole.links.size(); ++j) copy_prefix(whole.links[j], part.links[j]);
}

template <class Inner>
typename Inner::Options options_of(As<Chain<Inner>>, Index out, Index max_rank) {
  return options_of(As<Inner>{}, out, max_rank);
}

template <class S>
LowRankOptions options_of(As<ThreeLinks<S>>, Index out, Index max_rank) {
  return options_of(As<LowRank<S>>{}, out, max_rank);
}

using AdaptersUnderTest = InFloatAndDouble<OneLink, ThreeLinks, Dropping>;

}  // namespace dylora::test

#include "laws/adapter_laws.hpp"

namespace dylora::test {

namespace {

constexpr Index in = 9, out = 7;
constexpr LowRankOptions options{.max_rank = 5, .alpha = 3};

/// Links of these ranks, all at random.
template <class S>
Chain<LowRank<S>> chain_of(const std::vector<Index>& ranks, const std::vector<double>& alphas = {3, 3, 3}) {
  std::vector<LowRank<S>> links;
  for (std::size_t j = 0; j < ranks.size(); ++j) {
    links.emplace_back(RowMatrix<S>(noise<S>(ranks[j], in, 10 + j)), noise<S>(out, ranks[j], 20 + j),
                       LowRankOptions{.alpha = alphas[j], .scale = alpha_over_rank});
  }
  return {std::move(links), options};
}

}  // namespace

TEMPLATE_TEST_CASE("a chain is the sum of its links at every rank and mix of ranks", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(in, 6, 1), dy = noise<S>(out, 6, 2);
  for (const std::vector<Index>& ranks : {std::vector<Index>{5, 5, 5}, {1, 3, 5}, {0, 2, 5}, {5, 5}}) {
    const Chain<LowRank<S>> chain = chain_of<S>(ranks);
    CHECK(chain.max_rank() == 5);
    CHECK(chain.components() == 5);
    for (const BatchRanks& batch : {BatchRanks(1), BatchRanks(2), BatchRanks(5), BatchRanks(5, 4), BatchRanks(3, 3),
                                    BatchRanks::per_sample({5, 5, 1, RankSlice::none(), 2, {3, 2}})}) {
      const auto whole = run(chain, x, dy, batch, {});
      MatrixX<S> y = MatrixX<S>::Zero(out, 6), dx = MatrixX<S>::Zero(in, 6);
      for (std::size_t j = 0; j < ranks.size(); ++j) {
        const auto link = run(chain.links[j], x, dy, batch.at_most(ranks[j]), {});
        y += link.y;
        dx += link.dx;
        if (j + 1 == ranks.size()) {
          CHECK(same_bits(values<LowRank<S>>(whole.gradients.last), values<LowRank<S>>(link.gradients)));
          CHECK(trained_components<LowRank<S>>(whole.gradients.last) == trained_components<LowRank<S>>(link.gradients));
        }
      }
      CHECK(gap(in_double(whole.y), in_double(y)) < rounding<S>);
      CHECK(gap(in_double(whole.dx), in_double(dx)) < rounding<S>);
    }
    for (Index b = 1; b <= 5; ++b)
      CHECK(gap(in_double(chain.delta(b)).lazyProduct(in_double(x)), in_double(run(chain, x, dy, b, {}).y)) < rounding<S>);
    CHECK(chain.delta(RankSlice::none()).isZero(0));
  }
}

TEST_CASE("only the last link of a chain is a parameter") {
  const Chain<LowRank<double>> chain = chain_of<double>({2, 3, 3});
  CHECK(names(chain) == std::vector<std::string>{"lora_A", "lora_B"});
  CHECK(parameter_count(chain) == 3 * (in + out));
  CHECK(same_bits(values<Chain<LowRank<double>>>(chain), values<LowRank<double>>(chain.links[2])));
}

TEST_CASE("oracle of Chain of LoRA: a link that is added to a chain leaves its function as it is at every rank") {
  Rng rng(1);
  Chain<LowRank<double>> chain(in, out, options, rng);
  randomize<Chain<LowRank<double>>>(chain, 2);
  const MatrixX<double> x = noise<double>(in, 6, 1), dy = noise<double>(out, 6, 2);
  for (Index links = 2; links <= 4; ++links) {
    const Chain<LowRank<double>> before = chain;
    chain.extend(rng);
    CHECK(static_cast<Index>(chain.links.size()) == links);
    for (Index b = 1; b <= 5; ++b) {
      CHECK(same_bits(run(chain, x, dy, b, {}).y, run(before, x, dy, b, {}).y));
      CHECK(same_bits(run(chain, x, dy, b, {}).dx, run(before, x, dy, b, {}).dx));
    }
    const auto gradients = run(chain, x, dy, 5, {}).gradients.last;
    CHECK(gradients.A.isZero(0));
    CHECK(gradients.B.colwise().squaredNorm().minCoeff() > 0);
    CHECK((chain.links.back().A.array() != before.links.back().A.array()).all());
    randomize<Chain<LowRank<double>>>(chain, 2 + static_cast<std::uint64_t>(links));
  }
}

TEST_CASE("oracle of Chain of LoRA: a chain kept unmerged is at every rank what its links are there, where a folded one is not") {
  const MatrixX<double> W = noise<double>(out, in, 3);
  const Chain<LowRank<double>> chain = chain_of<double>({5, 5, 5});
  const Linear<double, Chain<LowRank<double>>> kept(W, chain);
  Linear<double> folded(W, chain.links[0]);
  Rng rng(1);
  for (std::size_t j = 1; j < 3; ++j) {
    fold(folded, 5, rng);
    folded.adapter = chain.links[j];
  }
  for (Index b = 1; b <= 5; ++b) {
    MatrixX<double> expected = W;
    for (const auto& link : chain.links) expected += link.delta(b);
    CHECK(gap(kept.merged(b).W, expected) < rounding<double>);
    if (b == 5) {
      CHECK(gap(folded.merged(b).W, expected) < rounding<double>);
    } else {
      CHECK(gap(folded.merged(b).W, expected) > 0.1);
    }
  }
}

TEST_CASE("frozen links stay as they are while the last one learns") {
  Rng rng(1);
  Linear<double, Chain<LowRank<double>>> layer(MatrixX<double>(noise<double>(out, in, 3)), chain_of<double>({5, 5}, {3, 3}));
  layer.adapter.extend({.max_rank = 6, .alpha = 3}, rng);
  const auto before = layer.adapter;
  auto gradients = zeros_like(layer);
  AdamW optimizer(layer, {.lr = 0.01, .weight_decay = 0.1});
  Linear<double, Chain<LowRank<double>>>::Cache cache;
  const MatrixX<double> x = noise<double>(in, 30, 1), target = noise<double>(out, 30, 2);
  double first = 0, last = 0;
  for (int step = 0; step < 100; ++step) {
    set_zero(layer, gradients);
    const auto loss = mse(layer.forward(x, 1 + step % 6, cache), target);
    if (step % 6 == 5) (step < 6 ? first : last) = loss.value;
    layer.backward(loss.gradient, cache, gradients);
    optimizer.step(layer, gradients);
  }
  CHECK(last < first);
  for (std::size_t j = 0; j < 2; ++j)
    CHECK(same_bits(values<LowRank<double>>(layer.adapter.links[j]), values<LowRank<double>>(before.links[j])));
  CHECK((layer.adapter.links[2].B.array() != 0).all());
}

TEMPLATE_TEST_CASE("a chain whose last link is cut is cut whole", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(in, 6, 1), dy = noise<S>(out, 6, 2);
  for (const std::vector<Index>& ranks : {std::vector<Index>{5, 5, 5}, {2, 3, 5}, {4, 5, 5}}) {
    const Chain<LowRank<S>> chain = chain_of<S>(ranks);
    for (Index components = 0; components <= 5; ++components) {
      Chain<LowRank<S>> cut = chain;
      truncate(cut, components);
      CHECK(cut.max_rank() == 5);
      CHECK(cut.components() == components);
      CHECK(adapter_ranks(cut)[0].rank == components);
      for (Index b = 1; b <= 5; ++b) {
        const Index left = std::min(b, components);
        const RankSlice rank = left == 0 ? RankSlice::none() : RankSlice(left);
        CHECK(same_bits(cut.delta(b), chain.delta(rank)));
        CHECK(same_bits(run(cut, x, dy, b, {}).y, run(chain, x, dy, rank, {}).y));
        CHECK(same_bits(run(cut, x, dy, b, {}).dx, run(chain, x, dy, rank, {}).dx));
        CHECK(cut.factors(b).A.rows() == chain.factors(left).A.rows());
      }
      Rng rng(1);
      Chain<LowRank<S>> extended = cut;
      extended.extend(rng);  // does not bring back what was cut
      for (Index b = 1; b <= 5; ++b) CHECK(same_bits(extended.delta(b), cut.delta(b)));
      // Cut again, to more and to less than before.
      for (Index again = 0; again <= 5; ++again) {
        Chain<LowRank<S>> twice = extended;
        truncate(twice, again);
        const RankSlice left = again == 0 ? RankSlice::none() : RankSlice(again);
        for (Index b = 1; b <= 5; ++b) CHECK(same_bits(twice.delta(b), extended.delta(b > again ? left : RankSlice(b))));
      }
    }
  }
}

TEST_CASE("a link of which the first components alone have been trained is a smaller link") {
  Rng rng(1);
  Linear<double, Chain<LowRank<double>>> layer(MatrixX<double>(noise<double>(out, in, 3)), chain_of<double>({5, 5}, {3, 3}));
  layer.adapter.extend(rng);
  auto gradients = zeros_like(layer);
  AdamW optimizer(layer, {.lr = 0.01});
  Linear<double, Chain<LowRank<double>>>::Cache cache;
  for (Index step = 0; step < 10; ++step) {
    set_zero(layer, gradients);
    const auto loss = mse(layer.forward(noise<double>(in, 30, 1), 1 + step % 2, cache), noise<double>(out, 30, 2));
    layer.backward(loss.gradient, cache, gradients);
    optimizer.step(layer, gradients);
  }
  const LowRank<double>& link = layer.adapter.links.back();
  CHECK(link.B.rightCols(3).isZero(0));
  CHECK((link.B.leftCols(2).array() != 0).all());
  const RowMatrix<double> A = link.A.topRows(2);
  const MatrixX<double> B = link.B.leftCols(2);
  for (Index b = 3; b <= 5; ++b) CHECK(gap(link.delta(b), MatrixX<double>(link.scale(b) * B * A)) < rounding<double>);
}

TEMPLATE_TEST_CASE("a chain's factors are its delta and are taken as one link", "", float, double) {
  using S = TestType;
  for (const std::vector<double>& alphas : {std::vector<double>{3, 3, 3}, {3, 5, 1}}) {
    const Chain<LowRank<S>> chain = chain_of<S>({3, 4, 5}, alphas);
    for (Index b = 0; b <= 5; ++b) {
      const LowRankFactors<S> factors = chain.factors(b);
      const Index rank = std::min<Index>(b, 3) + std::min<Index>(b, 4) + b;
      CHECK(factors.A.rows() == rank);
      const MatrixX<S> delta = b == 0 ? chain.delta(RankSlice::none()) : chain.delta(b);
      const MatrixX<S> product = static_cast<S>(factors.scale) * factors.B * factors.A;
      CHECK(gap(in_double(product), in_double(delta)) < rounding<S>);
      Chain<LowRank<S>> taken = chain;
      taken.set_factors(factors);
      CHECK(taken.links.size() == 1);
      CHECK(taken.max_rank() == rank);
      if (b > 0) CHECK(gap(in_double(taken.delta(rank)), in_double(delta)) < rounding<S>);
      const LowRankFactors<S> again = taken.factors(rank);
      CHECK(same_bits(MatrixX<S>(again.A), MatrixX<S>(factors.A)));
      CHECK(same_bits(again.B, factors.B));
    }
  }
}

TEMPLATE_TEST_CASE("factors of another's adapter are in a chain at every rank what they are by themselves", "", float, double) {
  using S = TestType;
  const LowRankFactors<S> factors{noise<S>(4, in, 1), noise<S>(out, 4, 2), 0.5};
  for (const std::vector<Index>& ranks : {std::vector<Index>{5}, {5, 5}, {2, 2}, {4, 4}}) {  // of two links, 4 = 2 + 2
    Chain<LowRank<S>> chain = chain_of<S>(ranks);
    LowRank<S> alone = chain.links.back();
    chain.set_factors(factors);
    alone.set_factors(factors);
    CHECK(chain.max_rank() == 4);
    for (Index b = 1; b <= 4; ++b) CHECK(same_bits(chain.delta(b), alone.delta(b)));
  }
}

TEST_CASE("a folded chain goes into the weight with all its links and begins with one") {
  Linear<double, Chain<LowRank<double>>> layer(MatrixX<double>(noise<double>(out, in, 3)), chain_of<double>({5, 5, 5}));
  const MatrixX<double> whole = layer.merged(5).W;
  Rng rng(1);
  fold(layer, 5, rng);
  CHECK(same_bits(layer.base.W, whole));
  CHECK(layer.adapter.links.size() == 1);
  CHECK(layer.adapter.delta(5).isZero(0));
}

TEST_CASE("chains that do not fit are refused and say what was expected and what came") {
  using C = Chain<LowRank<double>>;
  CHECK_THROWS_SAYING(std::invalid_argument, C(std::vector<LowRank<double>>{}, options), "Chain", "at least one link", "got none");
  Rng rng(1);
  std::vector<LowRank<double>> links;
  links.emplace_back(in, out, options, rng);
  links.emplace_back(in + 1, out, options, rng);
  CHECK_THROWS_SAYING(ShapeError, C(links, options), "Chain: in_features of a link", "expected 10", "got 9");
  CHECK_THROWS_SAYING(std::invalid_argument, chain_of<double>({5, 5, 2}), "Chain: max_rank of a link",
                      "at least that of the link before it, 5", "got 2");
  C chain = chain_of<double>({5, 5, 5});
  const C before = chain;
  CHECK_THROWS_SAYING(std::invalid_argument, chain.extend({.max_rank = 99}, rng), "max_rank", "got 99");
  CHECK_THROWS_SAYING(std::invalid_argument, chain.extend({.max_rank = 4}, rng), "Chain::extend: max_rank of a link",
                      "at least that of the link before it, 5", "got 4");
  CHECK(chain.links.size() == 3);
  CHECK_THROWS_SAYING(std::invalid_argument, chain.factors(6), "Chain::factors: rank", "[0, 5]", "got 6");
  CHECK_THROWS_SAYING(ShapeError, chain.set_factors({noise<double>(2, in + 1, 1), noise<double>(out, 2, 1), 1}), "set_factors",
                      "columns of A", "expected 9", "got 10");
  CHECK_THROWS_SAYING(ShapeError, chain.set_factors({noise<double>(2, in, 1), noise<double>(out, 3, 1), 1}), "LowRank", "columns of B",
                      "expected 2", "got 3");
  CHECK_THROWS_SAYING(std::invalid_argument, chain.set_factors({noise<double>(3, in, 1), noise<double>(out, 3, 1), -1}), "alpha");
  CHECK(same_bits(chain.delta(5), before.delta(5)));
  // A cache from before the chain grew.
  C::Cache cache;
  MatrixX<double> y = MatrixX<double>::Zero(out, 2), dx = MatrixX<double>::Zero(in, 2);
  chain.add_forward(noise<double>(in, 2, 1), 2, cache, y);
  chain.extend(rng);
  auto gradients = zeros_like(chain);
  CHECK_THROWS_SAYING(ShapeError, chain.add_backward(noise<double>(in, 2, 1), noise<double>(out, 2, 1), cache, gradients, dx),
                      "links in the cache", "expected 4", "got 3");
  // Of a chain whose frozen links, and of one whose last link, had more components.
  C smaller_frozen = chain_of<double>({2, 2, 5}), cut = before;
  truncate(cut, 1);
  const auto refused = [&](const C& other, auto call) {
    C::Cache of_larger;
    MatrixX<double> dx_of_other = MatrixX<double>::Zero(in, 2);
    auto its_gradients = zeros_like(other);
    before.add_forward(noise<double>(in, 2, 1), 3, of_larger, y);
    call([&] { other.add_backward(noise<double>(in, 2, 1), noise<double>(out, 2, 1), of_larger, its_gradients, dx_of_other); });
    CHECK(dx_of_other.isZero(0));
    CHECK(values<C>(its_gradients).isZero(0));
  };
  refused(smaller_frozen, [](auto call) {
    CHECK_THROWS_SAYING(ShapeError, call(), "components of a frozen link, against the cache", "expected 2", "got 5");
  });
  refused(cut, [](auto call) { CHECK_THROWS_SAYING(std::invalid_argument, call(), "the cache", "max_rank = 1", "got 3"); });
}

TEST_CASE("the gradients of a chain serve another of the same last link, and its workspace any other") {
  const MatrixX<double> x = noise<double>(in, 6, 1), dy = noise<double>(out, 6, 2);
  auto gradients = zeros_like(chain_of<double>({5, 5, 5}));
  Chain<LowRank<double>>::Workspace workspace;
  for (const std::vector<Index>& ranks : {std::vector<Index>{5, 5, 5}, {2, 3, 5}, {5, 5, 5}, {5}, {1, 2, 3, 5}}) {
    const Chain<LowRank<double>> chain = chain_of<double>(ranks);
    const auto expected = run(chain, x, dy, 5, {});
    MatrixX<double> y = MatrixX<double>::Zero(out, 6), dx = MatrixX<double>::Zero(in, 6);
    Chain<LowRank<double>>::Cache cache;
    set_zero(chain, gradients);
    chain.add_forward(x, 5, cache, y);
    chain.add_backward(x, dy, cache, gradients, workspace, dx);
    CHECK(same_bits(dx, expected.dx));
    CHECK(same_bits(values<LowRank<double>>(gradients.last), values<LowRank<double>>(expected.gradients.last)));
  }
}

}  // namespace dylora::test
