#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include <dylora/methods/lora_flow/flow.hpp>
#include <dylora/testing/gradient_check.hpp>
#include "gpt/methods_under_test.hpp"
#include "support/catch.hpp"
#include "support/make.hpp"
#include "support/values.hpp"
#include "text/training.hpp"

namespace dylora::test {

namespace {

const text::Batch batch = some_batch({8, 5}, 20), other_batch = some_batch({3, 7, 6}, 21);

/// The parts of a batch of two sequences, weighted so that their loss is the mean over all tokens.
std::vector<RankGroup> mixed(RankSlice first, RankSlice second) {
  const double tokens = static_cast<double>(batch.sequences.tokens());
  return {{first, 0, 1, static_cast<double>(batch.sequences.length(0)) / tokens},
          {second, 1, 1, static_cast<double>(batch.sequences.length(1)) / tokens}};
}

/// Loss, logits' gradient and gradients of a forward and a backward into cleared gradients.
template <class Model>
VectorX<double> step(const Model& model, const text::Batch& of, RankSlice rank, typename Model::Cache& cache,
                     typename Model::Gradients& gradients, typename Model::Workspace& workspace) {
  set_zero(model, gradients);
  const double loss = text::loss_and_gradients(model, of, rank, 1, cache, gradients, workspace);
  return joined<double>({VectorX<double>::Constant(1, loss), cache.logits.view().reshaped(), values<Model>(gradients)});
}

/// What continue_text is to write, each token from a forward of all that it may see.
template <class Model>
std::vector<Index> continue_by_forward(const Model& model, std::vector<Index> seen, Index length, double temperature, RankSlice rank,
                                       Rng& rng) {
  std::vector<Index> written;
  for (Index i = 0; i < length; ++i) {
    if (static_cast<Index>(seen.size()) > context) seen.erase(seen.begin(), seen.end() - context / 2);
    const MatrixX<double> all = logits(model, {seen, {}, Sequences({static_cast<Index>(seen.size())})}, rank);
    const VectorX<double> last = all.rightCols(1);
    const VectorX<double> chances = ((last.array() - last.maxCoeff()) / temperature).exp();
    const double place = rng.uniform() * chances.sum();
    Index token = 0;
    for (double sum = chances[0]; sum <= place && token + 1 < vocabulary; sum += chances[token]) ++token;
    seen.push_back(token);
    written.push_back(token);
  }
  return written;
}

/// The loss and the gradients that a forward and a backward gave at these ranks, against the loss's definition and its differences.
template <class Model>
void check_differences(const Model& model, double loss, const typename Model::Gradients& gradients, const BatchRanks& ranks,
                       RankSlice learning) {
  typename Model::Cache cache;
  CHECK(loss == Approx(mean_cross_entropy(model, batch, ranks, cache)).epsilon(1e-13));
  const GradientReport report = compare_with_differences(model, gradients, batch, ranks, learning);
  INFO(report.where);
  CHECK(report.entries == parameter_count(model));
  CHECK(report.error < 1e-6);
}

using Methods = std::tuple<Flow, AdaptedEmbedding, ResidualInput, ResidualBlock, ResidualMiddle, Dora, Multi>;

}  // namespace

TEMPLATE_LIST_TEST_CASE("a GPT's gradients are the differences of its loss, by every method at one rank", "", Methods) {
  const auto model = trained<TestType>();
  using Model = typename TestType::Model;
  for (const RankSlice rank : {RankSlice{2}, RankSlice{3, 2}}) {
    typename Model::Cache cache;
    typename Model::Workspace workspace;
    auto gradients = zeros_like(model);
    const double loss = text::loss_and_gradients(model, batch, rank, 1, cache, gradients, workspace);
    check_differences(model, loss, gradients, rank, rank);
  }
}

TEMPLATE_LIST_TEST_CASE("a GPT's gradients are the differences of its loss, by every method with a rank for each sequence", "", Methods) {
  const auto model = trained<TestType>();
  using Model = typename TestType::Model;
  for (const std::vector<RankSlice>& ranks : {std::vector<RankSlice>{1, 3}, {2, RankSlice::none()}}) {
    const std::vector<RankGroup> groups = mixed(ranks[0], ranks[1]);
    typename Model::Cache cache;
    typename Model::Workspace workspace;
    auto gradients = zeros_like(model);
    const double loss = text::loss_and_gradients(model, batch, groups, cache, gradients, workspace);
    const BatchRanks each = BatchRanks::per_sequence(batch.sequences, ranks);
    check_differences(model, loss, gradients, each, each.highest());
  }
}

TEMPLATE_LIST_TEST_CASE("every parameter that a method trains in a GPT has a gradient", "", Methods) {
  const auto model = trained<TestType>();
  using Model = typename TestType::Model;
  typename Model::Cache cache;
  typename Model::Workspace workspace;
  auto gradients = zeros_like(model);
  (void)text::loss_and_gradients(model, batch, 2, 1, cache, gradients, workspace);
  const std::vector<std::string> trained_names = names(model);
  REQUIRE_FALSE(trained_names.empty());
  Index visited = 0;
  for_each_parameter<Model>(
      [&](Parameter parameter, auto& gradient) {
        INFO(std::string(parameter.name));
        CHECK(gradient.cwiseAbs().maxCoeff() > 1e-4);
        ++visited;
      },
      gradients);
  CHECK(visited == static_cast<Index>(trained_names.size()));
}

TEST_CASE("a GPT's gate is all that LoRA-Flow trains, and differences tell where its gradient is lost") {
  const auto model = trained<Flow>();
  CHECK(names(model) == std::vector<std::string>{"h.0.gate.weight", "h.0.gate.bias", "h.1.gate.weight", "h.1.gate.bias"});
  Flow::Model::Cache cache;
  Flow::Model::Workspace workspace;
  const auto error_without = [&](auto&& lose) {
    auto gradients = zeros_like(model);
    (void)text::loss_and_gradients(model, batch, 2, 1, cache, gradients, workspace);
    lose(gradients);
    return compare_with_differences(model, gradients, batch, 2, 2).error;
  };
  CHECK(error_without([](Flow::Model::Gradients&) {}) < 1e-6);
  for (const std::size_t i : {0u, 1u}) {
    CHECK(error_without([&](Flow::Model::Gradients& gradients) { gradients.blocks[i].gate.weight.setZero(); }) == 1);
    CHECK(error_without([&](Flow::Model::Gradients& gradients) { gradients.blocks[i].gate.bias.setZero(); }) == 1);
  }
}

TEMPLATE_LIST_TEST_CASE("a GPT's step has the same bits in a cache, gradients and a workspace that served another batch", "", Methods) {
  const auto model = trained<TestType>();
  using Model = typename TestType::Model;
  typename Model::Cache cache;
  typename Model::Workspace workspace;
  auto gradients = zeros_like(model);
  const VectorX<double> first = step(model, batch, 2, cache, gradients, workspace);
  REQUIRE(first.allFinite());
  CHECK(same_bits(step(model, batch, 2, cache, gradients, workspace), first));
  CHECK_FALSE(same_bits(step(model, other_batch, 3, cache, gradients, workspace), first));
  CHECK(same_bits(step(model, batch, 2, cache, gradients, workspace), first));
}

TEMPLATE_LIST_TEST_CASE("a copy of a GPT's cache is a cache of its own", "", Methods) {
  const auto model = trained<TestType>();
  using Model = typename TestType::Model;
  typename Model::Cache fresh, fresh_too;
  typename Model::Workspace workspace;
  auto gradients = zeros_like(model);
  const VectorX<double> first = step(model, batch, 2, fresh, gradients, workspace);
  const VectorX<double> second = step(model, other_batch, 3, fresh_too, gradients, workspace);
  const VectorX<double> of_first = first.tail(parameter_count(model));

  auto original = std::make_unique<typename Model::Cache>();
  model.forward(batch.tokens, batch.sequences, 2, *original);
  typename Model::Cache copy = *original;
  CHECK(same_bits(step(model, other_batch, 3, *original, gradients, workspace), second));
  MatrixX<double> d_logits = copy.logits.view();
  cross_entropy<double>(d_logits, batch.targets, d_logits);
  set_zero(model, gradients);
  model.backward(d_logits, copy, gradients, workspace);
  CHECK(same_bits(values<Model>(gradients), of_first));
  original.reset();
  set_zero(model, gradients);
  model.backward(d_logits, copy, gradients, workspace);
  CHECK(same_bits(values<Model>(gradients), of_first));
  CHECK(same_bits(step(model, other_batch, 3, copy, gradients, workspace), second));
  CHECK(same_bits(step(model, batch, 2, copy, gradients, workspace), first));
}

TEMPLATE_LIST_TEST_CASE("a GPT without its adapters is its base bit for bit, by every method", "", Methods) {
  for (const bool tied : {true, false}) {
    const auto model = trained<TestType>(tied);
    const MatrixX<double> expected = logits(base_gpt(tied), batch, RankSlice::none());
    CHECK(same_bits(logits(model, batch, RankSlice::none()), expected));
    for (const Index rank : {1, 2, 3}) CHECK(gap(logits(model, batch, rank), expected) > 1e-3);
    const MatrixX<double> half = logits(model, batch, BatchRanks::per_sequence(batch.sequences, {RankSlice::none(), 3}));
    CHECK(same_bits(MatrixX<double>(half.leftCols(8)), MatrixX<double>(expected.leftCols(8))));
    CHECK_FALSE(same_bits(half, expected));
  }
}

TEMPLATE_LIST_TEST_CASE("a GPT continues a text with the tokens that a forward of each prefix gives, by every method", "", Methods) {
  const auto model = trained<TestType>();
  STATIC_REQUIRE(TestType::Model::extends == TestType::extends);
  const std::vector<std::vector<Index>> prompts{{4}, {1, 7, 7, 2, 10}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}};
  std::vector<Index> seen_at_ranks[2];
  for (const std::vector<Index>& prompt : prompts) {
    for (const double temperature : {0.01, 1.0}) {
      for (const RankSlice rank : {RankSlice::none(), RankSlice{2}}) {
        Rng rng(9), reference(9);
        const std::vector<Index> written = text::continue_text(model, prompt, 20, temperature, rank, rng);
        CHECK(written.size() == 20);
        CHECK(written == continue_by_forward(model, prompt, 20, temperature, rank, reference));
        CHECK(rng.state() == reference.state());
        auto& all = seen_at_ranks[rank.active > 0];
        all.insert(all.end(), written.begin(), written.end());
      }
    }
  }
  CHECK(seen_at_ranks[0] != seen_at_ranks[1]);
}

