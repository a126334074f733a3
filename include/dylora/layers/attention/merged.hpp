#ifndef DYLORA_LAYERS_ATTENTION_MERGED_HPP
#define DYLORA_LAYERS_ATTENTION_MERGED_HPP

#include <concepts>
#include <utility>

#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/layers/attention/heads.hpp"
#include "dylora/layers/attention/self_attention.hpp"
#include "dylora/layers/layer.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/linalg/buffer.hpp"

namespace dylora {

namespace detail {

/// Q, K and V by one projection: its first rows are the queries, then come the keys, then as many values.
template <std::floating_point S, Projection Merged>
struct MergedProjection {
  struct Workspace {
    Buffer<S> dQKV;
    typename Merged::Workspace qkv;
  };

  struct Gradients {
    typename Merged::Gradients qkv;
  };

  struct Cache {
    Buffer<S> QKV;
    typename Merged::Cache qkv;
  };

  Merged qkv;
  Index query_features;  // as many rows of the weight

  static constexpr bool needs_linked_cache = !SelfContained<Merged>;

  Index in_features() const { return qkv.in_features(); }

  static void members(const auto& f, auto&... t) { f(Child<Merged>{"qkv_proj"}, t.qkv...); }

 protected:
  Index largest_rank() const { return qkv.max_rank(); }

  void project(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const {
    qkv.apply(x, ranks, cache.qkv, cache.QKV.resize(qkv.out_features(), x.cols()));
  }

  QueriesKeysValues<ConstMatrixRef<S>> inputs(const Cache& cache) const { return divided<ConstMatrixRef<S>>(cache.QKV.view()); }

  void check_inputs(const Cache& cache) const {
    require_equal(cache.QKV.rows(), qkv.out_features(), "Attention::backward: rows of the cached queries, keys and values");
  }

  void check_projections(ConstMatrixRef<S> x, const Cache& cache, const Gradients& gradients, const Workspace& workspace) const {
    qkv.check_backward(x, of_shape<S>(qkv.out_features(), x.cols()), cache.qkv, gradients.qkv, workspace.qkv);
  }

  QueriesKeysValues<MatrixRef<S>> input_gradients(Workspace& workspace, Index tokens) const {
    return divided<MatrixRef<S>>(workspace.dQKV.resize(qkv.out_features(), tokens));
  }

  void project_backward(ConstMatrixRef<S> x, const Cache& cache, Gradients& gradients, Workspace& workspace, MatrixRef<S> dx) const {
    qkv.set_backward(x, workspace.dQKV.view(), cache.qkv, gradients.qkv, workspace.qkv, dx);
  }
  void project_gradients(ConstMatrixRef<S> x, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    qkv.add_gradients(x, workspace.dQKV.view(), cache.qkv, gradients.qkv, workspace.qkv);
  }

 private:
  template <class M, class View>
  QueriesKeysValues<M> divided(View all) const {
    const Index others = (all.rows() - query_features) / 2;
    return {all.topRows(query_features), all.middleRows(query_features, others), all.bottomRows(others)};
  }
};

}  // namespace detail

/// y = W_o · concat_h( V_h · softmax(K_hᵀ Q_h / √d) ),  [Q; K; V] = W_qkv x, d = head_dim
///
/// Attention whose queries, keys and values come from one frozen weight, in this order of its rows, as the c_attn of GPT-2 keeps them: one
/// product instead of three. With grouped heads there are fewer rows of keys and of values than of queries. Its verbs are those of
/// SelfAttention (layers/attention/self_attention.hpp).
///
///     using Merged = Linear<float, Stacked<LowRank<float>>>;                                          // an adapter each for q, k and v
///     Merged qkv(W_qkv, {.adapters = {{.max_rank = 8}, {.max_rank = 0}, {.max_rank = 8}}}, rng);      // k has none
///     MergedAttention<float, Merged> attention(qkv, Linear<float>(W_o, {.max_rank = 8}, rng), {.heads = 12});
///
/// With such a projection y, and the gradients of what is trained, are bit for bit those of an Attention whose q, k and v are the slices;
/// dx is the same sum in another order. A plain Linear<float> has one adapter for all rows, as PEFT puts it on c_attn.
template <std::floating_point S, Projection Merged = Linear<S>, Projection Output = Linear<S>>
struct MergedAttention : SelfAttention<S, detail::MergedProjection<S, Merged>, Output> {
  using Base = SelfAttention<S, detail::MergedProjection<S, Merged>, Output>;
  using Base::qkv, Base::o, Base::options;

  /// Throws ShapeError if the projections do not fit each other, std::invalid_argument if the heads do not divide the in_features of o,
  /// which are those of a query.
  MergedAttention(Merged qkv_, Output o_, AttentionOptions options_)
      : Base{{std::move(qkv_), o_.in_features()}, {}, std::move(o_), options_} {
    Base::divide(o.in_features());
    require_equal(qkv.out_features(), this->head_dim() * (options.heads + 2 * options.key_value_heads),
                  "MergedAttention: out_features of qkv");
  }

  /// The attention with both projections merged with their adapters at `rank`; this one stays as it is.
  auto merged(RankSlice rank) const
    requires requires(const Merged& a, const Output& b) { a.merged(rank), b.merged(rank); }
  {
    require_ranks(rank, this->in_features(), this->max_rank(), "MergedAttention::merged");
    using Frozen = FrozenLinear<S>;
    const auto frozen = [&](const auto& part) { return Frozen(part.merged(rank.at_most(part.max_rank()))); };
    return MergedAttention<S, Frozen, Frozen>(frozen(qkv), frozen(o), options);
  }
};

}  // namespace dylora

#endif
