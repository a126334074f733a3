#include "dylora/ranks/truncate.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "dylora/train/adamw.hpp"
#include "gpt/gpt.hpp"
#include "support/catch.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

using L = Linear<double>;
using AllAdapted = Attention<double>;
using Subset = Attention<double, L, FrozenLinear<double>, L, FrozenLinear<double>>;

/// Variant 3 of Attention has adapters of rank 0 on k and o.
template <class T>
T trained_layer(int variant) {
  T layer = MakeLayer<T>::make(variant, law_rank);
  randomize<T>(layer, 3);
  return layer;
}

gpt::Gpt<double> trained_gpt(gpt::Targets targets = {}) {
  Rng rng(4);
  const auto base = gpt::random_gpt<double>({.vocabulary = 11, .context = 6, .width = 8, .layers = 2, .heads = 2}, rng);
  auto model = gpt::adapted(base, {.max_rank = 4, .alpha = 3}, rng, targets);
  randomize<gpt::Gpt<double>>(model, 5);
  return model;
}

std::vector<std::string> adapter_names(const std::vector<AdapterRank>& adapters) {
  std::vector<std::string> result;
  for (const AdapterRank& adapter : adapters) result.push_back(adapter.name);
  return result;
}

std::vector<Index> rank_list(const std::vector<AdapterRank>& adapters) {
  std::vector<Index> result;
  for (const AdapterRank& adapter : adapters) result.push_back(adapter.rank);
  return result;
}

/// The values of the first ranks[i] components of each adapter, in the order of the traversal.
template <class T>
VectorX<double> prefixes(const T& trained, const std::vector<Index>& ranks) {
  std::vector<VectorX<double>> parts;
  std::size_t parameter_index = 0;  // lora_A and lora_B in turn
  for_each_parameter(
      [&](Parameter parameter, const auto& p) {
        const Index rank = ranks.at(parameter_index++ / 2);
        const MatrixX<double> kept = parameter.rank_axis == RankAxis::rows ? MatrixX<double>(p.topRows(rank)) : p.leftCols(rank);
        parts.push_back(kept.reshaped());
      },
      trained);
  return joined<double>(parts);
}

/// Every projection at no more than its own rank, with all of its components still there: what a cut one must compute.
struct AtMost : L {
  Index cut;

  void apply(ConstMatrixRef<double> x, const BatchRanks& ranks, Cache& cache, MatrixRef<double> y) const {
    L::apply(x, ranks.at_most(cut), cache, y);
  }
};
using ReferenceAttention = Attention<double, AtMost>;

ReferenceAttention at_most(const AllAdapted& full, const std::vector<Index>& ranks) {
  return {{full.q, ranks[0]}, {full.k, ranks[1]}, {full.v, ranks[2]}, {full.o, ranks[3]}, full.options};
}

/// Three parameters with a rank axis, in an order of its own, and one without.
struct Gated {
  struct Gradients {
    Gradient<MatrixX<double>> out, in, gates, bias;
  };

  MatrixX<double> out, in, gates, bias;

  static void members(const auto& f, auto&... t) {
    f(Parameter{"first.out", RankAxis::cols}, t.out...);
    f(Parameter{"first.bias"}, t.bias...);
    f(Parameter{"first.in", RankAxis::rows}, t.in...);
    f(Parameter{"first.gates", RankAxis::cols}, t.gates...);
    f(Parameter{"second.deep.in", RankAxis::rows}, t.in...);
  }
};

MatrixX<double> logits(const gpt::Gpt<double>& model, const BatchRanks& ranks) {
  gpt::Gpt<double>::Cache cache;
  model.forward(std::vector<Index>{1, 5, 10, 0, 7}, Sequences({2, 3}), ranks, cache);
  return cache.logits.view();
}

}  // namespace

