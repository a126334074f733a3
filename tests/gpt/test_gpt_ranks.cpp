#include <algorithm>
#include <span>
#include <string>
#include <vector>

#include "dylora/ranks/truncate.hpp"
#include "gpt/gpt.hpp"
#include "support/catch.hpp"
#include "support/make.hpp"
#include "support/threads.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

constexpr Index vocabulary = 40, context = 48;

/// A GPT whose adapters are trained, as far as a test can tell: every component at random, small beside the weights.
template <class S>
gpt::Gpt<S> adapted_gpt(gpt::Targets targets = {}) {
  Rng rng(1);
  const auto base = gpt::random_gpt<S>({.vocabulary = vocabulary, .context = context, .width = 32, .layers = 2, .heads = 4}, rng);
  gpt::Gpt<S> model = gpt::adapted(base, {.max_rank = 6, .alpha = 6}, rng, targets);
  for_each_value<gpt::Gpt<S>>(model, 0, 6, [&](S& entry) { entry = static_cast<S>(0.4 * rng.uniform() - 0.2); });
  return model;
}

/// Sequences of text, tokens of a few words each, and the gradient of their logits.
template <class S>
struct Batch {
  Sequences sequences{{17, 3, 48, 1, 30, 22}};
  std::vector<Index> tokens = words(sequences.tokens());
  MatrixX<S> d_logits = noise<S>(vocabulary, sequences.tokens(), 7);

  static std::vector<Index> words(Index count) {
    std::vector<Index> result;
    Rng rng(5);
    while (static_cast<Index>(result.size()) < count) {
      const Index word = rng.below(7);
      for (Index letter = 0; letter < 3 + word % 3; ++letter) result.push_back((5 * word + letter * letter) % vocabulary);
      result.push_back(0);  // a space
    }
    result.resize(static_cast<std::size_t>(count));
    return result;
  }
};

template <class S>
struct Outcome {
  VectorX<S> numbers;  // logits and gradients
  std::vector<std::string> trained;
};

/// Several sequences as one batch, at a rank for each.
template <class S>
Outcome<S> together(const gpt::Gpt<S>& model, const Batch<S>& batch, const std::vector<RankSlice>& ranks) {
  typename gpt::Gpt<S>::Cache cache;
  typename gpt::Gpt<S>::Workspace workspace;
  auto gradients = zeros_like(model);
  model.forward(batch.tokens, batch.sequences, BatchRanks::per_sequence(batch.sequences, ranks), cache);
  model.backward(batch.d_logits, cache, gradients, workspace);
  return {joined<S>({cache.logits.view().reshaped(), values<gpt::Gpt<S>>(gradients)}), trained_components<gpt::Gpt<S>>(gradients)};
}

/// Run by run of sequences at one rank, into the same gradients.
template <class S>
Outcome<S> apart(const gpt::Gpt<S>& model, const Batch<S>& batch, const std::vector<RankSlice>& ranks) {
  MatrixX<S> logits(vocabulary, batch.sequences.tokens());
  auto gradients = zeros_like(model);
  for (std::size_t first = 0, end = 0; first < ranks.size(); first = end) {
    std::vector<Index> lengths;
    for (; end < ranks.size() && ranks[end] == ranks[first]; ++end) lengths.push_back(batch.sequences.length(static_cast<Index>(end)));
    const Sequences part(lengths);
    const Index begin = batch.sequences.begin(static_cast<Index>(first)), n = part.tokens();
    typename gpt::Gpt<S>::Cache cache;
    typename gpt::Gpt<S>::Workspace workspace;
    model.forward(std::span(batch.tokens).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(n)), part, ranks[first], cache);
    logits.middleCols(begin, n) = cache.logits.view();
    model.backward(batch.d_logits.middleCols(begin, n), cache, gradients, workspace);
  }
  return {joined<S>({logits.reshaped(), values<gpt::Gpt<S>>(gradients)}), trained_components<gpt::Gpt<S>>(gradients)};
}

const std::vector<std::vector<RankSlice>> mixes{{6, 1, RankSlice::none(), {4, 3}, 2, {5, 5}},  // a rank for each
                                                {3, 3, RankSlice::none(), {6, 2}, {6, 2}, 3}};

}  // namespace

