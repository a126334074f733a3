#ifndef DYLORA_LAYERS_ATTENTION_HPP
#define DYLORA_LAYERS_ATTENTION_HPP

#include <algorithm>
#include <concepts>
#include <string>
#include <utility>

#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/buffer.hpp"
#include "dylora/core/concepts.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/sequences.hpp"
#include "dylora/layers/attention_heads.hpp"
#include "dylora/layers/key_value_cache.hpp"
#include "dylora/layers/linear.hpp"

namespace dylora {

struct AttentionOptions {
  Index heads = 1;
  Index key_value_heads = 0;  ///< 0 means as many as heads; fewer, a divisor of heads, makes groups of heads share keys and values
  bool causal = true;         ///< a token sees itself and those before it in its sequence, or all of its sequence
};

/// y = W_o · concat_h( V_h · softmax(K_hᵀ Q_h / √d) ),  Q = W_q x, K = W_k x, V = W_v x, d = head_dim
///
/// Multi-head self-attention (arXiv 1706.03762) with grouped key/value heads (arXiv 2305.13245) over a batch of sequences laid end to end,
/// its four projections adapted or frozen, each as its type says.
///
///     Linear<float> q(Wq, {.max_rank = 8}, rng), k(Wk, {.max_rank = 8}, rng), v(Wv, {.max_rank = 8}, rng), o(Wo, {.max_rank = 8}, rng);
///     Attention<float> attention(q, k, v, o, {.heads = 4});
///     const Matrix<float> y = attention.forward(x, Sequences({17, 5, 42}), 4, cache);     // without Sequences, x is one sequence
///     const Matrix<float> dx = attention.backward(dy, cache, gradients);
///
/// Scores live in tiles of 64 × 64, never whole: memory grows with the number of tokens, not with its square, and the backward recomputes
/// them. Work is split over sequences and heads. Const both ways and safe to share, as Linear.
template <std::floating_point S, Projection Query = Linear<S>, Projection Key = Query, Projection Value = Query, Projection Output = Query>
struct Attention {
  using Scalar = S;

  /// What backward writes on the way; layers that take turns may share one.
  struct Workspace {
    Buffer<S> dQ, dK, dV, d_context, dot;
  };

  struct Gradients {
    typename Query::Gradients q;
    typename Key::Gradients k;
    typename Value::Gradients v;
    typename Output::Gradients o;
    Workspace workspace;  // for those who bring none
  };

  /// Filled by one forward, read by any number of backward. x is kept once for q, k and v.
  struct Cache {
    Sequences sequences;
    Buffer<S> x, Q, K, V, context;
    Buffer<S> logsumexp;  // tokens × heads
    typename Query::ProjectionCache q;
    typename Key::ProjectionCache k;
    typename Value::ProjectionCache v;
    typename Output::ProjectionCache o;
  };

  Query q;
  Key k;
  Value v;
  Output o;
  AttentionOptions options;

  /// Throws ShapeError if the projections do not fit each other, std::invalid_argument if the heads do not divide their features.
  Attention(Query q_, Key k_, Value v_, Output o_, AttentionOptions options_)
      : q(std::move(q_)), k(std::move(k_)), v(std::move(v_)), o(std::move(o_)), options(options_) {
    require_in_range(options.heads, 1, q.out_features(), "Attention: heads");
    if (options.key_value_heads == 0) options.key_value_heads = options.heads;
    require_in_range(options.key_value_heads, 1, options.heads, "Attention: key_value_heads");
    if (q.out_features() % options.heads != 0 || options.heads % options.key_value_heads != 0) {
      throw std::invalid_argument("Attention: expected heads to divide q's " + std::to_string(q.out_features()) +
                                  " features and key_value_heads to divide heads, got heads " + std::to_string(options.heads) +
                                  " and key_value_heads " + std::to_string(options.key_value_heads));
    }
    require_equal(k.in_features(), q.in_features(), "Attention: in_features of k");
    require_equal(v.in_features(), q.in_features(), "Attention: in_features of v");
    require_equal(k.out_features(), head_dim() * options.key_value_heads, "Attention: out_features of k");
    require_equal(v.out_features(), head_dim() * options.key_value_heads, "Attention: out_features of v");
    require_equal(o.in_features(), q.out_features(), "Attention: in_features of o");
  }