TEST_CASE("the adapters of a model are listed by name and rank and component size in the order of its traversal") {
  CHECK(adapter_ranks(trained_layer<L>(0)) == std::vector<AdapterRank>{{"", 5, 7 + 6}});
  CHECK(adapter_ranks(trained_layer<L>(0).adapter) == std::vector<AdapterRank>{{"", 5, 7 + 6}});
  CHECK(adapter_ranks(trained_layer<AllAdapted>(2)) ==
        std::vector<AdapterRank>{{"q_proj", 5, 7 + 12}, {"k_proj", 5, 7 + 6}, {"v_proj", 5, 7 + 6}, {"o_proj", 5, 12 + 6}});
  const std::vector<AdapterRank> gpt = adapter_ranks(trained_gpt());
  CHECK(adapter_names(gpt) == std::vector<std::string>{"h.0.attn.q_proj", "h.0.attn.k_proj", "h.0.attn.v_proj", "h.0.attn.o_proj",
                                                       "h.0.mlp.c_fc", "h.0.mlp.c_proj", "h.1.attn.q_proj", "h.1.attn.k_proj",
                                                       "h.1.attn.v_proj", "h.1.attn.o_proj", "h.1.mlp.c_fc", "h.1.mlp.c_proj"});
  for (std::size_t i = 0; i < gpt.size(); ++i) {
    CHECK(gpt[i].rank == 4);
    CHECK(gpt[i].component_size == (i % 6 < 4 ? 8 + 8 : 8 + 32));
  }
}

TEST_CASE("an adapter of rank 0 is listed and a frozen projection is not") {
  CHECK(adapter_ranks(trained_layer<AllAdapted>(3)) ==
        std::vector<AdapterRank>{{"q_proj", 5, 7 + 12}, {"k_proj", 0, 7 + 6}, {"v_proj", 5, 7 + 6}, {"o_proj", 0, 12 + 6}});
  CHECK(adapter_ranks(trained_layer<Subset>(0)) == std::vector<AdapterRank>{{"q_proj", 5, 7 + 12}, {"v_proj", 5, 7 + 12}});
  CHECK(adapter_ranks(MakeLayer<FrozenLinear<double>>::make(0, 0)).empty());
  const auto queries_only = adapter_ranks(trained_gpt({.k = false, .v = false, .o = false, .mlp = false}));
  CHECK(adapter_names(queries_only) == adapter_names(adapter_ranks(trained_gpt())));
  CHECK(rank_list(queries_only) == std::vector<Index>{4, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0});
}

TEST_CASE("parameters without a rank axis belong to no adapter and are not cut") {
  Rng rng(4);
  auto base = gpt::random_gpt<double>({.vocabulary = 11, .context = 6, .width = 8, .layers = 1, .heads = 2}, rng);
  using Base = std::remove_cvref_t<decltype(base)>;
  CHECK(adapter_ranks(base).empty());
  const VectorX<double> before = values<Base>(base);
  truncate(base, 0);
  CHECK(same_bits(values<Base>(base), before));
}

TEST_CASE("what has the same name before its last dot is one adapter, however many parameters it has") {
  Gated gated{noise<double>(6, 3, 1), noise<double>(3, 7, 2), noise<double>(2, 3, 3), noise<double>(6, 1, 4)};
  CHECK(adapter_ranks(gated) == std::vector<AdapterRank>{{"first", 3, 6 + 7 + 2}, {"second.deep", 3, 7}});
  const Gated before = gated;
  truncate_each(gated, {2, 2});
  CHECK(same_bits(gated.out, MatrixX<double>(before.out.leftCols(2))));
  CHECK(same_bits(gated.in, MatrixX<double>(before.in.topRows(2))));
  CHECK(same_bits(gated.gates, MatrixX<double>(before.gates.leftCols(2))));
  CHECK(same_bits(gated.bias, before.bias));
}

TEST_CASE("the components of all adapters are all the parameters there are") {
  const auto whole = [](const auto& model) {
    Index count = 0;
    for (const AdapterRank& adapter : adapter_ranks(model)) count += adapter.rank * adapter.component_size;
    return count == parameter_count(model);
  };
  for (int variant = 0; variant < 4; ++variant) CHECK(whole(trained_layer<AllAdapted>(variant)));
  CHECK(whole(trained_layer<Subset>(1)));
  CHECK(whole(trained_gpt()));
  auto cut = trained_gpt();
  truncate_each(cut, {4, 3, 2, 1, 0, 4, 3, 2, 1, 0, 4, 3});
  CHECK(whole(cut));
}

