#include "dylora/methods/nola/counter_noise.hpp"
#include "dylora/methods/nola/factors.hpp"
#include "dylora/methods/nola/nola.hpp"
#include "dylora/methods/nola/random_bases.hpp"
#include "dylora/testing/gradient_check.hpp"

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "dylora/ranks/truncate.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/loss.hpp"
#include "methods/nola/nola_under_test.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/threads.hpp"

namespace dylora::test {

template <class S>
using NestedRanks = Nola<S>;
template <class S>
using NestedBases = NolaBases<S>;

template <class S>
inline constexpr bool couples_components<NolaBases<S>> = true;  // each coefficient of a factor sees all of the other factor

using AdaptersUnderTest = InFloatAndDouble<NestedRanks, NestedBases>;

}  // namespace dylora::test

#include "laws/adapter_laws.hpp"

namespace dylora::test {

namespace {

constexpr Index in = 9, out = 7, R = 5;

template <class N>
N fresh(NolaOptions options, std::uint64_t seed = 1, Index in_features = in, Index out_features = out) {
  Rng rng(seed);
  return N(in_features, out_features, options, rng);
}

template <class N>
N trained(NolaOptions options, std::uint64_t seed = 1, Index in_features = in, Index out_features = out) {
  N adapter = fresh<N>(options, seed, in_features, out_features);
  randomize<N>(adapter, seed + 1);
  return adapter;
}

/// Basis i of one factor as its documentation says: 1 of A (r × in), 2 of B (out × r); A_0 is the only one of 0.
template <class S>
MatrixX<S> basis(std::uint64_t seed, int which, Index i, Index rows, Index cols, double bound) {
  const RandomBases<S> bases{CounterNoise(seed).stream(which)};
  MatrixX<S> result(rows, cols);
  for (Index r = 0; r < rows; ++r) {
    for (Index c = 0; c < cols; ++c) {
      result(r, c) = static_cast<S>(bound) * (which == 2 ? bases.entry(i, r, c) : bases.entry(i, c, r));
    }
  }
  return result;
}

struct Factors {
  MatrixX<double> A, B;
};

/// The factors at rank b with every basis in memory.
template <class S, NolaNesting nesting>
Factors materialized(const Nola<S, nesting>& adapter, Index b) {
  const bool all = nesting == NolaNesting::rank, language = adapter.options.variant == NolaVariant::language;
  const Index r = all ? b : adapter.options.max_rank, k = all ? adapter.alpha.size() : b;
  const Index i = adapter.in_features(), o = adapter.out_features();
  const auto bound = [](Index n) { return 1 / std::sqrt(static_cast<double>(n)); };
  Factors factors{MatrixX<double>::Zero(r, i), MatrixX<double>::Zero(o, r)};
  if (language) factors.A = basis<double>(adapter.seed, 0, 0, r, i, bound(i));
  for (Index n = 0; n < k; ++n) {
    factors.A += static_cast<double>(adapter.alpha[n]) * basis<double>(adapter.seed, 1, n, r, i, bound(language ? k : i));
    factors.B +=
        static_cast<double>(adapter.beta[n]) * basis<double>(adapter.seed, 2, n, o, r, bound(language ? k : adapter.options.max_rank));
  }
  return factors;
}

template <class N>
void check_against_materialized(NolaOptions options, Index in_features, Index out_features) {
  using S = typename N::Scalar;
  const N adapter = trained<N>(options, 3, in_features, out_features);
  for (Index b = 1; b <= adapter.max_rank(); ++b) {
    const Factors expected = materialized(adapter, b);
    const LowRankFactors<S> got = adapter.factors(b);
    CHECK(gap(in_double<S>(got.A), expected.A) < rounding<S>);
    CHECK(gap(in_double(got.B), expected.B) < rounding<S>);
    const double scale = options.alpha / static_cast<double>(expected.A.rows());
    CHECK(got.scale == scale);
    const MatrixX<S> x = noise<S>(in_features, 4, 3), dy = noise<S>(out_features, 4, 4);
    const auto result = run(adapter, x, dy, b);
    const MatrixX<double> h = expected.A.lazyProduct(in_double(x)), dh = scale * expected.B.transpose().lazyProduct(in_double(dy));
    CHECK(gap(in_double(result.y), scale * expected.B.lazyProduct(h)) < rounding<S>);
    CHECK(gap(in_double(result.dx), expected.A.transpose().lazyProduct(dh)) < rounding<S>);
    // Each coefficient's gradient is that of LoRA's factor along its basis.
    const MatrixX<double> dA = dh.lazyProduct(in_double(x).transpose()), dB = scale * in_double(dy).lazyProduct(h.transpose());
    const Index k = std::same_as<N, Nola<S>> ? options.bases : b, r = expected.A.rows();
    MatrixX<double> alpha(k, 1), beta(k, 1);
    const bool language = options.variant == NolaVariant::language;
    for (Index i = 0; i < k; ++i) {
      const double of_A = std::sqrt(static_cast<double>(language ? k : in_features));
      const double of_B = std::sqrt(static_cast<double>(language ? k : options.max_rank));
      alpha(i, 0) = dA.cwiseProduct(basis<double>(adapter.seed, 1, i, r, in_features, 1 / of_A)).sum();
      beta(i, 0) = dB.cwiseProduct(basis<double>(adapter.seed, 2, i, out_features, r, 1 / of_B)).sum();
    }
    CHECK(gap(in_double<S>(result.gradients.alpha.head(k)), alpha) < rounding<S>);
    CHECK(gap(in_double<S>(result.gradients.beta.head(k)), beta) < rounding<S>);
  }
}

const std::vector<NolaVariant> variants{NolaVariant::language, NolaVariant::vision};

}  // namespace

TEMPLATE_TEST_CASE("oracle of NOLA: a fresh adapter with A_0 leaves the base's output as it is bit for bit", "", float, double) {
  using S = TestType;
  const MatrixX<S> W = noise<S>(out, in, 1), x = noise<S>(in, 4, 2);
  const MatrixX<S> base = FrozenLinear<S>(DenseWeight<S>(W)).forward(x, RankSlice::none());
  Rng rng(5);
  const Linear<S, Nola<S>> ranks(W, {.max_rank = R, .bases = 16}, rng);
  const Linear<S, NolaBases<S>> bases(W, {.max_rank = R, .bases = 16}, rng);
  CHECK_FALSE(ranks.adapter.factors(R).A.isZero(0));
  for (Index b = 1; b <= R; ++b) {
    CHECK(same_bits(ranks.forward(x, b), base));
    CHECK(same_bits(bases.forward(x, b), base));
    CHECK(same_bits(ranks.merged(b).dense(), W));
  }
}

TEMPLATE_TEST_CASE("oracle of NOLA: made again the factors are the same bit for bit, on any number of threads and at any rank", "", float,
                   double) {
  using S = TestType;
  const NolaOptions options{.max_rank = 8, .bases = 40};
  const Nola<S> adapter = trained<Nola<S>>(options, 3, 700, 530);  // past the threshold for threads, and no multiple of a tile
  const MatrixX<S> x = noise<S>(700, 20, 1), dy = noise<S>(530, 20, 2);
  const LowRankFactors<S> whole = adapter.factors(8);
  for (Index b = 1; b <= 8; ++b) {
    const LowRankFactors<S> factors = adapter.factors(b), again = adapter.factors(b);
    CHECK(same_bits(MatrixX<S>(factors.A), MatrixX<S>(again.A)));
    CHECK(same_bits(factors.B, again.B));
    CHECK(same_bits(MatrixX<S>(factors.A), MatrixX<S>(whole.A.topRows(b))));  // what is past b is not needed for it
    CHECK(same_bits(factors.B, MatrixX<S>(whole.B.leftCols(b))));
  }
  const Nola<S> other(700, 530, options, adapter.seed, adapter.alpha, adapter.beta);  // which knows no more than the seed
  CHECK(same_bits(other.delta(5), adapter.delta(5)));
  const auto everything = [&] {
    const auto result = run(adapter, x, dy, 6);
    return joined<S>({result.y.reshaped(), result.dx.reshaped(), values<Nola<S>>(result.gradients)});
  };
  const VectorX<S> expected = everything();
  for_each_threading(everything, [&](const auto& got, const std::string& where) {
    INFO(where);
    CHECK(same_bits(got, expected));
  });
}

TEMPLATE_TEST_CASE("oracle of NOLA: streamed bases give what bases in memory give", "", float, double) {
  using S = TestType;
  for (const NolaVariant variant : variants) {
    for (const Index bases : {1, 2, 20}) {
      check_against_materialized<Nola<S>>({.max_rank = 4, .bases = bases, .alpha = 3, .variant = variant}, in, out);
      check_against_materialized<NolaBases<S>>({.max_rank = 4, .bases = bases, .alpha = 3, .variant = variant}, in, out);
    }
  }
  check_against_materialized<Nola<S>>({.max_rank = 2, .bases = 3, .alpha = 3}, 300, 257);  // more than a tile
}

TEST_CASE("oracle of NOLA: the gradients of the coefficients are those of differences") {
  const auto check = [](const auto& adapter) {
    for (const RankSlice rank : law_slices()) {
      Rng rng(4);
      const GradientReport report = check_gradients(adapter, noise<double>(in, 4, 2), rank, rng);
      INFO(report.where << " at " << describe(rank));
      CHECK(report.entries == 4 * in + parameter_count(adapter));
      CHECK(report.error < 1e-6);
    }
  };
  for (const NolaVariant variant : variants) {
    check(trained<Nola<double>>({.max_rank = R, .bases = 30, .alpha = 3, .variant = variant}));
    check(trained<NolaBases<double>>({.max_rank = 3, .bases = 30, .alpha = 3, .variant = variant}));
  }
}

TEMPLATE_TEST_CASE("oracle of NOLA: a single coefficient of one picks exactly its basis", "", float, double) {
  using S = TestType;
  constexpr Index k = 9;
  Nola<S> adapter = fresh<Nola<S>>({.max_rank = R, .bases = k, .variant = NolaVariant::vision});
  std::vector<MatrixX<S>> seen;
  for (Index i = 0; i < k; ++i) {
    for (Index j = 0; j < k; ++j) {
      adapter.alpha = VectorX<S>::Unit(k, i);
      adapter.beta = VectorX<S>::Unit(k, j);
      const LowRankFactors<S> factors = adapter.factors(R);
      CHECK(same_bits(MatrixX<S>(factors.A), basis<S>(adapter.seed, 1, i, R, in, 1 / std::sqrt(static_cast<double>(in)))));
      CHECK(same_bits(factors.B, basis<S>(adapter.seed, 2, j, out, R, 1 / std::sqrt(static_cast<double>(R)))));
      if (i == j) seen.push_back(factors.A);
    }
  }
  for (std::size_t i = 0; i < seen.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) CHECK_FALSE(same_bits(seen[i], seen[j]));
  }
}

