#include "dylora/layers/embedding.hpp"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "dylora/layers/linear.hpp"
#include "dylora/ranks/truncate.hpp"
#include "dylora/train/adamw.hpp"
#include "support/catch.hpp"
#include "support/law.hpp"
#include "support/threads.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

inline constexpr Index vocabulary = 11, width = 6;
inline const std::vector<Index> ids{3, 0, 7, 3, 10, 3, 0};  // 3 and 0 come again; 1, 2, 4, 5, 6, 8 and 9 do not occur
inline const Index tokens = 7;

template <class S>
Embedding<S> make_embedding(bool trained, Index max_rank = law_rank) {
  Rng rng(5);
  Embedding<S> embedding(noise<S>(width, vocabulary, 4), {.max_rank = max_rank, .alpha = 3}, rng);
  if (trained) randomize<Embedding<S>>(embedding, 6);
  return embedding;
}

template <class S>
struct Result {
  MatrixX<S> y;
  typename Embedding<S>::Gradients gradients;

  bool operator==(const Result& other) const {
    return same_bits(y, other.y) && same_bits(values<Embedding<S>>(gradients), values<Embedding<S>>(other.gradients)) &&
           trained_components<Embedding<S>>(gradients) == trained_components<Embedding<S>>(other.gradients);
  }
};

template <class S>
Result<S> run(const Embedding<S>& embedding, std::span<const Index> tokens_, const MatrixX<S>& dy, const BatchRanks& ranks) {
  typename Embedding<S>::Cache cache;
  Result<S> result{embedding.forward(tokens_, ranks, cache), zeros_like(embedding)};
  embedding.backward(dy, cache, result.gradients);
  return result;
}

template <class S>
MatrixX<S> some_dy() {
  return noise<S>(width, tokens, 8);
}

TEMPLATE_TEST_CASE("an embedding is a column of the table plus alpha over b times B and a column of A", "", float, double) {
  using S = TestType;
  const Embedding<S> embedding = make_embedding<S>(true);
  const MatrixX<double> W = in_double(embedding.base), B = in_double(embedding.adapter.B), A = embedding.adapter.A.template cast<double>();
  for (Index b = 1; b <= law_rank; ++b) {
    const MatrixX<double> table = W + 3.0 / static_cast<double>(b) * B.leftCols(b) * A.topRows(b);
    MatrixX<double> expected(width, tokens);
    for (Index i = 0; i < tokens; ++i) expected.col(i) = table.col(ids[static_cast<std::size_t>(i)]);
    CHECK(gap(in_double(embedding.forward(ids, b)), expected) < rounding<S>);
  }
}

TEMPLATE_TEST_CASE("oracle of LoRA embedding: after its start, where A is 0 and B is not, it is the table bit for bit and only A learns",
                   "", float, double) {
  using S = TestType;
  const Embedding<S> embedding = make_embedding<S>(false);
  CHECK(embedding.adapter.A.isZero(0));
  CHECK((embedding.adapter.B.array() != 0).all());
  for (const RankSlice rank : law_slices()) {
    const auto got = run(embedding, ids, some_dy<S>(), rank);
    CHECK(same_bits(got.y, embedding.forward(ids, RankSlice::none())));
    for (Index i = 0; i < tokens; ++i)
      CHECK(same_bits(MatrixX<S>(got.y.col(i)), MatrixX<S>(embedding.base.col(ids[static_cast<std::size_t>(i)]))));
    CHECK(got.gradients.adapter.B.isZero(0));
    for (Index i = 0; i < law_rank; ++i) CHECK(got.gradients.adapter.A.row(i).isZero(0) == (i < rank.trainable_from || i >= rank.active));
  }
}

TEST_CASE("oracle of LoRA embedding: with repeated ids the gradient is that of one-hot inputs to a linear layer") {
  using L = Linear<double>;
  const Embedding<double> embedding = make_embedding<double>(true);
  const L dense(embedding.base, embedding.adapter);
  MatrixX<double> one_hot = MatrixX<double>::Zero(vocabulary, tokens);
  for (Index i = 0; i < tokens; ++i) one_hot(ids[static_cast<std::size_t>(i)], i) = 1;
  const MatrixX<double> dy = some_dy<double>();
  for (const RankSlice rank : law_slices()) {
    const auto got = run(embedding, ids, dy, rank);
    L::Cache cache;
    auto expected = zeros_like(dense);
    CHECK(gap(got.y, dense.forward(one_hot, rank, cache)) < rounding<double>);
    (void)dense.backward(dy, cache, expected);
    CHECK(gap(got.gradients.adapter.A, expected.adapter.A) < rounding<double>);
    CHECK(gap(got.gradients.adapter.B, expected.adapter.B) < rounding<double>);
  }
}