TEST_CASE("a cut keeps the first components of each adapter bit for bit and nothing else") {
  for (const std::vector<Index>& ranks : {std::vector<Index>{5, 5, 5, 5}, {1, 5, 3, 2}, {0, 4, 0, 1}, {0, 0, 0, 0}}) {
    for (int variant = 0; variant < 3; ++variant) {
      const AllAdapted full = trained_layer<AllAdapted>(variant);
      AllAdapted cut = full;
      truncate_each(cut, ranks);
      CHECK(same_bits(values<AllAdapted>(cut), prefixes(full, ranks)));
      const std::vector<AdapterRank> before = adapter_ranks(full), after = adapter_ranks(cut);
      Index count = 0;
      for (std::size_t i = 0; i < ranks.size(); ++i) {
        CHECK(after[i] == AdapterRank{before[i].name, ranks[i], before[i].component_size});
        count += ranks[i] * before[i].component_size;
      }
      CHECK(parameter_count(cut) == count);
      CHECK(same_bits(frozen_values(cut), frozen_values(full)));
    }
  }
  const auto full = trained_gpt();
  auto cut = full;
  const std::vector<Index> ranks{4, 3, 2, 1, 0, 4, 3, 2, 1, 0, 4, 3};
  truncate_each(cut, ranks);
  CHECK(rank_list(adapter_ranks(cut)) == ranks);
  CHECK(same_bits(values<gpt::Gpt<double>>(cut), prefixes(full, ranks)));
}

TEST_CASE("a uniform cut is the list of the smaller of that rank and what each adapter has") {
  AllAdapted some = trained_layer<AllAdapted>(0);
  truncate_each(some, {5, 3, 0, 2});
  for (const Index rank : {0, 1, 2, 3, 4, 5, 6, 1000}) {
    AllAdapted uniform = some, listed = some;
    truncate(uniform, rank);
    truncate_each(listed, {std::min<Index>(rank, 5), std::min<Index>(rank, 3), 0, std::min<Index>(rank, 2)});
    CHECK(adapter_ranks(uniform) == adapter_ranks(listed));
    CHECK(same_bits(values<AllAdapted>(uniform), values<AllAdapted>(listed)));
  }
}

TEST_CASE("cutting twice is cutting to the smaller ranks") {
  AllAdapted twice = trained_layer<AllAdapted>(1), once = twice;
  truncate_each(twice, {4, 3, 5, 2});
  truncate_each(twice, {4, 1, 2, 0});
  truncate_each(once, {4, 1, 2, 0});
  CHECK(same_bits(values<AllAdapted>(twice), values<AllAdapted>(once)));
}

TEST_CASE("a cut adapter computes at each rank what it did at the smaller of that and its cut") {
  const MatrixX<double> x = noise<double>(7, 6, 1), dy = noise<double>(6, 6, 2);
  for (const ScaleRule scale : {alpha_over_rank, alpha_over_max_rank}) {
    L full = trained_layer<L>(1);
    full.adapter.options.scale = scale;
    for (Index kept = 0; kept <= law_rank; ++kept) {
      L cut = full;
      truncate(cut, kept);
      CHECK(same_bits(cut.forward(x, RankSlice::none()), full.forward(x, RankSlice::none())));
      for (const RankSlice rank : law_slices()) {
        INFO("kept " << kept << ", " << describe(rank));
        const RankSlice seen = rank.at_most(kept);
        L::Cache cache, full_cache;
        auto gradients = zeros_like(cut), full_gradients = zeros_like(full);
        CHECK(same_bits(cut.forward(x, rank, cache), full.forward(x, seen, full_cache)));
        CHECK(same_bits(cut.backward(dy, cache, gradients), full.backward(dy, full_cache, full_gradients)));
        CHECK(same_bits(values<L>(gradients), component_values<L>(full_gradients, 0, kept)));
        CHECK(same_bits(cut.adapter.delta(rank), full.adapter.delta(seen)));
      }
      const auto mixed = BatchRanks::per_sample({5, 5, 3, RankSlice::none(), 1, {4, 2}});
      CHECK(same_bits(cut.forward(x, mixed), full.forward(x, mixed.at_most(kept))));
    }
  }
}

