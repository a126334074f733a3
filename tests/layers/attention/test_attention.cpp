#include "dylora/layers/attention/attention.hpp"
#include "dylora/testing/gradient_check.hpp"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "dylora/ranks/truncate.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

template <class S>
using AllAdapted = Attention<S>;
template <class S>
using RaggedBatch = Ragged<Attention<S>>;
template <class S>
using Mixed = Attention<S, Linear<S>, FrozenLinear<S>, Linear<S, Dropout<LowRank<S>>, WeightView<S, RowMatrix<S>>>, FrozenLinear<S>>;

using LayersUnderTest = InFloatAndDouble<AllAdapted, RaggedBatch, Mixed>;

}  // namespace dylora::test

#include "laws/layer_laws.hpp"

namespace dylora::test {

namespace {

template <class S>
Attention<S> attention_of(Index features, AttentionOptions options) {
  const Index kv_heads = options.key_value_heads == 0 ? options.heads : options.key_value_heads,
              kv_features = features / options.heads * kv_heads;
  const auto projection = [](Index in, Index out, std::uint64_t seed) { return MakeLayer<Linear<S>>::make(in, out, true, 2, seed); };
  Attention<S> attention(projection(5, features, 1), projection(5, kv_features, 4), projection(5, kv_features, 7),
                         projection(features, 5, 10), options);
  randomize<Attention<S>>(attention, 3);
  return attention;
}

/// The equation of the header in the plainest way, in long double between the projections, each at its own largest rank where that is less.
template <class S>
MatrixX<double> plain_attention(const Attention<S>& attention, const MatrixX<S>& x, const Sequences& sequences, RankSlice rank) {
  using Exact = MatrixX<long double>;
  const auto project = [&](const Linear<S>& part, const MatrixX<S>& input) { return part.forward(input, rank.at_most(part.max_rank())); };
  const Exact Q = project(attention.q, x).template cast<long double>(), K = project(attention.k, x).template cast<long double>(),
              V = project(attention.v, x).template cast<long double>();
  const Index d = attention.head_dim(), group = attention.options.heads / attention.options.key_value_heads;
  Exact context = Exact::Zero(Q.rows(), x.cols());
  for (Index s = 0; s < sequences.count(); ++s) {
    for (Index head = 0; head < attention.options.heads; ++head) {
      for (Index i = 0; i < sequences.length(s); ++i) {
        const Index query = sequences.begin(s) + i, seen = attention.options.causal ? i + 1 : sequences.length(s);
        VectorX<long double> p(seen);
        for (Index j = 0; j < seen; ++j) {
          p[j] = Q.col(query).segment(head * d, d).dot(K.col(sequences.begin(s) + j).segment(head / group * d, d)) /
                 std::sqrt(static_cast<long double>(d));
        }
        p = (p.array() - p.maxCoeff()).exp();
        p /= p.sum();
        for (Index j = 0; j < seen; ++j)
          context.col(query).segment(head * d, d) += p[j] * V.col(sequences.begin(s) + j).segment(head / group * d, d);
      }
    }
  }
  return project(attention.o, context.template cast<S>()).template cast<double>();
}

/// Projections of different largest ranks: 5, 2, none and 2.
template <class S>
Attention<S> uneven_attention() {
  const auto projection = [](Index max_rank, std::uint64_t seed) { return MakeLayer<Linear<S>>::make(12, 12, true, max_rank, seed); };
  Attention<S> attention(projection(5, 1), projection(2, 4), projection(0, 7), projection(2, 10), {.heads = 4});
  randomize<Attention<S>>(attention, 3);
  return attention;
}

const std::vector<AttentionOptions> settings{
    {.heads = 4}, {.heads = 4, .causal = false}, {.heads = 4, .key_value_heads = 2}, {.heads = 4, .key_value_heads = 1, .causal = false}};

}  // namespace

// Lengths around the tile of 64.
TEMPLATE_TEST_CASE("an attention is the softmax of its scores over what a token sees", "", float, double) {
  using S = TestType;
  for (const AttentionOptions options : settings) {
    const Attention<S> attention = attention_of<S>(12, options);
    for (const std::vector<Index>& lengths : {std::vector<Index>{1}, {2}, {63}, {64}, {65}, {130}, {3, 1, 70, 64}}) {
      const Sequences sequences(lengths);
      const MatrixX<S> x = 2 * noise<S>(5, sequences.tokens(), 1);
      CHECK(gap(in_double(attention.forward(x, sequences, 2)), plain_attention(attention, x, sequences, 2)) < 4 * rounding<S>);
    }
  }
}

TEST_CASE("the backward of an attention over several tiles is its derivative") {
  for (const bool causal : {true, false}) {
    const auto attention = attention_of<double>(4, {.heads = 2, .key_value_heads = 1, .causal = causal});
    const MatrixX<double> x = 2 * noise<double>(5, 70, 1);
    Rng rng(4);
    const GradientReport report = check_gradients(attention, x, 2, rng, {}, Sequences({67, 3}));
    INFO(report.where);
    CHECK(report.error < 1e-6);
  }
}

TEST_CASE("huge scores overflow nothing") {
  auto attention = attention_of<float>(12, {.heads = 4});
  attention.q.base.W *= 1e3f;
  attention.k.base.W *= 1e3f;
  const MatrixX<float> x = noise<float>(5, 70, 1), dy = noise<float>(5, 70, 2);
  const auto result = run(attention, x, dy, 2);
  CHECK(result.y.allFinite());
  CHECK(result.dx.allFinite());
  CHECK(values<Attention<float>>(result.gradients).allFinite());
}

TEMPLATE_TEST_CASE("a sequence's output and gradient do not depend on the batch it is in", "", float, double) {
  using S = TestType;
  const std::vector<Index> lengths{3, 1, 131, 64, 20};
  const Sequences sequences(lengths);
  const MatrixX<S> x = noise<S>(5, sequences.tokens(), 1), dy = noise<S>(5, sequences.tokens(), 2);
  for (const AttentionOptions options : settings) {
    const Attention<S> attention = attention_of<S>(60, options);
    for (const Index rank : {1, 2}) {
      typename Attention<S>::Cache cache;
      auto gradients = zeros_like(attention);
      const MatrixX<S> y = attention.forward(x, sequences, rank, cache), dx = attention.backward(dy, cache, gradients);
      for (Index s = 0; s < sequences.count(); ++s) {
        const Index begin = sequences.begin(s), n = sequences.length(s);
        const auto alone = run<Attention<S>>(attention, x.middleCols(begin, n), dy.middleCols(begin, n), rank);
        CHECK(same_bits(alone.y, MatrixX<S>(y.middleCols(begin, n))));
        CHECK(same_bits(alone.dx, MatrixX<S>(dx.middleCols(begin, n))));
      }
    }
  }
}

TEST_CASE("a causal attention never looks at what comes later") {
  const auto attention = attention_of<float>(12, {.heads = 4});
  const MatrixX<float> x = noise<float>(5, 100, 1), y = attention.forward(x, 2);
  for (const Index seen : {1, 63, 64, 65, 99}) {
    CHECK(same_bits(attention.forward(x.leftCols(seen), 2), MatrixX<float>(y.leftCols(seen))));
    MatrixX<float> other = x;
    other.rightCols(100 - seen) = noise<float>(5, 100 - seen, 9);
    CHECK(same_bits(MatrixX<float>(attention.forward(other, 2).leftCols(seen)), MatrixX<float>(y.leftCols(seen))));
  }
}

TEMPLATE_TEST_CASE("generation equals the forward of the whole sequence bit for bit however it is cut", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(5, 140, 1);
  for (const AttentionOptions options : {AttentionOptions{.heads = 4}, {.heads = 4, .key_value_heads = 2}}) {
    const Attention<S> attention = attention_of<S>(12, options);
    for (const RankSlice rank : {RankSlice::none(), RankSlice{1}, RankSlice{2}}) {
      const MatrixX<S> whole = attention.forward(x, rank);
      for (const Index piece : {1, 7, 64, 100, 140}) {
        KeyValueCache<S> past;
        MatrixX<S> y(5, 140);
        for (Index begin = 0; begin < 140; begin += piece) {
          const Index n = std::min(piece, 140 - begin);
          y.middleCols(begin, n) = attention.extend(x.middleCols(begin, n), rank, past);
          CHECK(past.length() == begin + n);
        }
        CHECK(same_bits(y, whole));
      }
    }
  }
}

TEMPLATE_TEST_CASE("a workspace that others have used gives the same gradients", "", float, double) {
  using S = TestType;
  using L = Attention<S>;
  const L attention = uneven_attention<S>();
  const Sequences sequences({7, 5});
  const MatrixX<S> x = noise<S>(attention.in_features(), 12, 1), dy = noise<S>(attention.out_features(), 12, 2);
  typename L::Cache cache;
  (void)attention.forward(x, sequences, 1, cache);
  auto own = zeros_like(attention), other = zeros_like(attention);
  const MatrixX<S> dx = attention.backward(dy, cache, own);
  typename L::Workspace used;
  for (Buffer<S>* buffer : {&used.dQ, &used.dK, &used.dV, &used.d_context, &used.dot}) buffer->resize(50, 60).setConstant(nan<S>);
  MatrixX<S> dx_other = all_nan<S>(dx.rows(), dx.cols());
  attention.backward(dy, cache, other, used, dx_other);
  CHECK(same_bits(dx_other, dx));
  CHECK(same_bits(values<L>(other), values<L>(own)));
}

TEST_CASE("one sequence is a batch of one") {
  const auto attention = attention_of<float>(12, {.heads = 4});
  const MatrixX<float> x = noise<float>(5, 9, 1);
  CHECK(same_bits(attention.forward(x, 2), attention.forward(x, Sequences({9}), 2)));
}

TEST_CASE("as many key and value heads as heads is what 0 means") {
  const auto by_default = attention_of<float>(12, {.heads = 4}), spelled = attention_of<float>(12, {.heads = 4, .key_value_heads = 4});
  CHECK(by_default.options.key_value_heads == 4);
  const MatrixX<float> x = noise<float>(5, 9, 1);
  CHECK(same_bits(by_default.forward(x, 2), spelled.forward(x, 2)));
}

TEMPLATE_TEST_CASE("a projection of fewer components than the rank uses all that it has", "", float, double) {
  using S = TestType;
  const Attention<S> uneven = uneven_attention<S>();
  CHECK(uneven.max_rank() == 5);
  const Sequences sequences({7, 2});
  const MatrixX<S> x = noise<S>(12, 9, 1), dy = noise<S>(12, 9, 2);
  for (const RankSlice rank : {RankSlice{1}, RankSlice{2}, RankSlice{4}, RankSlice{5}})
    CHECK(gap(in_double(uneven.forward(x, sequences, rank)), plain_attention(uneven, x, sequences, rank)) < 4 * rounding<S>);

  // Bit for bit an attention that had 5 components everywhere and was cut, if their scale is that of the largest rank left.
  Attention<S> cut = uneven;
  for (const auto& [part, components] : {std::pair{&cut.k, 2}, {&cut.v, 0}, {&cut.o, 2}}) {
    LowRank<S>& adapter = part->adapter;
    LowRank<S> larger = make_adapter<LowRank<S>>(12, 12, 5, 20);
    larger.A.topRows(components) = adapter.A;
    larger.B.leftCols(components) = adapter.B;
    adapter = larger;
  }
  truncate_each(cut, {5, 2, 0, 2});
  for (const BatchRanks& ranks :
       {BatchRanks(4), BatchRanks(5, 1), BatchRanks(5, 4), BatchRanks(2), BatchRanks::per_sequence(sequences, {4, {5, 2}})}) {
    const auto run_both = [&](const Attention<S>& attention) {
      typename Attention<S>::Cache cache;
      auto gradients = zeros_like(attention);
      const MatrixX<S> y = attention.forward(x, sequences, ranks, cache), dx = attention.backward(dy, cache, gradients);
      return std::pair{joined<S>({y.reshaped(), dx.reshaped(), values<Attention<S>>(gradients)}),
                       trained_components<Attention<S>>(gradients)};
    };
    const auto got = run_both(uneven), expected = run_both(cut);
    CHECK(same_bits(got.first, expected.first));
    CHECK(got.second == expected.second);
  }
  typename Attention<S>::Cache cache;
  auto gradients = zeros_like(uneven);
  (void)uneven.forward(x, sequences, {4, 1}, cache);
  (void)uneven.backward(dy, cache, gradients);
  CHECK(trained_components<Attention<S>>(gradients) == std::vector<std::string>{"01110", "01110", "01", "01", "", "", "01", "01"});

  for (const RankSlice rank : {RankSlice{1}, RankSlice{4}, RankSlice{5}}) {
    const auto merged = uneven.merged(rank);
    CHECK(gap(in_double(merged.forward(x, sequences, RankSlice::none())), in_double(uneven.forward(x, sequences, rank))) < 4 * rounding<S>);
    CHECK(same_bits(merged.q.base.W, uneven.q.merged(rank).W));
    CHECK(same_bits(merged.k.base.W, uneven.k.merged(rank.at_most(2)).W));
    CHECK(same_bits(merged.v.base.W, uneven.v.base.W));
    CHECK(same_bits(merged.o.base.W, uneven.o.merged(rank.at_most(2)).W));

    const MatrixX<S> whole = uneven.forward(x, rank);
    KeyValueCache<S> past;
    MatrixX<S> y(12, 9);
    for (Index i = 0; i < 9; ++i) y.col(i) = uneven.extend(x.col(i), rank, past);
    CHECK(same_bits(y, whole));
  }
}

TEST_CASE("the backward of an attention of different largest ranks is its derivative") {
  Rng rng(4);
  for (const RankSlice rank : {RankSlice{4}, RankSlice{5, 1}, RankSlice{4, 3}, RankSlice{2}, RankSlice{4, 4}}) {
    const GradientReport report = check_gradients(uneven_attention<double>(), noise<double>(12, 6, 1), rank, rng, {}, Sequences({4, 2}));
    INFO(report.where);
    CHECK(report.error < 1e-6);
  }
}

TEST_CASE("the largest rank of an attention is the largest that any of its adapters has") {
  const Attention<float> uneven = uneven_attention<float>();
  const MatrixX<float> x = noise<float>(12, 3, 1);
  KeyValueCache<float> past;
  CHECK_THROWS_SAYING(std::invalid_argument, uneven.forward(x, 6), "Attention::forward", "max_rank = 5", "got 6");
  CHECK_THROWS_SAYING(std::invalid_argument, uneven.forward(x, BatchRanks::per_sample({1, 6, 1})), "Attention::forward", "max_rank = 5",
                      "got 6");
  CHECK_THROWS_SAYING(std::invalid_argument, uneven.extend(x, 6, past), "Attention::extend", "max_rank = 5", "got 6");
  CHECK_THROWS_SAYING(std::invalid_argument, uneven.merged(6), "Attention::merged", "max_rank = 5", "got 6");
  CHECK(past.length() == 0);
  CHECK(MakeLayer<Attention<float>>::make(3, law_rank).max_rank() == law_rank);
  CHECK(MakeLayer<Attention<float, FrozenLinear<float>>>::make(0, law_rank).max_rank() == 0);
}

TEMPLATE_TEST_CASE("generation whose rank changes equals one forward with a rank per token bit for bit", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(5, 140, 1);
  const std::vector<RankSlice> change{2, 2, 1, RankSlice::none(), {2, 1}};
  for (const AttentionOptions options : {AttentionOptions{.heads = 4}, {.heads = 4, .key_value_heads = 2}}) {
    const Attention<S> attention = attention_of<S>(12, options);
    for (const Index piece : {1, 7, 64}) {
      std::vector<RankSlice> ranks;
      KeyValueCache<S> past;
      MatrixX<S> y(5, 140);
      for (Index begin = 0; begin < 140; begin += piece) {
        const Index n = std::min(piece, 140 - begin);
        const RankSlice rank = change[static_cast<std::size_t>(begin / piece) % change.size()];
        ranks.insert(ranks.end(), static_cast<std::size_t>(n), rank);
        y.middleCols(begin, n) = attention.extend(x.middleCols(begin, n), rank, past);
      }
      CHECK(same_bits(y, attention.forward(x, BatchRanks::per_sample(ranks))));
    }
  }
}

// Over several tiles, and with more tokens than a product adds up in one block.
TEMPLATE_TEST_CASE("a sequence at a rank of its own is what it is apart from its batch", "", float, double) {
  using S = TestType;
  const std::vector<Index> lengths{3, 1, 300, 64, 20};
  const Sequences sequences(lengths);
  const std::vector<RankSlice> ranks{2, RankSlice::none(), 1, {2, 2}, {2, 1}};
  const MatrixX<S> x = noise<S>(5, sequences.tokens(), 1), dy = noise<S>(5, sequences.tokens(), 2);
  for (const AttentionOptions options : settings) {
    const Attention<S> attention = attention_of<S>(60, options);
    typename Attention<S>::Cache cache, alone;
    auto gradients = zeros_like(attention), apart = zeros_like(attention);
    const MatrixX<S> y = attention.forward(x, sequences, BatchRanks::per_sequence(sequences, ranks), cache);
    const MatrixX<S> dx = attention.backward(dy, cache, gradients);
    for (Index s = 0; s < sequences.count(); ++s) {
      const Index begin = sequences.begin(s), n = sequences.length(s);
      const auto rank = ranks[static_cast<std::size_t>(s)];
      CHECK(same_bits(attention.forward(x.middleCols(begin, n), rank, alone), MatrixX<S>(y.middleCols(begin, n))));
      CHECK(same_bits(attention.backward(dy.middleCols(begin, n), alone, apart), MatrixX<S>(dx.middleCols(begin, n))));
    }
    CHECK(same_bits(values<Attention<S>>(gradients), values<Attention<S>>(apart)));
    CHECK(trained_components<Attention<S>>(gradients) == trained_components<Attention<S>>(apart));
  }
}

TEST_CASE("an attention refuses projections that do not fit each other and heads that do not divide") {
  const auto make = [](Index in_q, Index in_k, Index in_v, Index out_q, Index out_k, Index out_v, Index in_o, AttentionOptions options) {
    const auto frozen = [](Index in, Index out) { return MakeLayer<FrozenLinear<float>>::make(in, out, false, 0, 1); };
    return Attention<float, FrozenLinear<float>>(frozen(in_q, out_q), frozen(in_k, out_k), frozen(in_v, out_v), frozen(in_o, 5), options);
  };
  CHECK(make(5, 5, 5, 12, 6, 6, 12, {.heads = 4, .key_value_heads = 2}).head_dim() == 3);
  CHECK_THROWS_SAYING(ShapeError, make(5, 6, 5, 12, 12, 12, 12, {.heads = 4}), "in_features of k", "expected 5", "got 6");
  CHECK_THROWS_SAYING(ShapeError, make(5, 5, 6, 12, 12, 12, 12, {.heads = 4}), "in_features of v", "expected 5", "got 6");
  CHECK_THROWS_SAYING(ShapeError, make(5, 5, 5, 12, 11, 12, 12, {.heads = 4}), "out_features of k", "expected 12", "got 11");
  CHECK_THROWS_SAYING(ShapeError, make(5, 5, 5, 12, 6, 12, 12, {.heads = 4, .key_value_heads = 2}), "out_features of v", "expected 6",
                      "got 12");
  CHECK_THROWS_SAYING(ShapeError, make(5, 5, 5, 12, 12, 12, 11, {.heads = 4}), "in_features of o", "expected 12", "got 11");
  CHECK_THROWS_SAYING(std::invalid_argument, make(5, 5, 5, 12, 12, 12, 12, {.heads = 5}), "heads", "divide", "12", "got heads 5");
  CHECK_THROWS_SAYING(std::invalid_argument, make(5, 5, 5, 12, 12, 12, 12, {.heads = 4, .key_value_heads = 3}), "key_value_heads", "divide",
                      "got heads 4", "3");
  CHECK_THROWS_SAYING(std::invalid_argument, make(5, 5, 5, 12, 12, 12, 12, {.heads = 0}), "Attention: heads", "[1, 12]", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, make(5, 5, 5, 12, 12, 12, 12, {.heads = 13}), "Attention: heads", "[1, 12]", "got 13");
  CHECK_THROWS_SAYING(std::invalid_argument, make(5, 5, 5, 12, 12, 12, 12, {.heads = 4, .key_value_heads = 8}), "key_value_heads", "[1, 4]",
                      "got 8");
  CHECK_THROWS_SAYING(std::invalid_argument, make(5, 5, 5, 12, 12, 12, 12, {.heads = 4, .key_value_heads = -1}), "key_value_heads",
                      "got -1");
}

TEST_CASE("an attention refuses sequences that are not its tokens") {
  const auto attention = attention_of<float>(12, {.heads = 4});
  Attention<float>::Cache cache;
  const MatrixX<float> x = noise<float>(5, 9, 1);
  CHECK_THROWS_SAYING(ShapeError, attention.forward(x, Sequences({4, 4}), 2), "tokens in x", "sequences", "expected 8", "got 9");
  CHECK_THROWS_SAYING(ShapeError, attention.forward(x, Sequences({9, 1}), 2, cache), "tokens in x", "expected 10", "got 9");
  CHECK_THROWS_SAYING(ShapeError, attention.forward(x, Sequences(), 2), "tokens in x", "expected 0", "got 9");
  CHECK_THROWS_SAYING(ShapeError, attention.forward(MatrixX<float>(5, 0), Sequences({1}), 2), "Attention::forward: x", "empty batch");
}

TEST_CASE("a NaN in a key reaches every query that sees it and no other sequence") {
  const auto attention = attention_of<float>(12, {.heads = 4, .causal = false});
  MatrixX<float> x = noise<float>(5, 140, 1);
  const Sequences sequences({130, 10});
  const MatrixX<float> clean = attention.forward(x, sequences, 2);
  x.leftCols(64).setConstant(nan<float>);  // a whole tile of keys
  const MatrixX<float> y = attention.forward(x, sequences, 2);
  CHECK(y.leftCols(130).array().isNaN().all());
  CHECK(same_bits(MatrixX<float>(y.rightCols(10)), MatrixX<float>(clean.rightCols(10))));

  // Only the keys, as where they overflow: the values by themselves would hide a key tile that was passed over.
  const auto keys_only = [&](const MatrixX<float>& keys) {
    const MatrixX<float> queries = noise<float>(6, 70, 2), values = noise<float>(6, 70, 3);
    MatrixX<float> out(6, 70);
    std::vector<float> logsumexp(70);
    for (const Index query : {0, 64}) {
      detail::attend<float>({70, 70, 0, true}, 1, query, std::min<Index>(64, 70 - query), queries, keys, values, out, logsumexp.data());
    }
    return out;
  };
  MatrixX<float> keys = noise<float>(6, 70, 4);
  CHECK(keys_only(keys).allFinite());
  keys.leftCols(64).setConstant(nan<float>);
  CHECK(keys_only(keys).array().isNaN().all());
}

TEST_CASE("a cache of an attention of other shapes is refused and nothing is added") {
  const auto attention = attention_of<float>(12, {.heads = 4}), grouped = attention_of<float>(12, {.heads = 4, .key_value_heads = 2});
  const MatrixX<float> x = noise<float>(5, 9, 1);
  typename Attention<float>::Cache cache;
  const MatrixX<float> dy = grouped.forward(x, 2, cache);
  auto gradients = zeros_like(attention);
  CHECK_THROWS_SAYING(ShapeError, attention.backward(dy, cache, gradients), "rows of the cached keys", "expected 12", "got 6");
  // Gradients of which a later one does not fit: the earlier ones are left alone.
  (void)attention.forward(x, 2, cache);
  gradients.q.adapter.A.setZero(1, 1);
  CHECK_THROWS_SAYING(ShapeError, attention.backward(dy, cache, gradients), "gradient of q_proj.lora_A");
  CHECK(gradients.o.adapter.B.isZero(0));
}

TEST_CASE("an attention whose last projection refuses its cache has added nothing") {
  auto attention = attention_of<float>(12, {.heads = 4});
  const MatrixX<float> x = noise<float>(5, 9, 1), before = noise<float>(5, 9, 3);
  typename Attention<float>::Cache cache;
  const MatrixX<float> dy = attention.forward(x, 2, cache);
  truncate(attention.v, 1);
  auto gradients = zeros_like(attention);
  MatrixX<float> dx = before;
  CHECK_THROWS_AS(attention.check_backward(dy, cache, gradients, Attention<float>::Workspace()), std::invalid_argument);
  CHECK_THROWS_AS(attention.backward(dy, cache, gradients, dx), std::invalid_argument);
  CHECK_THROWS_AS(attention.backward(dy, cache, gradients, no_dx), std::invalid_argument);
  CHECK(values<Attention<float>>(gradients).isZero(0));
  CHECK(same_bits(dx, before));
}

TEST_CASE("generation refuses what does not fit and leaves the past as it was") {
  const auto attention = attention_of<float>(12, {.heads = 4});
  KeyValueCache<float> past, foreign;
  foreign.append(noise<float>(6, 3, 1), noise<float>(6, 3, 1));
  (void)attention.extend(noise<float>(5, 2, 1), 2, past);
  const MatrixX<float> keys = past.keys();
  CHECK_THROWS_SAYING(ShapeError, attention.extend(MatrixX<float>(5, 0), 2, past), "Attention::extend: x", "empty batch");
  CHECK_THROWS_SAYING(ShapeError, attention.extend(noise<float>(6, 1, 1), 2, past), "rows of x", "expected 5", "got 6");
  CHECK_THROWS_SAYING(std::invalid_argument, attention.extend(noise<float>(5, 1, 1), 3, past), "rank", "max_rank = 2", "got 3");
  CHECK_THROWS_SAYING(std::invalid_argument, attention.extend(noise<float>(5, 1, 1), 0, past), "rank", "at least 1", "got 0");
  CHECK_THROWS_SAYING(ShapeError, attention.extend(noise<float>(5, 1, 1), 2, foreign), "KeyValueCache: features of keys", "expected 6",
                      "got 12");
  CHECK_THROWS_SAYING(std::invalid_argument, attention_of<float>(12, {.heads = 4, .causal = false}).extend(noise<float>(5, 1, 1), 2, past),
                      "Attention::extend", "causal");
  CHECK(same_bits(MatrixX<float>(past.keys()), keys));
  CHECK(foreign.length() == 3);
}

}  // namespace dylora::test