TEMPLATE_TEST_CASE("oracle of LoRA embedding: the merged table gives what the adapter gives and merging changes nothing", "", float,
                   double) {
  using S = TestType;
  const Embedding<S> embedding = make_embedding<S>(true), before = embedding;
  for (const RankSlice rank : law_slices()) {
    const MatrixX<S> table = embedding.merged(rank);
    MatrixX<S> expected(width, tokens);
    for (Index i = 0; i < tokens; ++i) expected.col(i) = table.col(ids[static_cast<std::size_t>(i)]);
    CHECK(gap(in_double(embedding.forward(ids, rank)), in_double(expected)) < rounding<S>);
    const MatrixX<S> unmerged = table - embedding.adapter.delta(rank);
    CHECK(gap(in_double(unmerged), in_double(embedding.base)) < rounding<S>);
  }
  CHECK(same_bits(embedding.merged(RankSlice::none()), embedding.base));
  CHECK(same_bits(before.base, embedding.base));
  CHECK(same_bits(values<Embedding<S>>(before), values<Embedding<S>>(embedding)));
}

TEST_CASE("an embedding's backward is the derivative of its forward") {
  const MatrixX<double> dy = some_dy<double>();
  for (const bool trained : {false, true}) {
    for (const RankSlice rank : law_slices()) {
      Embedding<double> embedding = make_embedding<double>(trained);
      const auto got = run(embedding, ids, dy, rank);
      const auto value = [&] { return embedding.forward(ids, rank).cwiseProduct(dy).sum(); };
      for_each_parameter(
          [&](Parameter parameter, auto& p, const auto& g) {
            for (Index i = 0; i < p.rows(); ++i) {
              for (Index j = 0; j < p.cols(); ++j) {
                const Index component = parameter.rank_axis == RankAxis::rows ? i : j;
                if (component < rank.trainable_from || component >= rank.active) {
                  CHECK(g(i, j) == 0);
                  continue;
                }
                const double kept = p(i, j);
                p(i, j) = kept + 1e-5;
                const double above = value();
                p(i, j) = kept - 1e-5;
                const double below = value();
                p(i, j) = kept;
                CHECK(std::abs((above - below) / 2e-5 - g(i, j)) < 1e-8);
              }
            }
          },
          embedding, got.gradients);
      CHECK(trained_components<Embedding<double>>(got.gradients) ==
            std::vector<std::string>(2, std::string(static_cast<std::size_t>(rank.trainable_from), '0') +
                                            std::string(static_cast<std::size_t>(rank.trainable()), '1') +
                                            std::string(static_cast<std::size_t>(law_rank - rank.active), '0')));
    }
  }
}

TEST_CASE("an embedding in float is that in double, rounded") {
  const Embedding<float> embedding = make_embedding<float>(true);
  const Embedding<double> exact_embedding = make_embedding<double>(true);
  for (const RankSlice rank : law_slices()) {
    const auto got = run(embedding, ids, some_dy<float>(), rank);
    const auto exact = run(exact_embedding, ids, in_double(some_dy<float>()), rank);
    CHECK(gap(in_double(got.y), exact.y) < rounding<float>);
    CHECK(gap(values<Embedding<float>>(got.gradients).cast<double>(), values<Embedding<double>>(exact.gradients)) < rounding<float>);
  }
}

TEMPLATE_TEST_CASE("columns of A whose token does not occur have a gradient of exactly zero", "", float, double) {
  using S = TestType;
  const auto got = run(make_embedding<S>(true), ids, some_dy<S>(), law_rank);
  for (Index id = 0; id < vocabulary; ++id) {
    const bool occurs = std::find(ids.begin(), ids.end(), id) != ids.end();
    CHECK(got.gradients.adapter.A.col(id).isZero(0) != occurs);
  }
}