TEST_CASE("adapters cut to ranks of their own compute side by side as each would alone") {
  const MatrixX<double> x = noise<double>(7, 6, 1), dy = noise<double>(6, 6, 2);
  const Sequences sequences({1, 3, 2});
  for (const std::vector<Index>& ranks : {std::vector<Index>{5, 3, 1, 2}, {0, 5, 0, 4}, {1, 0, 2, 0}, {0, 0, 0, 0}}) {
    const AllAdapted full = trained_layer<AllAdapted>(2);
    const ReferenceAttention expected = at_most(full, ranks);
    AllAdapted cut = full;
    truncate_each(cut, ranks);
    for (const RankSlice rank : law_slices()) {
      AllAdapted::Cache cache;
      ReferenceAttention::Cache expected_cache;
      auto gradients = zeros_like(cut);
      auto expected_gradients = zeros_like(expected);
      CHECK(same_bits(cut.forward(x, sequences, rank, cache), expected.forward(x, sequences, rank, expected_cache)));
      CHECK(same_bits(cut.backward(dy, cache, gradients), expected.backward(dy, expected_cache, expected_gradients)));
      KeyValueCache<double> past, expected_past;
      CHECK(same_bits(cut.extend(x, rank, past), expected.extend(x, rank, expected_past)));
    }
  }
}

TEST_CASE("up to the smallest cut a model is as it was") {
  const auto full = trained_gpt();
  auto cut = full;
  truncate_each(cut, {4, 3, 2, 3, 2, 4, 3, 2, 3, 2, 4, 3});
  for (const Index rank : {1, 2}) CHECK(same_bits(logits(cut, rank), logits(full, rank)));
  CHECK_FALSE(same_bits(logits(cut, 3), logits(full, 3)));
  CHECK(same_bits(logits(cut, RankSlice::none()), logits(full, RankSlice::none())));
  auto uniform = full;
  truncate(uniform, 3);
  for (const Index rank : {1, 2, 3}) CHECK(same_bits(logits(uniform, rank), logits(full, rank)));
  CHECK(same_bits(logits(uniform, 4), logits(full, 3)));
  truncate(uniform, 0);
  CHECK(same_bits(logits(uniform, 4), logits(full, RankSlice::none())));
}

TEST_CASE("a cut model takes and refuses the ranks that it did before") {
  const MatrixX<double> x = noise<double>(7, 6, 1);
  for (const Index kept : {0, 1, 3}) {
    AllAdapted attention = trained_layer<AllAdapted>(0);
    L layer = trained_layer<L>(0);
    truncate(attention, kept);
    truncate(layer, kept);
    CHECK(attention.max_rank() == law_rank);
    CHECK(layer.max_rank() == law_rank);
    CHECK(layer.adapter.components() == kept);
    CHECK_THROWS_SAYING(std::invalid_argument, attention.forward(x, law_rank + 1), "max_rank = 5", "got 6");
    CHECK_THROWS_SAYING(std::invalid_argument, layer.forward(x, law_rank + 1), "max_rank = 5", "got 6");
  }
  auto model = trained_gpt();
  truncate(model, 1);
  CHECK(model.max_rank() == 4);
}

