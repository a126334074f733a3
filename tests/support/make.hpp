#ifndef DYLORA_TESTS_SUPPORT_MAKE_HPP
#define DYLORA_TESTS_SUPPORT_MAKE_HPP

#include <algorithm>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/adapters/dropout.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/adapters/none.hpp"
#include "dylora/adapters/stacked.hpp"
#include "dylora/layers/attention/attention.hpp"
#include "dylora/layers/attention/merged.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/weights/dense.hpp"
#include "dylora/weights/view.hpp"
#include "support/values.hpp"

/// How the laws make each thing that they are shown on. The same arguments make the same thing, in float the rounded values of double.
namespace dylora::test {

// Adapters: a line for each.

template <class T>
struct As {};

inline constexpr double law_alpha = 3;

template <class S>
LowRankOptions options_of(As<LowRank<S>>, Index /*out*/, Index max_rank) {
  return {.max_rank = max_rank, .alpha = law_alpha};
}
template <class Inner>
typename Dropout<Inner>::Options options_of(As<Dropout<Inner>>, Index out, Index max_rank) {
  return {.adapter = options_of(As<Inner>{}, out, max_rank), .probability = 0.25};
}
/// Three slices: one with the rank that was asked for, one without an adapter, and one with as much of it as there is room for.
template <class Inner>
typename Stacked<Inner>::Options options_of(As<Stacked<Inner>>, Index out, Index max_rank) {
  const Index rows = std::max<Index>(1, out / 4);
  const auto adapter = [&](Index rank) { return options_of(As<Inner>{}, rows, rank); };
  return {.adapters = {adapter(max_rank), adapter(0), adapter(std::min(max_rank, rows))}, .out_features = {out - 2 * rows, rows, rows}};
}

template <class A>
A make_adapter(Index in, Index out, Index max_rank, std::uint64_t seed) {
  if constexpr (std::constructible_from<A, Index, Index>) {
    return A(in, out);
  } else {
    Rng rng(seed);
    return A(in, out, options_of(As<A>{}, out, max_rank), rng);
  }
}

/// Whether the gradient of one component of an adapter depends on the others that are active with it.
template <class A>
inline constexpr bool couples_components = false;

// Weights.

template <class W>
struct MakeWeight;

template <class S, class Values>
struct MakeWeight<DenseWeight<S, Values>> {
  using Storage = Values;
  static DenseWeight<S, Values> make(Index out, Index in, bool bias, std::uint64_t seed) {
    const VectorX<S> b = noise<S>(out, 1, seed + 1);
    return {Values(noise<S>(out, in, seed)), bias ? b : VectorX<S>()};
  }
};

/// A view of padded memory that lives as long as the program; the padding is NaN, so that a view which reads it is found out.
template <class S, class Values>
struct MakeWeight<WeightView<S, Values>> {
  using Storage = Values;
  static WeightView<S, Values> make(Index out, Index in, bool bias, std::uint64_t seed) {
    struct Memory {
      std::vector<S> values;
      VectorX<S> bias;
    };
    static std::map<std::tuple<Index, Index, bool, std::uint64_t>, Memory> memories;
    const Index inner = Values::IsRowMajor ? in : out, outer = Values::IsRowMajor ? out : in, stride = inner + 3;
    Memory& memory = memories[{out, in, bias, seed}];
    if (memory.values.empty()) {
      memory.values.assign(static_cast<std::size_t>(stride * outer), nan<S>);
      const Values source = noise<S>(out, in, seed);
      for (Index i = 0; i < source.size(); ++i) memory.values[static_cast<std::size_t>(i / inner * stride + i % inner)] = source.data()[i];
      memory.bias = noise<S>(out, 1, seed + 1);
    }
    return {memory.values.data(), out, in, bias ? memory.bias.data() : nullptr, stride};
  }
};

// Layers: `variant` counts the ways in which one type can be set up.

template <class L>
struct MakeLayer;

template <class S, class A, class W>
struct MakeLayer<Linear<S, A, W>> {
  static constexpr int variants = 2;
  static constexpr Index samples = 4;
  static Linear<S, A, W> make(Index in, Index out, bool bias, Index max_rank, std::uint64_t seed) {
    return {MakeWeight<W>::make(out, in, bias, seed), make_adapter<A>(in, out, max_rank, seed + 2)};
  }
  static Linear<S, A, W> make(int variant, Index max_rank) { return make(7, 6, variant == 1, max_rank, 10); }
};

template <class S, class Q, class K, class V, class O>
struct MakeLayer<Attention<S, Q, K, V, O>> {
  static constexpr int variants = 4;
  static constexpr Index samples = 6;
  static Attention<S, Q, K, V, O> make(int variant, Index max_rank) {
    const bool causal = variant != 1, grouped = variant >= 2, subset = variant == 3;
    const Index heads = 4, key_value_heads = grouped ? 2 : 4, features = 12, kv_features = grouped ? 6 : 12;
    return {MakeLayer<Q>::make(7, features, causal, max_rank, 20),
            MakeLayer<K>::make(7, kv_features, causal, subset ? 0 : max_rank, 30),
            MakeLayer<V>::make(7, kv_features, grouped, max_rank, 40),
            MakeLayer<O>::make(features, 6, false, subset ? 0 : max_rank, 50),
            {.heads = heads, .key_value_heads = key_value_heads, .causal = causal}};
  }
};

template <class S, class M, class O>
struct MakeLayer<MergedAttention<S, M, O>> {
  static constexpr int variants = 4;
  static constexpr Index samples = 6;
  static MergedAttention<S, M, O> make(int variant, Index max_rank) {
    const bool causal = variant != 1, grouped = variant >= 2, subset = variant == 3;
    return {MakeLayer<M>::make(7, grouped ? 24 : 36, causal, max_rank, 20),
            MakeLayer<O>::make(12, 6, false, subset ? 0 : max_rank, 50),
            {.heads = 4, .key_value_heads = grouped ? 2 : 4, .causal = causal}};
  }
};

/// An attention whose batches always divide the same way: 1 + 3 + 2 tokens.
template <class A>
struct Ragged : A {
  using Scalar = typename A::Scalar;
  using S = Scalar;
  using typename A::Cache;
  using typename A::Gradients;