TEMPLATE_TEST_CASE("oracle of NOLA: zero coefficients without A_0 have no gradient, ever", "", float, double) {
  using S = TestType;
  using N = Nola<S>;
  const MatrixX<S> x = noise<S>(in, 4, 3), target = noise<S>(out, 4, 4);
  // No options make it: it has to be asked for, by its coefficients.
  const VectorX<S> zero = VectorX<S>::Zero(6);
  const auto steps_from = [&](N adapter) {
    AdamW optimizer(adapter, {.lr = 0.1, .weight_decay = 0.1});
    auto gradients = zeros_like(adapter);
    for (int step = 0; step < 5; ++step) {
      set_zero(adapter, gradients);
      typename N::Cache cache;
      MatrixX<S> y = MatrixX<S>::Zero(out, 4), dy = y, dx = MatrixX<S>::Zero(in, 4);
      adapter.add_forward(x, 3, cache, y);
      (void)mse<S>(y, target, dy);
      adapter.add_backward(x, dy, cache, gradients, dx);
      optimizer.step(adapter, gradients);
    }
    return adapter;
  };
  const NolaOptions vision{.max_rank = R, .bases = 6, .variant = NolaVariant::vision}, language{.max_rank = R, .bases = 6};
  const N dead = steps_from(N(in, out, vision, 1, zero, zero));
  CHECK(values<N>(dead).isZero(0));
  CHECK(values<N>(run(dead, x, target, R).gradients).isZero(0));
  CHECK_FALSE(steps_from(N(in, out, language, 1, zero, zero)).beta.isZero(0));
  for (const NolaVariant variant : variants) {
    N alive = fresh<N>({.max_rank = R, .bases = 6, .variant = variant});
    CHECK_FALSE(values<N>(run(alive, x, target, R).gradients).isZero(0));
  }
}