TEMPLATE_TEST_CASE("a GPT's batch of several ranks equals its sequences run apart bit for bit for any number of threads", "", float,
                   double) {
  using S = TestType;
  const Batch<S> batch;
  const gpt::Gpt<S> whole = adapted_gpt<S>();
  gpt::Gpt<S> cut = whole;
  truncate_each(cut, {6, 2, 0, 1, 4, 6, 3, 3, 5, 0, 6, 2});
  for (const gpt::Gpt<S>& model : {whole, adapted_gpt<S>({.k = false, .o = false, .mlp = false}), cut}) {
    for (const std::vector<RankSlice>& ranks : mixes) {
      const Outcome<S> expected = apart(model, batch, ranks);
      REQUIRE(expected.numbers.allFinite());
      REQUIRE(expected.numbers.tail(parameter_count(model)).any());
      for_each_threading([&] { return together(model, batch, ranks); },
                         [&](const Outcome<S>& got, const std::string& where) {
                           INFO(where);
                           CHECK(same_bits(got.numbers, expected.numbers));
                           CHECK(got.trained == expected.trained);
                         });
    }
  }
}

TEMPLATE_TEST_CASE("a sequence's logits in a GPT's batch are those at its rank alone", "", float, double) {
  using S = TestType;
  const Batch<S> batch;
  const gpt::Gpt<S> model = adapted_gpt<S>();
  typename gpt::Gpt<S>::Cache cache, alone;
  for (const std::vector<RankSlice>& ranks : mixes) {
    model.forward(batch.tokens, batch.sequences, BatchRanks::per_sequence(batch.sequences, ranks), cache);
    for (Index s = 0; s < batch.sequences.count(); ++s) {
      const Index begin = batch.sequences.begin(s), n = batch.sequences.length(s);
      model.forward(std::span(batch.tokens).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(n)), Sequences({n}),
                    ranks[static_cast<std::size_t>(s)], alone);
      CHECK(same_bits(MatrixX<S>(cache.logits.view().middleCols(begin, n)), MatrixX<S>(alone.logits.view())));
    }
  }
  // The ranks do make a difference: these are not all one model.
  const auto logits_at = [&](RankSlice rank) {
    model.forward(batch.tokens, batch.sequences, rank, alone);
    return MatrixX<S>(alone.logits.view());
  };
  for (const RankSlice rank : {RankSlice::none(), RankSlice{1}, RankSlice{4}}) CHECK_FALSE(same_bits(logits_at(rank), logits_at(6)));
}

TEMPLATE_TEST_CASE("a GPT generates at ranks that change what it computes at once with a rank per token", "", float, double) {
  using S = TestType;
  const gpt::Gpt<S> model = adapted_gpt<S>();
  const std::vector<Index> tokens = Batch<S>::words(context);
  const std::vector<RankSlice> change{6, 6, 2, RankSlice::none(), 1};
  std::vector<RankSlice> ranks;
  std::vector<KeyValueCache<S>> past;
  MatrixX<S> logits(vocabulary, context);
  for (Index i = 0; i < context; ++i) {
    ranks.push_back(change[static_cast<std::size_t>(i) % change.size()]);
    logits.col(i) = model.extend(std::span(tokens).subspan(static_cast<std::size_t>(i), 1), ranks.back(), past);
  }
  typename gpt::Gpt<S>::Cache cache;
  model.forward(tokens, Sequences({context}), BatchRanks::per_sample(ranks), cache);
  CHECK(same_bits(MatrixX<S>(cache.logits.view()), logits));
}

TEST_CASE("a GPT whose adapters are of different largest ranks takes the largest of them") {
  gpt::Gpt<double> model = adapted_gpt<double>();
  LowRank<double>& small = model.blocks[1].fc.adapter;
  small = LowRank<double>(RowMatrix<double>(small.A.topRows(2)), MatrixX<double>(small.B.leftCols(2)), small.options);
  CHECK(model.max_rank() == 6);
  gpt::Gpt<double> cut = adapted_gpt<double>();
  truncate_each(cut, {6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 2, 6});
  const Batch<double> batch;
  for (const std::vector<RankSlice>& ranks : mixes) {
    const auto got = together(model, batch, ranks), expected = together(cut, batch, ranks);
    CHECK(same_bits(got.numbers, expected.numbers));
    CHECK(got.trained == expected.trained);
  }
}

TEST_CASE("a GPT refuses ranks that are for another batch or above its largest") {
  const gpt::Gpt<float> model = adapted_gpt<float>();
  const Batch<float> batch;
  gpt::Gpt<float>::Cache cache;
  const auto forward = [&](const BatchRanks& ranks) { model.forward(batch.tokens, batch.sequences, ranks, cache); };
  CHECK_THROWS_SAYING(ShapeError, forward(BatchRanks::per_sample({1, 2, 3, 4, 5, 6})), "columns that the ranks are for", "expected 121",
                      "got 6");
  CHECK_THROWS_SAYING(std::invalid_argument, forward(7), "rank", "max_rank = 6", "got 7");
  CHECK_THROWS_SAYING(std::invalid_argument, forward(BatchRanks::per_sequence(batch.sequences, {1, 2, 7, 1, 2, 3})), "rank", "max_rank = 6",
                      "got 7");
}

}  // namespace dylora::test