TEMPLATE_TEST_CASE("an embedding at rank b is the embedding truncated to b and reads nothing past it", "", float, double) {
  using S = TestType;
  using E = Embedding<S>;
  const E embedding = make_embedding<S>(true);
  for (const RankSlice rank : law_slices()) {
    const Index b = rank.active, t = rank.trainable_from;
    const auto whole = run(embedding, ids, some_dy<S>(), rank);
    E shorter = make_embedding<S>(false, b);
    copy_prefix(embedding, shorter);
    const auto part = run(shorter, ids, some_dy<S>(), rank);
    CHECK(same_bits(whole.y, part.y));
    CHECK(same_bits(component_values<E>(whole.gradients, 0, b), component_values<E>(part.gradients, 0)));

    E poisoned = embedding;
    fill_components<E>(poisoned, nan<S>, b);
    CHECK(run(poisoned, ids, some_dy<S>(), rank) == whole);
    CHECK(same_bits(poisoned.merged(rank), embedding.merged(rank)));

    const auto nested = run(embedding, ids, some_dy<S>(), b);
    CHECK(same_bits(whole.y, nested.y));
    CHECK(component_values<E>(whole.gradients, 0, t).isZero(0));
    CHECK(same_bits(component_values<E>(whole.gradients, t, b), component_values<E>(nested.gradients, t, b)));

    typename E::Cache cache;  // gradients of what took no part are not read either
    (void)embedding.forward(ids, rank, cache);
    auto gradients = zeros_like(embedding);
    fill_components<E>(gradients, nan<S>, b);
    fill_components<E>(gradients, nan<S>, 0, t);
    embedding.backward(some_dy<S>(), cache, gradients);
    CHECK(same_bits(component_values<E>(gradients, t, b), component_values<E>(whole.gradients, t, b)));
  }
}

TEMPLATE_TEST_CASE("an embedding cut to its first components is at every rank what it was at those", "", float, double) {
  using S = TestType;
  using E = Embedding<S>;
  const E embedding = make_embedding<S>(true);
  for (Index components = 0; components <= law_rank; ++components) {
    E cut = embedding;
    truncate(cut, components);
    CHECK(cut.max_rank() == law_rank);
    for (const RankSlice rank : law_slices()) {
      const auto got = run(cut, ids, some_dy<S>(), rank), whole = run(embedding, ids, some_dy<S>(), rank.at_most(components));
      CHECK(same_bits(got.y, whole.y));
      CHECK(same_bits(component_values<E>(got.gradients, 0), component_values<E>(whole.gradients, 0, components)));
      CHECK(same_bits(cut.merged(rank), embedding.merged(rank.at_most(components))));
    }
  }
}

TEMPLATE_TEST_CASE("an embedding's batch of several ranks equals its parts run apart bit for bit", "", float, double) {
  using S = TestType;
  const Embedding<S> embedding = make_embedding<S>(true);
  const std::vector<RankSlice> mix{5, 5, 1, RankSlice::none(), {3, 2}, {3, 2}, {5, 1}};
  const MatrixX<S> dy = some_dy<S>();
  const auto mixed = run(embedding, ids, dy, BatchRanks::per_sample(mix));
  auto gradients = zeros_like(embedding);
  for (std::size_t first = 0, end = 0; first < mix.size(); first = end) {
    while (end < mix.size() && mix[end] == mix[first]) ++end;
    const auto begin = static_cast<Index>(first), count = static_cast<Index>(end - first);
    typename Embedding<S>::Cache cache;
    CHECK(same_bits(embedding.forward(std::span(ids).subspan(first, end - first), mix[first], cache),
                    MatrixX<S>(mixed.y.middleCols(begin, count))));
    embedding.backward(dy.middleCols(begin, count), cache, gradients);
  }
  CHECK(same_bits(values<Embedding<S>>(mixed.gradients), values<Embedding<S>>(gradients)));
}