TEMPLATE_TEST_CASE("in the first step of a language adapter only beta moves", "", float, double) {
  using S = TestType;
  const auto gradients = run(fresh<Nola<S>>({.max_rank = R, .bases = 6}), noise<S>(in, 4, 3), noise<S>(out, 4, 4), 3).gradients;
  CHECK(gradients.alpha.isZero(0));
  CHECK((gradients.beta.array() != 0).all());
}

TEMPLATE_TEST_CASE("a vision adapter starts at the mean of its bases", "", float, double) {
  using S = TestType;
  const Nola<S> adapter = fresh<Nola<S>>({.max_rank = R, .bases = 4, .variant = NolaVariant::vision});
  CHECK((adapter.alpha.array() == S(0.25)).all());
  CHECK((adapter.beta.array() == S(0.25)).all());
  MatrixX<double> mean = MatrixX<double>::Zero(out, R);
  for (Index i = 0; i < 4; ++i) mean += basis<double>(adapter.seed, 2, i, out, R, 0.25 / std::sqrt(static_cast<double>(R)));
  CHECK(gap(in_double(adapter.factors(R).B), mean) < rounding<S>);
  CHECK_FALSE(adapter.delta(1).isZero(0));
}

TEMPLATE_TEST_CASE("what a call of NOLA keeps does not grow with the number of bases", "", float, double) {
  using S = TestType;
  const auto kept = [](Index bases) {
    const Nola<S> adapter = trained<Nola<S>>({.max_rank = R, .bases = bases});
    typename Nola<S>::Cache cache;
    auto gradients = zeros_like(adapter);
    MatrixX<S> y = MatrixX<S>::Zero(out, 4), dx = MatrixX<S>::Zero(in, 4);
    adapter.add_forward(noise<S>(in, 4, 3), 4, cache, y);
    typename Nola<S>::Workspace workspace;
    adapter.add_backward(noise<S>(in, 4, 3), noise<S>(out, 4, 4), cache, gradients, workspace, dx);
    const auto size = [](const auto& buffer) { return buffer.rows() * buffer.cols(); };
    return std::vector<Index>{size(cache.A), size(cache.B), size(cache.h), size(workspace.dA), size(workspace.dB), size(workspace.dh)};
  };
  const std::vector<Index> expected{4 * in, 4 * out, 4 * 4, 4 * in, 4 * out, 4 * 4};
  for (const Index bases : {1, 16, 1024}) CHECK(kept(bases) == expected);
}