  MatrixX<S> forward(ConstMatrixRef<S> x, const BatchRanks& ranks) const { return A::forward(x, divided(x), ranks); }
  MatrixX<S> forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const { return A::forward(x, divided(x), ranks, cache); }
  void forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    A::forward(x, divided(x), ranks, cache, y);
  }
  auto merged(RankSlice rank) const { return Ragged<decltype(A::merged(rank))>{A::merged(rank)}; }

 private:
  /// The last sequence takes what a batch of another size has more.
  static Sequences divided(const ConstMatrixRef<S>& x) { return x.cols() > 4 ? Sequences({1, 3, x.cols() - 4}) : Sequences(); }
};

template <class A>
struct MakeLayer<Ragged<A>> {
  static constexpr int variants = MakeLayer<A>::variants;
  static constexpr Index samples = 6;
  static Ragged<A> make(int variant, Index max_rank) { return {MakeLayer<A>::make(variant, max_rank)}; }
};

// What a layer's merged() returns, as a layer.

template <class L>
struct MergedType {
  using Type = std::decay_t<decltype(std::declval<const L&>().merged(RankSlice::none()))>;
};
template <class S, class A, class W>
struct MergedType<Linear<S, A, W>> {
  using Type = FrozenLinear<S>;
};
template <class L>
using Merged = typename MergedType<L>::Type;

template <class L>
inline constexpr bool is_mergeable = requires(const L& layer) { layer.merged(RankSlice::none()); };

/// The layer without what is trained: MakeLayer says which it is where a layer cannot be merged and is not one weight.
template <class L>
auto without_adapter(const L& layer) {
  if constexpr (is_mergeable<L>) {
    return Merged<L>(layer.merged(RankSlice::none()));
  } else if constexpr (requires { layer.base; }) {
    return FrozenLinear<typename L::Scalar, std::remove_cvref_t<decltype(layer.base)>>(layer.base);
  } else {
    return MakeLayer<L>::without_adapter(layer);
  }
}

// What a layer holds and must never change.

template <class S>
VectorX<S> joined(const std::vector<VectorX<S>>& parts) {
  std::vector<S> values;
  for (const VectorX<S>& part : parts) values.insert(values.end(), part.begin(), part.end());
  return Eigen::Map<const VectorX<S>>(values.data(), static_cast<Index>(values.size()));
}

template <class S, class A, class W>
VectorX<S> frozen_values(const Linear<S, A, W>& layer) {
  return joined<S>({layer.base.dense().reshaped(), layer.base.dense_bias()});
}
template <class S, class Q, class K, class V, class O>
VectorX<S> frozen_values(const Attention<S, Q, K, V, O>& layer) {
  return joined<S>({frozen_values(layer.q), frozen_values(layer.k), frozen_values(layer.v), frozen_values(layer.o)});
}
template <class S, class M, class O>
VectorX<S> frozen_values(const MergedAttention<S, M, O>& layer) {
  return joined<S>({frozen_values(layer.qkv), frozen_values(layer.o)});
}

// Caches from which every forward drops the same inputs, where a layer can drop at all.

template <class Cache>
void seed_dropout(Cache& cache) {
  if constexpr (requires { cache.rng; }) cache.rng = Rng(77);
  if constexpr (requires { cache.adapter; }) seed_dropout(cache.adapter);
  if constexpr (requires { cache.q; }) {
    seed_dropout(cache.q);
    seed_dropout(cache.k);
    seed_dropout(cache.v);
  }
  if constexpr (requires { cache.qkv; }) seed_dropout(cache.qkv);
  if constexpr (requires { cache.o; }) seed_dropout(cache.o);
}

template <class L>
typename L::Cache fresh_cache() {
  typename L::Cache cache;
  seed_dropout(cache);
  return cache;
}

}  // namespace dylora::test

#endif