TEMPLATE_TEST_CASE("an embedding overwrites y and its cache and adds to gradients", "", float, double) {
  using S = TestType;
  using E = Embedding<S>;
  const E embedding = make_embedding<S>(true);
  const auto clean = run(embedding, ids, some_dy<S>(), 3);
  typename E::Cache cache;
  auto gradients = zeros_like(embedding), before = gradients;
  E spoilt = embedding;
  fill_components<E>(spoilt, nan<S>, 0);
  const std::vector<Index> more(20, 4);
  (void)spoilt.forward(more, law_rank, cache);  // NaN in every buffer
  spoilt.backward(all_nan<S>(width, 20), cache, gradients);
  MatrixX<S> y = all_nan<S>(width, tokens);
  embedding.forward(ids, 3, cache, y);
  CHECK(same_bits(y, clean.y));
  for (int time = 0; time < 2; ++time) {
    set_zero(embedding, gradients);
    embedding.backward(some_dy<S>(), cache, gradients);
    CHECK(same_bits(values<E>(gradients), values<E>(clean.gradients)));
  }
  randomize<E>(gradients, 9);
  randomize<E>(before, 9);
  embedding.backward(some_dy<S>(), cache, gradients);
  CHECK(gap(in_double<S>(values<E>(gradients)), in_double<S>(values<E>(before) + values<E>(clean.gradients))) < rounding<S>);
}

// Large enough that more than one thread takes part, with every token many times.
TEMPLATE_TEST_CASE("an embedding has the same bits for any number of threads", "", float, double) {
  using S = TestType;
  Rng rng(1);
  Embedding<S> embedding(noise<S>(130, 90, 2), {.max_rank = 13}, rng);
  randomize<Embedding<S>>(embedding, 3);
  std::vector<Index> many(50000);
  for (Index& id : many) id = rng.below(90);
  const MatrixX<S> dy = noise<S>(130, static_cast<Index>(many.size()), 4);
  const auto expected = run(embedding, many, dy, {13, 2});
  for_each_threading(
      [&] {
        return run(embedding, many, dy, {13, 2});
      },
      [&](const Result<S>& got, const std::string& where) {
        INFO(where);
        CHECK(got == expected);
      });
}

TEST_CASE("an embedding looks up a table that lives elsewhere, in PyTorch's order, without a copy") {
  using View = Eigen::Map<const MatrixX<float>>;
  const RowMatrix<float> weight = noise<float>(vocabulary, width, 1);  // as in a file: a row for each token
  Rng rng(1);
  Embedding<float, View> embedding(View(weight.data(), width, vocabulary), {.max_rank = 2}, rng);
  CHECK(embedding.base.data() == weight.data());
  const MatrixX<float> y = embedding.forward(ids, 2);
  for (Index i = 0; i < tokens; ++i)
    CHECK(same_bits(MatrixX<float>(y.col(i)), MatrixX<float>(weight.row(ids[static_cast<std::size_t>(i)]).transpose())));
}

TEST_CASE("an embedding trains: a table learns what a low rank can and its base stays") {
  Embedding<double> embedding = make_embedding<double>(false);
  const MatrixX<double> base = embedding.base, target = base + noise<double>(width, 2, 1) * noise<double>(2, vocabulary, 2);
  std::vector<Index> all(vocabulary);
  for (Index i = 0; i < vocabulary; ++i) all[static_cast<std::size_t>(i)] = i;
  AdamW optimizer(embedding, {.lr = 0.05, .weight_decay = 0});
  auto gradients = zeros_like(embedding);
  Embedding<double>::Cache cache;
  const auto error = [&](const MatrixX<double>& y) { return (y - target).squaredNorm() / (base - target).squaredNorm(); };
  CHECK(error(embedding.forward(all, 2)) == 1);
  for (int step = 0; step < 500; ++step) {
    const MatrixX<double> y = embedding.forward(all, 2, cache);
    set_zero(embedding, gradients);
    embedding.backward(y - target, cache, gradients);
    optimizer.step(embedding, gradients);
  }
  CHECK(error(embedding.forward(all, 2)) < 1e-3);
  CHECK(same_bits(embedding.base, base));
}

