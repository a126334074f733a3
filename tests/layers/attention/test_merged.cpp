#include "dylora/layers/attention/merged.hpp"

#include <algorithm>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "dylora/ranks/truncate.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

template <class S>
using InSlices = Linear<S, Stacked<LowRank<S>>>;

template <class S>
using OneAdapter = MergedAttention<S>;
template <class S>
using RaggedBatch = Ragged<MergedAttention<S, InSlices<S>>>;
template <class S>
using Mixed = MergedAttention<S, Linear<S, Dropout<Stacked<LowRank<S>>>, WeightView<S, RowMatrix<S>>>, FrozenLinear<S>>;

using LayersUnderTest = InFloatAndDouble<OneAdapter, RaggedBatch, Mixed>;

}  // namespace dylora::test

#include "laws/layer_laws.hpp"

namespace dylora::test {

namespace {

/// The same attention twice: by a projection each, and merged.
template <class S>
struct Twins {
  Attention<S> separate;
  MergedAttention<S, InSlices<S>> merged;
};

/// Adapters of 3, `key_rank` and 2 components on q, k and v.
template <class S>
Twins<S> twins_of(Index features, Index key_rank, AttentionOptions options) {
  const Index kv_features = features / options.heads * (options.key_value_heads == 0 ? options.heads : options.key_value_heads);
  const auto projection = [](Index in, Index out, Index rank, std::uint64_t seed) {
    return MakeLayer<Linear<S>>::make(in, out, true, rank, seed);
  };
  Attention<S> separate(projection(5, features, 3, 1), projection(5, kv_features, key_rank, 4), projection(5, kv_features, 2, 7),
                        projection(features, 5, 2, 10), options);
  randomize<Attention<S>>(separate, 3);
  const auto& [q, k, v] = std::tie(separate.q, separate.k, separate.v);
  MatrixX<S> W(features + 2 * kv_features, 5);
  VectorX<S> bias(W.rows());
  W << q.base.W, k.base.W, v.base.W;
  bias << q.base.bias, k.base.bias, v.base.bias;
  const InSlices<S> qkv({W, bias}, Stacked<LowRank<S>>({q.adapter, k.adapter, v.adapter}));
  return {separate, {qkv, separate.o, options}};
}

const std::vector<AttentionOptions> settings{{.heads = 4}, {.heads = 4, .causal = false}, {.heads = 4, .key_value_heads = 2}};

}  // namespace

// Over several tiles, and at one token.
TEMPLATE_TEST_CASE("a merged attention is the attention of its slices bit for bit", "", float, double) {
  using S = TestType;
  using Merged = MergedAttention<S, InSlices<S>>;
  for (const AttentionOptions& options : settings) {
    for (const Index key_rank : {3, 0}) {
      const Twins<S> twins = twins_of<S>(60, key_rank, options);
      CHECK(twins.merged.max_rank() == 3);
      CHECK(twins.merged.head_dim() == 15);
      for (const std::vector<Index>& lengths : {std::vector<Index>{1}, {3, 130, 64, 1}}) {
        const Sequences sequences(lengths);
        const MatrixX<S> x = noise<S>(5, sequences.tokens(), 1), dy = noise<S>(5, sequences.tokens(), 2);
        std::vector<RankSlice> mix{3, RankSlice::none(), {2, 1}, 1};
        mix.resize(lengths.size(), 2);
        for (const BatchRanks& ranks :
             {BatchRanks(RankSlice::none()), BatchRanks(1), BatchRanks(3), BatchRanks(3, 2), BatchRanks::per_sequence(sequences, mix)}) {
          typename Attention<S>::Cache separate_cache;
          typename Merged::Cache cache;
          auto expected = zeros_like(twins.separate);
          auto gradients = zeros_like(twins.merged);
          CHECK(same_bits(twins.merged.forward(x, sequences, ranks, cache), twins.separate.forward(x, sequences, ranks, separate_cache)));
          const MatrixX<S> dx = twins.merged.backward(dy, cache, gradients),
                           dx_apart = twins.separate.backward(dy, separate_cache, expected);
          CHECK(same_bits(values<Merged>(gradients), values<Attention<S>>(expected)));
          CHECK(trained_components<Merged>(gradients) == trained_components<Attention<S>>(expected));
          CHECK(gap(in_double(dx), in_double(dx_apart)) < rounding<S>);
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("generation with a merged attention is that of its slices bit for bit", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(5, 140, 1);
  for (const AttentionOptions& options : {AttentionOptions{.heads = 4}, {.heads = 4, .key_value_heads = 2}}) {
    const Twins<S> twins = twins_of<S>(12, 1, options);
    for (const RankSlice rank : {RankSlice::none(), RankSlice{1}, RankSlice{3}}) {
      for (const Index piece : {1, 7, 64, 140}) {
        KeyValueCache<S> past, separate_past;
        MatrixX<S> y(5, 140);
        for (Index begin = 0; begin < 140; begin += piece) {
          const auto next = x.middleCols(begin, std::min(piece, 140 - begin));
          y.middleCols(begin, next.cols()) = twins.merged.extend(next, rank, past);
          CHECK(same_bits(MatrixX<S>(y.middleCols(begin, next.cols())), twins.separate.extend(next, rank, separate_past)));
        }
        CHECK(same_bits(y, twins.merged.forward(x, rank)));
        CHECK(same_bits(MatrixX<S>(past.keys()), MatrixX<S>(separate_past.keys())));
      }
    }
  }
}

TEMPLATE_TEST_CASE("a merged attention without its adapters has the weights of its slices without theirs", "", float, double) {
  using S = TestType;
  const Twins<S> twins = twins_of<S>(12, 0, {.heads = 4, .key_value_heads = 2});
  const MatrixX<S> x = noise<S>(5, 9, 1);
  for (const Index rank : {1, 2, 3}) {
    const auto merged = twins.merged.merged(rank);
    const auto apart = twins.separate.merged(rank);
    CHECK(same_bits(MatrixX<S>(merged.qkv.base.W.topRows(12)), apart.q.base.W));
    CHECK(same_bits(MatrixX<S>(merged.qkv.base.W.middleRows(12, 6)), twins.separate.k.base.W));
    CHECK(same_bits(MatrixX<S>(merged.qkv.base.W.bottomRows(6)), apart.v.base.W));
    CHECK(same_bits(merged.o.base.W, apart.o.base.W));
    CHECK(same_bits(merged.forward(x, RankSlice::none()), apart.forward(x, RankSlice::none())));
  }
  CHECK_THROWS_SAYING(std::invalid_argument, twins.merged.merged(4), "MergedAttention::merged", "max_rank = 3", "got 4");
}

TEST_CASE("the adapters of a merged attention are those of its slices by name") {
  const Twins<float> twins = twins_of<float>(12, 0, {.heads = 4});
  CHECK(adapter_ranks(twins.merged) ==
        std::vector<AdapterRank>{{"qkv_proj.0", 3, 17}, {"qkv_proj.1", 0, 17}, {"qkv_proj.2", 2, 17}, {"o_proj", 2, 17}});
  CHECK(names(MergedAttention<float>(MakeLayer<MergedAttention<float>>::make(0, 2))) ==
        std::vector<std::string>{"qkv_proj.lora_A", "qkv_proj.lora_B", "o_proj.lora_A", "o_proj.lora_B"});
  std::vector<std::string> layers;
  for_each_layer(twins.merged, [&](std::string_view name, const auto&) { layers.emplace_back(name); });
  CHECK(layers == std::vector<std::string>{"qkv_proj", "o_proj"});
}

TEMPLATE_TEST_CASE("a workspace that other merged attentions have used gives the same gradients", "", float, double) {
  using S = TestType;
  using L = MergedAttention<S, InSlices<S>>;
  const L attention = twins_of<S>(12, 1, {.heads = 4, .key_value_heads = 2}).merged;
  const MatrixX<S> x = noise<S>(5, 12, 1), dy = noise<S>(5, 12, 2);
  typename L::Cache cache;
  (void)attention.forward(x, Sequences({7, 5}), 2, cache);
  auto own = zeros_like(attention), other = zeros_like(attention);
  const MatrixX<S> dx = attention.backward(dy, cache, own);
  typename L::Workspace used;
  for (Buffer<S>* buffer : {&used.dQKV, &used.d_context, &used.dot}) buffer->resize(50, 60).setConstant(nan<S>);
  MatrixX<S> dx_other = all_nan<S>(5, 12);
  attention.backward(dy, cache, other, used, dx_other);
  CHECK(same_bits(dx_other, dx));
  CHECK(same_bits(values<L>(other), values<L>(own)));
}

TEST_CASE("a merged attention refuses projections that do not fit each other and heads that do not divide") {
  const auto make = [](Index out_qkv, Index in_o, AttentionOptions options) {
    const auto frozen = [](Index in, Index out) { return MakeLayer<FrozenLinear<float>>::make(in, out, false, 0, 1); };
    return MergedAttention<float, FrozenLinear<float>, FrozenLinear<float>>(frozen(5, out_qkv), frozen(in_o, 5), options);
  };
  CHECK(make(24, 12, {.heads = 4, .key_value_heads = 2}).head_dim() == 3);
  CHECK_THROWS_SAYING(ShapeError, make(35, 12, {.heads = 4}), "MergedAttention: out_features of qkv", "expected 36", "got 35");
  CHECK_THROWS_SAYING(ShapeError, make(36, 12, {.heads = 4, .key_value_heads = 2}), "out_features of qkv", "expected 24", "got 36");
  CHECK_THROWS_SAYING(std::invalid_argument, make(36, 12, {.heads = 5}), "heads", "divide", "12", "got heads 5");
  CHECK_THROWS_SAYING(std::invalid_argument, make(36, 12, {.heads = 4, .key_value_heads = 3}), "key_value_heads", "divide", "got heads 4",
                      "3");
  CHECK_THROWS_SAYING(std::invalid_argument, make(36, 12, {.heads = 13}), "Attention: heads", "[1, 12]", "got 13");
}

TEST_CASE("a cache of a merged attention of other shapes is refused and nothing is added") {
  const auto attention = twins_of<float>(12, 1, {.heads = 4}).merged,
             grouped = twins_of<float>(12, 1, {.heads = 4, .key_value_heads = 2}).merged;
  using L = std::remove_const_t<decltype(attention)>;
  const MatrixX<float> x = noise<float>(5, 9, 1);
  L::Cache cache;
  const MatrixX<float> dy = grouped.forward(x, 2, cache);
  auto gradients = zeros_like(attention);
  CHECK_THROWS_SAYING(ShapeError, attention.backward(dy, cache, gradients), "rows of the cached queries, keys and values", "expected 36",
                      "got 24");
  (void)attention.forward(x, 2, cache);
  gradients.qkv.adapter.slices[2].A.setZero(1, 1);
  CHECK_THROWS_SAYING(ShapeError, attention.backward(dy, cache, gradients), "gradient of qkv_proj.2.lora_A");
  CHECK(gradients.o.adapter.B.isZero(0));
}

}  // namespace dylora::test