  Index in_features() const { return q.in_features(); }
  Index out_features() const { return o.out_features(); }
  Index max_rank() const { return std::max({q.max_rank(), k.max_rank(), v.max_rank(), o.max_rank()}); }
  Index head_dim() const { return q.out_features() / options.heads; }

  /// x in × tokens, its columns divided by `sequences`; returns out × tokens; the cache is overwritten.
  /// Throws ShapeError if x and the sequences disagree, std::invalid_argument for the rank.
  /// Costs the four projections and 4·head_dim·heads flops per query and visible key.
  Matrix<S> forward(ConstMatrixRef<S> x, const Sequences& sequences, const BatchRanks& ranks, Cache& cache) const {
    Matrix<S> y(out_features(), x.cols());
    forward(x, sequences, ranks, cache, y);
    return y;
  }

  /// The same into the caller's y (out × tokens, overwritten); allocates only when the cache grows.
  void forward(ConstMatrixRef<S> x, const Sequences& sequences, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.x.resize(in_features(), 0);  // if this call throws, the cache counts as not filled
    require_samples(x.cols(), "Attention::forward: x");
    require_equal(x.cols(), sequences.tokens(), "Attention::forward: tokens in x, against the sequences");
    require_ranks(ranks, x.cols(), max_rank(), "Attention::forward");
    q.apply(x, ranks, cache.q, cache.Q.resize(q.out_features(), x.cols()));
    k.apply(x, ranks, cache.k, cache.K.resize(k.out_features(), x.cols()));
    v.apply(x, ranks, cache.v, cache.V.resize(v.out_features(), x.cols()));
    cache.sequences = sequences;
    auto context = cache.context.resize(q.out_features(), x.cols());
    split().forward(sequences, cache.Q.view(), cache.K.view(), cache.V.view(), context, cache.logsumexp.resize(x.cols(), options.heads));
    o.apply(context, ranks, cache.o, y);
    cache.x.assign(x);
  }

  Matrix<S> forward(ConstMatrixRef<S> x, const Sequences& sequences, const BatchRanks& ranks) const {
    Cache scratch;
    return forward(x, sequences, ranks, scratch);
  }

  /// x as one sequence.
  Matrix<S> forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const { return forward(x, one_sequence(x), ranks, cache); }
  void forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    forward(x, one_sequence(x), ranks, cache, y);
  }
  Matrix<S> forward(ConstMatrixRef<S> x, const BatchRanks& ranks) const { return forward(x, one_sequence(x), ranks); }