TEST_CASE("an embedding names its parameters as PEFT does and is a layer of a frozen table and an adapter") {
  const Embedding<float> embedding = make_embedding<float>(true);
  CHECK(names(embedding) == std::vector<std::string>{"lora_embedding_A", "lora_embedding_B"});
  CHECK(embedding.adapter.A.rows() == law_rank);
  CHECK(embedding.adapter.A.cols() == vocabulary);
  CHECK(embedding.adapter.B.rows() == width);
  int layers = 0;
  for_each_layer(embedding, [&](std::string_view name, const auto& layer) {
    CHECK(name.empty());
    CHECK(&layer.adapter == &embedding.adapter);
    ++layers;
  });
  CHECK(layers == 1);
}

TEST_CASE("normal numbers have the moments of a normal distribution and are the same for the same seed") {
  Rng rng(1), same(1);
  const Index count = 100000;
  const MatrixX<double> drawn = random_normal<double>(count, 1, 1, rng);
  CHECK(same_bits(drawn, random_normal<double>(count, 1, 1, same)));
  const double n = static_cast<double>(count);
  CHECK(std::abs(drawn.mean()) < 4 / std::sqrt(n));
  CHECK(std::abs(drawn.array().square().mean() - 1) < 4 * std::sqrt(2 / n));
  CHECK(std::abs(drawn.array().cube().mean()) < 4 * std::sqrt(15 / n));
  CHECK(std::abs(drawn.array().square().square().mean() - 3) < 4 * std::sqrt(96 / n));
  for (const double bound : {0.5, 1.0, 2.0}) {
    const double expected = std::erf(bound / std::sqrt(2.0));
    const double share = (drawn.array().abs() < bound).cast<double>().mean();
    CHECK(std::abs(share - expected) < 4 * std::sqrt(expected * (1 - expected) / n));
  }
  CHECK(rng.state() == same.state());
}

TEST_CASE("normal numbers are drawn in storage order, scaled, and an odd number of them is no different") {
  Rng one(3), two(3), three(3), four(3);
  const MatrixX<double> drawn = random_normal<double>(3, 5, 1, one);
  const RowMatrix<double> by_rows = random_normal<double, RowMatrix<double>>(5, 3, 1, two);
  CHECK(same_bits(drawn, MatrixX<double>(by_rows.transpose())));
  CHECK(gap(random_normal<double>(3, 5, 0.25, three), 0.25 * drawn) < rounding<double>);
  CHECK(same_bits(random_normal<double>(14, 1, 1, four), MatrixX<double>(Eigen::Map<const MatrixX<double>>(drawn.data(), 14, 1))));
  CHECK(random_normal<float>(4, 0, 1, one).size() == 0);
  CHECK(random_normal<float>(4, 3, 0, one).isZero(0));
  CHECK_THROWS_SAYING(std::invalid_argument, random_normal<float>(1, 1, -1, one), "random_normal: deviation", ">= 0", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, random_normal<float>(1, 1, std::numeric_limits<double>::infinity(), one), "deviation", "inf");
  CHECK_THROWS_SAYING(std::invalid_argument, random_normal<float>(1, 1, nan<double>, one), "deviation", "nan");
}