TEST_CASE("a cut model is trained on with new gradients and a new optimiser and refuses the old ones") {
  AllAdapted attention = trained_layer<AllAdapted>(0);
  auto old = zeros_like(attention);
  AdamW old_optimizer(attention);
  truncate_each(attention, {5, 3, 0, 2});
  AllAdapted::Cache cache;
  (void)attention.forward(noise<double>(7, 6, 1), 4, cache);
  CHECK_THROWS_SAYING(ShapeError, attention.backward(noise<double>(6, 6, 2), cache, old), "gradient of k_proj.lora_A",
                      "3 × 7 with 3 rank components", "5 × 7 with 5 rank components");
  auto gradients = zeros_like(attention);
  (void)attention.backward(noise<double>(6, 6, 2), cache, gradients);
  CHECK(trained_components<AllAdapted>(gradients) == std::vector<std::string>{"11110", "11110", "111", "111", "", "", "11", "11"});
  CHECK_THROWS_SAYING(ShapeError, old_optimizer.step(attention, gradients), "moments of k_proj.lora_A");
  const AllAdapted before = attention;
  AdamW optimizer(attention);
  optimizer.step(attention, gradients);
  CHECK(same_bits(component_values<AllAdapted>(attention, 4), component_values<AllAdapted>(before, 4)));
  CHECK((component_values<AllAdapted>(attention, 0, 4).array() != component_values<AllAdapted>(before, 0, 4).array()).all());
}

TEST_CASE("a list of ranks that does not fit is refused by number or name and nothing is cut") {
  AllAdapted attention = trained_layer<AllAdapted>(0);
  truncate_each(attention, {5, 4, 3, 0});
  const AllAdapted before = attention;
  using Ranks = std::vector<Index>;
  CHECK_THROWS_SAYING(std::invalid_argument, truncate_each(attention, Ranks{1, 1, 1}),
                      "truncate_each: expected a rank for each of 4 adapters", "got 3");
  CHECK_THROWS_SAYING(std::invalid_argument, truncate_each(attention, Ranks{1, 1, 1, 0, 0}), "each of 4 adapters", "got 5");
  CHECK_THROWS_SAYING(std::invalid_argument, truncate_each(attention, Ranks{}), "each of 4 adapters", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, truncate_each(attention, Ranks{6, 1, 1, 0}), "truncate_each: rank of adapter", "q_proj",
                      "[0, 5]", "got 6");
  CHECK_THROWS_SAYING(std::invalid_argument, truncate_each(attention, Ranks{1, 5, 1, 0}), "truncate_each: rank of adapter", "k_proj",
                      "[0, 4]", "got 5");
  CHECK_THROWS_SAYING(std::invalid_argument, truncate_each(attention, Ranks{1, 1, -1, 0}), "truncate_each: rank of adapter", "v_proj",
                      "[0, 3]", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, truncate_each(attention, Ranks{1, 1, 1, 1}), "truncate_each: rank of adapter", "o_proj",
                      "[0, 0]", "got 1");
  CHECK_THROWS_SAYING(std::invalid_argument, truncate(attention, -1), "truncate: rank", "got -1");
  CHECK(adapter_ranks(attention) == adapter_ranks(before));
  CHECK(same_bits(values<AllAdapted>(attention), values<AllAdapted>(before)));

  auto model = trained_gpt();
  const VectorX<double> whole = values<gpt::Gpt<double>>(model);
  CHECK_THROWS_SAYING(std::invalid_argument, truncate_each(model, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 5, 1}), "truncate_each: rank of adapter",
                      "h.1.mlp.c_fc", "[0, 4]", "got 5");
  CHECK(same_bits(values<gpt::Gpt<double>>(model), whole));
}

TEST_CASE("an adapter whose parameters disagree about its components is refused by name and nothing is cut") {
  AllAdapted attention = trained_layer<AllAdapted>(0);
  attention.v.adapter.B.conservativeResize(Eigen::NoChange, 4);
  const VectorX<double> before = values<AllAdapted>(attention);
  const auto refused = [&](auto&& call) {
    return wrong_throw<ShapeError>(call, {"v_proj.lora_B", "components, against the rest of its adapter", "expected 5", "got 4"});
  };
  CHECK(refused([&] { (void)adapter_ranks(attention); }) == "");
  CHECK(refused([&] { truncate(attention, 2); }) == "");
  CHECK(refused([&] { truncate_each(attention, {1, 1, 1, 1}); }) == "");
  CHECK(same_bits(values<AllAdapted>(attention), before));

  L layer = trained_layer<L>(0);
  layer.adapter.A.conservativeResize(3, Eigen::NoChange);
  CHECK_THROWS_SAYING(ShapeError, adapter_ranks(layer), "lora_B: components", "expected 3", "got 5");
}

}  // namespace dylora::test