TEMPLATE_TEST_CASE("truncation of nested bases shortens what is stored and of nested ranks nothing", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(in, 4, 3), dy = noise<S>(out, 4, 4);
  const NolaBases<S> whole = trained<NolaBases<S>>({.max_rank = R, .bases = 20, .alpha = 3});
  CHECK(adapter_ranks(whole) == std::vector<AdapterRank>{{"", 20, 2}});
  CHECK(whole.max_rank() == 20);
  for (const Index k : {1, 7, 20}) {
    NolaBases<S> cut = whole;
    truncate(cut, k);
    CHECK(parameter_count(cut) == 2 * k);
    CHECK(cut.max_rank() == 20);
    CHECK(cut.components() == k);
    const NolaBases<S> stored(in, out, whole.options, cut.seed, cut.alpha, cut.beta);  // of the bases that are left
    CHECK(stored.max_rank() == k);
    for (const Index b : {Index{1}, k, Index{20}}) {
      const Index used = std::min(b, k);
      CHECK(same_bits(cut.delta(b), whole.delta(used)));
      CHECK(same_bits(stored.delta(used), whole.delta(used)));
      CHECK(same_bits(run(cut, x, dy, b).y, run(whole, x, dy, used).y));
    }
    CHECK(whole.factors(k).A.rows() == R);
    CHECK(whole.scale(k) == static_cast<S>(3.0 / R));
  }
  Nola<S> ranks = trained<Nola<S>>({.max_rank = R, .bases = 20, .alpha = 3});
  CHECK(adapter_ranks(ranks).empty());
  truncate(ranks, 2);
  CHECK(parameter_count(ranks) == 40);
  CHECK(ranks.max_rank() == R);
}