TEST_CASE("an embedding refuses what does not fit and says what was expected and what came") {
  using E = Embedding<float>;
  const E embedding = make_embedding<float>(true);
  E::Cache cache;
  auto gradients = zeros_like(embedding);
  const MatrixX<float> dy = some_dy<float>();
  const auto forward = [&](std::vector<Index> tokens_, const BatchRanks& ranks) { return embedding.forward(tokens_, ranks, cache); };
  (void)forward(ids, 3);
  CHECK_THROWS_SAYING(std::invalid_argument, forward({3, 4, 11}, 3), "Embedding::forward", "position 2", "[0, 10]", "got 11");
  CHECK_THROWS_SAYING(std::invalid_argument, forward({3, -1}, 3), "Embedding::forward", "position 1", "[0, 10]", "got -1");
  CHECK_THROWS_SAYING(ShapeError, forward({}, 3), "Embedding::forward", "ids", "at least one", "empty batch");
  CHECK_THROWS_SAYING(std::invalid_argument, forward(ids, 6), "Embedding::forward", "max_rank = 5", "got 6");
  CHECK_THROWS_SAYING(ShapeError, forward(ids, BatchRanks::per_sample({1, 2})), "Embedding::forward", "expected 7", "got 2");
  MatrixX<float> tall(width + 1, tokens), wide(width, tokens + 1);
  CHECK_THROWS_SAYING(ShapeError, embedding.forward(ids, 3, cache, tall), "rows of y", "expected 6", "got 7");
  CHECK_THROWS_SAYING(ShapeError, embedding.forward(ids, 3, cache, wide), "samples in y", "expected 7", "got 8");
  CHECK_THROWS_SAYING(ShapeError, embedding.backward(dy, cache, gradients), "backward", "cache", "forward", "expected 0", "got 7");
  CHECK_THROWS_SAYING(ShapeError, embedding.backward(MatrixX<float>(width, 0), cache, gradients), "dy", "empty batch");
  CHECK_THROWS_SAYING(std::invalid_argument, embedding.merged(6), "max_rank = 5", "got 6");

  (void)forward(ids, 3);
  CHECK_THROWS_SAYING(ShapeError, embedding.backward(noise<float>(width + 1, tokens, 1), cache, gradients), "rows of dy", "expected 6",
                      "got 7");
  CHECK_THROWS_SAYING(ShapeError, embedding.backward(noise<float>(width, tokens - 1, 1), cache, gradients), "dy", "expected 7", "got 6");
  E::Gradients empty;
  CHECK_THROWS_SAYING(ShapeError, embedding.backward(dy, cache, empty), "gradient of", "lora_embedding_A", "5 × 11 with 5", "got 0 × 0");
  E cut = embedding;
  truncate(cut, 2);
  auto its_gradients = zeros_like(cut);
  CHECK_THROWS_SAYING(std::invalid_argument, cut.backward(dy, cache, its_gradients), "cache", "max_rank = 2", "got 3");
  truncate(cut, 0);
  auto no_gradients = zeros_like(cut);
  CHECK_THROWS_SAYING(std::invalid_argument, cut.backward(dy, cache, no_gradients), "cache", "[0, 0]", "got 3");
  // Of a larger table, whose ids this one may not have, and of a smaller one.
  Rng drawn(1);
  for (const Index other_vocabulary : {vocabulary + 4, vocabulary - 1}) {
    const E other(noise<float>(width, other_vocabulary, 1), {.max_rank = 5}, drawn);
    E::Cache its_cache;
    (void)other.forward(std::vector<Index>(tokens, other_vocabulary - 1), 3, its_cache);
    CHECK_THROWS_SAYING(ShapeError, embedding.backward(dy, its_cache, gradients), "Embedding::backward: vocabulary of the cache",
                        "expected 11", "got " + std::to_string(other_vocabulary));
  }
  CHECK(values<E>(gradients).isZero(0));

  E torn = embedding;
  torn.adapter.B = MatrixX<float>::Ones(width, 3);
  CHECK_THROWS_SAYING(ShapeError, torn.forward(ids, 2), "columns of B", "expected 5", "got 3");
  Rng rng(1);
  const MatrixX<float> table = noise<float>(width, vocabulary, 1);
  CHECK_THROWS_SAYING(std::invalid_argument, E(table, {.max_rank = 7}, rng), "Embedding: max_rank", "[0, 6]", "got 7");
  CHECK_THROWS_SAYING(std::invalid_argument, E(table, {.max_rank = -1}, rng), "Embedding: max_rank", "[0, 6]", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, E(table, {.max_rank = 2, .alpha = 0}, rng), "alpha", "> 0", "got 0");
  CHECK_THROWS_SAYING(ShapeError, E(table, LowRank<float>(vocabulary + 1, width, {.max_rank = 2}, rng)), "in_features", "expected 11",
                      "got 12");
  CHECK_THROWS_SAYING(ShapeError, E(table, LowRank<float>(vocabulary, width - 1, {.max_rank = 2}, rng)), "out_features", "expected 6",
                      "got 5");
}

TEST_CASE("an embedding without an adapter is its table and takes any rank") {
  const Embedding<float> embedding = make_embedding<float>(false, 0);
  const auto got = run(embedding, ids, some_dy<float>(), 4);
  for (Index i = 0; i < tokens; ++i)
    CHECK(same_bits(MatrixX<float>(got.y.col(i)), MatrixX<float>(embedding.base.col(ids[static_cast<std::size_t>(i)]))));
  CHECK(values<Embedding<float>>(got.gradients).size() == 0);
}

}  // namespace dylora::test
