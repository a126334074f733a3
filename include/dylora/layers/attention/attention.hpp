#ifndef DYLORA_LAYERS_ATTENTION_ATTENTION_HPP
#define DYLORA_LAYERS_ATTENTION_ATTENTION_HPP

#include <algorithm>
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

/// Q, K and V by a projection each.
template <std::floating_point S, Projection Query, Projection Key, Projection Value>
struct SeparateProjections {
  struct Workspace {
    Buffer<S> dQ, dK, dV;
    typename Query::Workspace q;
    typename Key::Workspace k;
    typename Value::Workspace v;
  };

  struct Gradients {
    typename Query::Gradients q;
    typename Key::Gradients k;
    typename Value::Gradients v;
  };

  struct Cache {
    Buffer<S> Q, K, V;
    typename Query::Cache q;
    typename Key::Cache k;
    typename Value::Cache v;
  };

  Query q;
  Key k;
  Value v;

  static constexpr bool needs_linked_cache = !(SelfContained<Query> && SelfContained<Key> && SelfContained<Value>);

  Index in_features() const { return q.in_features(); }

  static void members(const auto& f, auto&... t) {
    f(Child<Query>{"q_proj"}, t.q...);
    f(Child<Key>{"k_proj"}, t.k...);
    f(Child<Value>{"v_proj"}, t.v...);
  }

 protected:
  Index largest_rank() const { return std::max({q.max_rank(), k.max_rank(), v.max_rank()}); }

  void project(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const {
    q.apply(x, ranks, cache.q, cache.Q.resize(q.out_features(), x.cols()));
    k.apply(x, ranks, cache.k, cache.K.resize(k.out_features(), x.cols()));
    v.apply(x, ranks, cache.v, cache.V.resize(v.out_features(), x.cols()));
  }

  QueriesKeysValues<ConstMatrixRef<S>> inputs(const Cache& cache) const { return {cache.Q.view(), cache.K.view(), cache.V.view()}; }

  void check_inputs(const Cache& cache) const {
    require_equal(cache.Q.rows(), q.out_features(), "Attention::backward: rows of the cached queries");
    require_equal(cache.K.rows(), k.out_features(), "Attention::backward: rows of the cached keys");
    require_equal(cache.V.rows(), v.out_features(), "Attention::backward: rows of the cached values");
  }

  void check_projections(ConstMatrixRef<S> x, const Cache& cache, const Gradients& gradients, const Workspace& workspace) const {
    q.check_backward(x, of_shape<S>(q.out_features(), x.cols()), cache.q, gradients.q, workspace.q);
    k.check_backward(x, of_shape<S>(k.out_features(), x.cols()), cache.k, gradients.k, workspace.k);
    v.check_backward(x, of_shape<S>(v.out_features(), x.cols()), cache.v, gradients.v, workspace.v);
  }

  QueriesKeysValues<MatrixRef<S>> input_gradients(Workspace& workspace, Index tokens) const {
    return {workspace.dQ.resize(q.out_features(), tokens), workspace.dK.resize(k.out_features(), tokens),
            workspace.dV.resize(v.out_features(), tokens)};
  }

  void project_backward(ConstMatrixRef<S> x, const Cache& cache, Gradients& gradients, Workspace& workspace, MatrixRef<S> dx) const {
    q.set_backward(x, workspace.dQ.view(), cache.q, gradients.q, workspace.q, dx);
    k.add_backward(x, workspace.dK.view(), cache.k, gradients.k, workspace.k, dx);
    v.add_backward(x, workspace.dV.view(), cache.v, gradients.v, workspace.v, dx);
  }
  void project_gradients(ConstMatrixRef<S> x, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    q.add_gradients(x, workspace.dQ.view(), cache.q, gradients.q, workspace.q);
    k.add_gradients(x, workspace.dK.view(), cache.k, gradients.k, workspace.k);
    v.add_gradients(x, workspace.dV.view(), cache.v, gradients.v, workspace.v);
  }
};

}  // namespace detail

/// y = W_o · concat_h( V_h · softmax(K_hᵀ Q_h / √d) ),  Q = W_q x, K = W_k x, V = W_v x, d = head_dim
///
/// Multi-head self-attention over a batch of sequences laid end to end, its four projections adapted or frozen, each as its type says. Its
/// verbs are those of SelfAttention (layers/attention/self_attention.hpp).
///
///     Linear<float> q(Wq, {.max_rank = 8}, rng), k(Wk, {.max_rank = 8}, rng), v(Wv, {.max_rank = 8}, rng), o(Wo, {.max_rank = 8}, rng);
///     Attention<float> attention(q, k, v, o, {.heads = 4});
///     const MatrixX<float> y = attention.forward(x, Sequences({17, 5, 42}), 4, cache);     // without Sequences, x is one sequence
///     const MatrixX<float> dx = attention.backward(dy, cache, gradients);
template <std::floating_point S, Projection Query = Linear<S>, Projection Key = Query, Projection Value = Query, Projection Output = Query>
struct Attention : SelfAttention<S, detail::SeparateProjections<S, Query, Key, Value>, Output> {
  using Base = SelfAttention<S, detail::SeparateProjections<S, Query, Key, Value>, Output>;
  using Base::q, Base::k, Base::v, Base::o, Base::options;

  /// Throws ShapeError if the projections do not fit each other, std::invalid_argument if the heads do not divide their features.
  Attention(Query q_, Key k_, Value v_, Output o_, AttentionOptions options_)
      : Base{{std::move(q_), std::move(k_), std::move(v_)}, {}, std::move(o_), options_} {
    Base::divide(q.out_features());
    require_equal(o.in_features(), q.out_features(), "Attention: in_features of o");
    require_equal(k.in_features(), q.in_features(), "Attention: in_features of k");
    require_equal(v.in_features(), q.in_features(), "Attention: in_features of v");
    require_equal(k.out_features(), this->head_dim() * options.key_value_heads, "Attention: out_features of k");
    require_equal(v.out_features(), this->head_dim() * options.key_value_heads, "Attention: out_features of v");
  }

  /// The attention with every projection merged at `rank`; this one stays as it is.
  auto merged(RankSlice rank) const
    requires requires(const Query& a, const Key& b, const Value& c, const Output& d) {
      a.merged(rank), b.merged(rank), c.merged(rank), d.merged(rank);
    }
  {
    require_ranks(rank, this->in_features(), this->max_rank(), "Attention::merged");
    using Merged = FrozenLinear<S>;
    const auto frozen = [&](const auto& part) { return Merged(part.merged(rank.at_most(part.max_rank()))); };
    return Attention<S, Merged>(frozen(q), frozen(k), frozen(v), frozen(o), options);
  }
};

}  // namespace dylora

#endif