TEMPLATE_TEST_CASE("a basis reaches no sample of a batch that is without it", "", float, double) {
  using S = TestType;
  using N = NolaBases<S>;
  const N adapter = trained<N>({.max_rank = 3, .bases = R, .alpha = 3});
  const MatrixX<S> x = noise<S>(in, 5, 1), dy = noise<S>(out, 5, 2);
  for (const std::vector<RankSlice>& mix : law_mixes()) {
    const auto clean = run(adapter, x, dy, BatchRanks::per_sample(mix));
    for (Index spoilt = 0; spoilt <= R; ++spoilt) {
      N poisoned = adapter;
      fill_components<N>(poisoned, nan<S>, spoilt);
      const auto got = run(poisoned, x, dy, BatchRanks::per_sample(mix));
      std::vector<RankSlice> without = mix;  // a coefficient of one factor has the other in its gradient: of the samples that have all
      for (RankSlice& rank : without) rank = rank.active <= spoilt ? rank : RankSlice::none();
      for (std::size_t i = 0; i < mix.size(); ++i) {
        if (mix[i].active > spoilt) continue;
        const Index column = static_cast<Index>(i);
        CHECK(same_bits(MatrixX<S>(got.y.col(column)), MatrixX<S>(clean.y.col(column))));
        CHECK(same_bits(MatrixX<S>(got.dx.col(column)), MatrixX<S>(clean.dx.col(column))));
      }
      const BatchRanks left = BatchRanks::per_sample(without);
      CHECK(run(poisoned, x, dy, left) == run(adapter, x, dy, left));
    }
  }
}

TEMPLATE_TEST_CASE("a frozen prefix of nested bases gets no gradient and what is trained gets that of nested mode", "", float, double) {
  using S = TestType;
  using N = NolaBases<S>;
  const N adapter = trained<N>({.max_rank = 3, .bases = R, .alpha = 3});
  const MatrixX<S> x = noise<S>(in, 5, 1), dy = noise<S>(out, 5, 2);
  for (Index b = 1; b <= R; ++b) {
    const auto nested = run(adapter, x, dy, b);
    for (Index t = 0; t <= b; ++t) {
      const auto frozen = run(adapter, x, dy, {b, t});
      CHECK(same_bits(frozen.y, nested.y));
      CHECK(same_bits(frozen.dx, nested.dx));
      CHECK(component_values<N>(frozen.gradients, 0, t).isZero(0));
      CHECK(same_bits(component_values<N>(frozen.gradients, t), component_values<N>(nested.gradients, t)));
      for (Index i = 0; i < R; ++i) CHECK(frozen.gradients.alpha.components.contains(i) == (i >= t && i < b));
    }
  }
}