TEMPLATE_LIST_TEST_CASE("a GPT's largest rank is its method's, and a forward takes it", "", Methods) {
  const auto model = trained<TestType>();
  CHECK(model.max_rank() == highest_rank);
  CHECK_FALSE(same_bits(logits(model, batch, highest_rank), logits(model, batch, highest_rank - 1)));
}

TEST_CASE("a GPT's largest rank counts that of its embedding") {
  Rng rng(10);
  const BaseGpt base = base_gpt();
  const auto model_of = [&](Index of_embedding, Index of_projections) {
    auto model = with_embedding(gpt::adapted(base, {.max_rank = of_projections}, rng), {.max_rank = of_embedding});
    train_at_random(model, 11);
    return model;
  };
  CHECK(model_of(5, 0).max_rank() == 5);
  CHECK(model_of(5, 3).max_rank() == 5);
  CHECK(model_of(2, 3).max_rank() == 3);
  CHECK(model_of(0, 3).max_rank() == 3);
  CHECK(model_of(0, 0).max_rank() == 0);
}

TEST_CASE("a GPT whose embedding has fewer components than its projections uses all of them at a higher rank") {
  Rng rng(12);
  auto model = with_embedding(gpt::adapted(base_gpt(), {.max_rank = 3}, rng), {.max_rank = 2});
  train_at_random(model, 13);
  auto plain = gpt::adapted(base_gpt(), {.max_rank = 3}, rng);
  plain.blocks = model.blocks;
  plain.token_embedding = model.token_embedding.merged(2);
  plain.config.tied = false;
  plain.head = model.token_embedding.base;
  CHECK(gap(logits(model, batch, 3), logits(plain, batch, 3)) < 1e-13);
}

}  // namespace dylora::test