  /// The vector-Jacobian product of the cached forward: gradients are added to; returns dx, in × tokens.
  /// Throws ShapeError if dy does not fit or the cache was not filled.
  /// Costs the projections' backward and 10·head_dim·heads flops per query and visible key.
  Matrix<S> backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients) const {
    Matrix<S> dx(in_features(), dy.cols());
    backward(dy, cache, gradients, dx);
    return dx;
  }

  /// The same into the caller's dx (in × tokens, overwritten); allocates only when the workspace grows.
  void backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, MatrixRef<S> dx) const {
    backward(dy, cache, gradients, gradients.workspace, dx);
  }

  /// The same in the caller's workspace, of which a model needs one for all its layers.
  void backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace, MatrixRef<S> dx) const {
    require_samples(dy.cols(), "Attention::backward: dy");
    require_equal(dy.cols(), cache.x.cols(), "Attention::backward: tokens in dy, against the cache (was it filled by forward?)");
    require_equal(dx.rows(), in_features(), "Attention::backward: rows of dx");
    require_equal(dx.cols(), dy.cols(), "Attention::backward: samples in dx");
    require_equal(dy.rows(), out_features(), "Attention::backward: rows of dy");
    check_cache(cache);
    require_shapes(*this, "Attention::backward: gradient of", gradients);
    auto d_context = workspace.d_context.resize(o.in_features(), dy.cols());
    o.set_backward(cache.context.view(), dy, cache.o, gradients.o, d_context);
    auto dQ = workspace.dQ.resize(q.out_features(), dy.cols()), dK = workspace.dK.resize(k.out_features(), dy.cols());
    auto dV = workspace.dV.resize(v.out_features(), dy.cols());
    split().backward(cache.sequences, cache.Q.view(), cache.K.view(), cache.V.view(), cache.context.view(), cache.logsumexp.view(),
                     d_context, workspace.dot.resize(dy.cols(), options.heads), dQ, dK, dV);
    q.set_backward(cache.x.view(), dQ, cache.q, gradients.q, dx);
    k.add_backward(cache.x.view(), dK, cache.k, gradients.k, dx);
    v.add_backward(cache.x.view(), dV, cache.v, gradients.v, dx);
  }

  /// Generation: the outputs for the next tokens of one sequence, whose earlier keys and values are in `past`; theirs are appended.
  ///
  /// x in × n, the n ≥ 1 tokens that follow; the rank may change from call to call. Equal bit for bit to the last n columns of one
  /// forward over the whole sequence at the same rank. Throws std::invalid_argument if the attention is not causal or for the rank,
  /// ShapeError if x or `past` do not fit; `past` is then as it was.
  Matrix<S> extend(ConstMatrixRef<S> x, RankSlice rank, KeyValueCache<S>& past) const {
    if (!options.causal)
      throw std::invalid_argument("Attention::extend: expected a causal attention; without it every token sees the future");
    require_samples(x.cols(), "Attention::extend: x");
    require_ranks(rank, x.cols(), max_rank(), "Attention::extend");
    Cache fresh;
    q.apply(x, rank, fresh.q, fresh.Q.resize(q.out_features(), x.cols()));
    k.apply(x, rank, fresh.k, fresh.K.resize(k.out_features(), x.cols()));
    v.apply(x, rank, fresh.v, fresh.V.resize(v.out_features(), x.cols()));
    past.append(fresh.K.view(), fresh.V.view());
    auto context = fresh.context.resize(q.out_features(), x.cols());
    split().forward_last(fresh.Q.view(), past.keys(), past.values(), context, fresh.logsumexp.resize(x.cols(), options.heads));
    Matrix<S> y(out_features(), x.cols());
    o.apply(context, rank, fresh.o, y);
    return y;
  }

  /// The attention with every projection merged at `rank`; this one stays as it is.
  auto merged(RankSlice rank) const
    requires requires(const Query& a, const Key& b, const Value& c, const Output& d) {
      a.merged(rank), b.merged(rank), c.merged(rank), d.merged(rank);
    }
  {
    require_ranks(rank, in_features(), max_rank(), "Attention::merged");
    using Merged = FrozenLinear<S>;
    const auto frozen = [&](const auto& part) { return Merged(part.merged(rank.at_most(part.max_rank()))); };
    return Attention<S, Merged>(frozen(q), frozen(k), frozen(v), frozen(o), options);
  }

  template <class F, class... T>
  static void zip_parameters(F&& f, T&... t) {
    Query::zip_parameters(scoped("q_proj", f), t.q...);
    Key::zip_parameters(scoped("k_proj", f), t.k...);
    Value::zip_parameters(scoped("v_proj", f), t.v...);
    Output::zip_parameters(scoped("o_proj", f), t.o...);
  }

 private:
  static Sequences one_sequence(const ConstMatrixRef<S>& x) {
    require_samples(x.cols(), "Attention::forward: x");
    return Sequences::equal(1, x.cols());
  }

  /// Refuses a cache that an attention of other shapes filled.
  void check_cache(const Cache& cache) const {
    const Index tokens = cache.sequences.tokens();
    require_equal(cache.x.cols(), tokens, "Attention::backward: tokens in the cache, against its sequences");
    require_equal(cache.x.rows(), in_features(), "Attention::backward: rows of the cached x");
    require_equal(cache.Q.rows(), q.out_features(), "Attention::backward: rows of the cached queries");
    require_equal(cache.K.rows(), k.out_features(), "Attention::backward: rows of the cached keys");
    require_equal(cache.V.rows(), v.out_features(), "Attention::backward: rows of the cached values");
    require_equal(cache.logsumexp.cols(), options.heads, "Attention::backward: heads in the cache");
  }

  detail::AttentionHeads<S> split() const { return {options.heads, options.key_value_heads, head_dim(), options.causal}; }
};

}  // namespace dylora

#endif