TEMPLATE_TEST_CASE("a linear layer with NOLA is its base and the adapter, and can be merged", "", float, double) {
  using S = TestType;
  const auto check = [](const auto& adapter) {
    using A = std::remove_cvref_t<decltype(adapter)>;
    using L = Linear<S, A>;
    const MatrixX<S> W = noise<S>(out, in, 1), x = noise<S>(in, 5, 2), dy = noise<S>(out, 5, 3);
    const L layer(W, adapter);
    for (const BatchRanks& ranks : {BatchRanks(3), BatchRanks(5, 4), BatchRanks::per_sample({5, 5, 1, RankSlice::none(), {3, 2}})}) {
      typename L::Cache cache;
      auto gradients = zeros_like(layer);
      const MatrixX<S> y = layer.forward(x, ranks, cache), dx = layer.backward(dy, cache, gradients);
      const auto alone = run(adapter, x, dy, ranks);
      CHECK(gap(in_double(y), in_double<S>(W).lazyProduct(in_double(x)) + in_double(alone.y)) < rounding<S>);
      CHECK(gap(in_double(dx), in_double<S>(W).transpose().lazyProduct(in_double(dy)) + in_double(alone.dx)) < rounding<S>);
      CHECK(same_bits(values<L>(gradients), values<A>(alone.gradients)));
    }
    CHECK(gap(in_double(layer.merged(4).dense()).lazyProduct(in_double(x)), in_double(layer.forward(x, 4))) < rounding<S>);
  };
  check(trained<Nola<S>>({.max_rank = R, .bases = 12, .alpha = 3}));
  check(trained<NolaBases<S>>({.max_rank = 3, .bases = R, .alpha = 3}));
}

TEMPLATE_TEST_CASE("the number of coefficients depends on neither features nor rank", "", float, double) {
  using S = TestType;
  for (const Index features : {10, 300}) {
    for (const Index rank : {1, 8}) {
      const Nola<S> adapter = fresh<Nola<S>>({.max_rank = rank, .bases = 12}, 1, features, features + 3);
      CHECK(parameter_count(adapter) == 24);
      CHECK(names(adapter) == std::vector<std::string>{"nola_alpha", "nola_beta"});
      CHECK(adapter.delta(rank).rows() == features + 3);
      CHECK(adapter.delta(rank).cols() == features);
    }
  }
}

TEST_CASE("adapters made one after the other have bases of their own and the same seed has the same") {
  Rng rng(1), same(1);
  using N = Nola<double>;
  const NolaOptions options{.max_rank = R, .bases = 6};
  const N one(in, out, options, rng), other(in, out, options, rng), again(in, out, options, same);
  CHECK(one.seed != other.seed);
  CHECK(one.seed == again.seed);
  const auto A_of = [](const N& adapter) { return MatrixX<double>(adapter.factors(R).A); };
  CHECK_FALSE(same_bits(A_of(one), A_of(other)));
  CHECK(same_bits(A_of(one), A_of(again)));
}

TEST_CASE("A_0 is uniform within one over the root of in") {
  const MatrixX<double> A = fresh<Nola<double>>({.max_rank = 40, .bases = 1}, 1, 400, 50).factors(40).A * std::sqrt(400.0);
  CHECK(A.cwiseAbs().maxCoeff() < 1);
  CHECK(A.cwiseAbs().maxCoeff() > 0.999);
  CHECK(std::abs(A.cwiseAbs().mean() - 0.5) < 0.01);  // 16000 draws, with a deviation of 0.0023
  CHECK(std::abs(A.mean()) < 0.02);                   // and of 0.0046
}

TEST_CASE("NOLA of largest rank 0 or without bases is no adapter and takes any rank") {
  const auto check = [](const auto& none) {
    CHECK(none.max_rank() == 0);
    const auto result = run(none, noise<float>(in, 4, 3), noise<float>(out, 4, 4), 3);
    CHECK(result.y.isZero(0));
    CHECK(result.dx.isZero(0));
    CHECK(parameter_count(none) == 0);
    CHECK(none.delta(3).isZero(0));
    CHECK(none.delta(3).rows() == out);
    CHECK(none.factors(0).B.rows() == out);
  };
  for (const NolaVariant variant : variants) {
    check(fresh<Nola<float>>({.max_rank = 0, .variant = variant}));
    check(fresh<Nola<float>>({.max_rank = 3, .bases = 0, .variant = variant}));
    check(fresh<NolaBases<float>>({.max_rank = 0, .variant = variant}));
    check(fresh<NolaBases<float>>({.max_rank = 3, .bases = 0, .variant = variant}));
  }
}

TEST_CASE("NOLA refuses options and coefficients that do not fit") {
  Rng rng(1);
  using N = Nola<float>;
  CHECK_THROWS_SAYING(std::invalid_argument, N(9, 7, {.max_rank = 8}, rng), "Nola: max_rank", "[0, 7]", "got 8");
  CHECK_THROWS_SAYING(std::invalid_argument, N(9, 7, {.max_rank = 2, .bases = -1}, rng), "Nola: bases", "[0, ", "got -1");
  for (const double alpha : {0.0, -1.0, nan<double>, std::numeric_limits<double>::infinity()}) {
    CHECK_THROWS_SAYING(std::invalid_argument, N(9, 7, {.max_rank = 2, .alpha = alpha}, rng), "Nola: alpha", "finite number > 0");
  }
  const VectorX<float> five = VectorX<float>::Ones(5), four = VectorX<float>::Ones(4);
  CHECK(N(9, 7, {.max_rank = 2}, 1, five, five).options.bases == 5);
  CHECK_THROWS_SAYING(ShapeError, N(9, 7, {.max_rank = 2}, 1, five, four), "Nola: coefficients of B", "expected 5", "got 4");

  N adapter = trained<N>({.max_rank = R, .bases = 5});
  CHECK_THROWS_SAYING(std::invalid_argument, adapter.factors(6), "Nola::factors: rank", "[0, 5]", "got 6");
  N::Cache cache;
  MatrixX<float> y = MatrixX<float>::Zero(out, 4), dx = MatrixX<float>::Zero(in, 4);
  adapter.alpha = adapter.beta = four;
  CHECK_THROWS_SAYING(ShapeError, adapter.add_forward(noise<float>(in, 4, 3), 2, cache, y), "Nola: coefficients of A", "expected 5",
                      "got 4");
  CHECK(y.isZero(0));
  NolaBases<float> bases = trained<NolaBases<float>>({.max_rank = R, .bases = 3});
  bases.alpha = bases.beta = four;
  CHECK_THROWS_SAYING(std::invalid_argument, bases.delta(2), "Nola: coefficients of A", "[0, 3]", "got 4");

  // A cache that an adapter of another weight has filled.
  const N wide = trained<N>({.max_rank = R, .bases = 5}, 1, in + 1, out), narrow = trained<N>({.max_rank = R, .bases = 5});
  wide.add_forward(noise<float>(in + 1, 4, 3), 2, cache, y);
  auto gradients = zeros_like(narrow);
  CHECK_THROWS_SAYING(ShapeError, narrow.add_backward(noise<float>(in, 4, 3), noise<float>(out, 4, 4), cache, gradients, dx),
                      "in_features of the cached A", "expected 9", "got 10");
  CHECK(values<N>(gradients).isZero(0));
}

}  // namespace dylora::test
