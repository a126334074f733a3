#ifndef DYLORA_LAYERS_ATTENTION_SELF_ATTENTION_HPP
#define DYLORA_LAYERS_ATTENTION_SELF_ATTENTION_HPP

#include <algorithm>
#include <concepts>
#include <stdexcept>
#include <string>

#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/sequences.hpp"
#include "dylora/core/types.hpp"
#include "dylora/layers/attention/heads.hpp"
#include "dylora/layers/attention/key_value_cache.hpp"
#include "dylora/layers/layer.hpp"
#include "dylora/linalg/buffer.hpp"

namespace dylora {

struct AttentionOptions {
  Index heads = 1;
  Index key_value_heads = 0;  ///< 0 means as many as heads; fewer, a divisor of heads, makes groups of heads share keys and values
  bool causal = true;         ///< a token sees itself and those before it in its sequence, or all of its sequence
};

/// y = W_o · concat_h( V_h · softmax(K_hᵀ Q_h / √d) ), d = head_dim: what Attention and MergedAttention share, and how they are called.
///
/// Multi-head self-attention (arXiv 1706.03762) with grouped key/value heads (arXiv 2305.13245) over a batch of sequences laid end to end.
/// Its base `Projections` holds the projections that make Q, K and V from x, by functions that are open to this type alone:
///
///     largest_rank()                                      of its projections
///     project(x, ranks, cache)                            Q, K and V into the cache
///     inputs(cache), input_gradients(workspace, tokens)   where they are, and room for dQ, dK and dV
///     check_inputs(cache)                                 refuses those that projections of other shapes have made
///     check_projections(x, cache, gradients, workspace)   refuses what project_backward would refuse
///     needs_linked_cache                                  whether a cache or workspace of theirs needs something from the caller
///     project_backward(x, cache, gradients, workspace, dx), and project_gradients without dx
///
/// Scores live in tiles of 64 × 64, never whole: memory grows with the number of tokens, not with its square, and the backward recomputes
/// them. Work is split over sequences and heads. Const both ways and safe to share, as Linear.
template <std::floating_point S, class Projections, Projection Output>
struct SelfAttention : Projections, BackwardWithoutWorkspace<SelfAttention<S, Projections, Output>, S> {
  using Scalar = S;

  /// What backward writes on the way. A model needs one for all its layers, which take turns with it, unless their projections are linked.
  struct Workspace : Projections::Workspace {
    Buffer<S> d_context, dot;
    typename Output::Workspace o;
  };

  struct Gradients : Projections::Gradients {
    typename Output::Gradients o;
  };

  /// Filled by one forward, read by any number of backward. x is kept once for all projections.
  struct Cache : Projections::Cache {
    Sequences sequences;
    Buffer<S> x, context;
    Buffer<S> logsumexp;  // tokens × heads
    typename Output::Cache o;
  };

  Output o;
  AttentionOptions options;

  static constexpr bool needs_linked_cache = Projections::needs_linked_cache || !SelfContained<Output>;

  using Projections::in_features;
  Index out_features() const { return o.out_features(); }
  Index max_rank() const { return std::max(Projections::largest_rank(), o.max_rank()); }
  Index head_dim() const { return o.in_features() / options.heads; }

  /// x in × tokens, its columns divided by `sequences`; returns out × tokens; the cache is overwritten.
  /// Throws ShapeError if x and the sequences disagree, std::invalid_argument for the rank.
  /// Costs the projections and 4·head_dim·heads flops per query and visible key.
  MatrixX<S> forward(ConstMatrixRef<S> x, const Sequences& sequences, const BatchRanks& ranks, Cache& cache) const {
    MatrixX<S> y(out_features(), x.cols());
    forward(x, sequences, ranks, cache, y);
    return y;
  }

  /// The same into the caller's y (out × tokens, overwritten); allocates only when the cache grows.
  void forward(ConstMatrixRef<S> x, const Sequences& sequences, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.x.resize(in_features(), 0);  // if this call throws, the cache counts as not filled
    require_samples(x.cols(), "Attention::forward: x");
    require_equal(x.cols(), sequences.tokens(), "Attention::forward: tokens in x, against the sequences");
    require_ranks(ranks, x.cols(), max_rank(), "Attention::forward");
    Projections::project(x, ranks, cache);
    cache.sequences = sequences;
    const auto inputs = Projections::inputs(cache);
    auto context = cache.context.resize(o.in_features(), x.cols());
    split().forward(sequences, inputs.Q, inputs.K, inputs.V, context, cache.logsumexp.resize(x.cols(), options.heads));
    o.apply(context, ranks, cache.o, y);
    cache.x.assign(x);
  }

  MatrixX<S> forward(ConstMatrixRef<S> x, const Sequences& sequences, const BatchRanks& ranks) const
    requires(!needs_linked_cache)
  {
    Cache scratch;
    return forward(x, sequences, ranks, scratch);
  }

  /// x as one sequence.
  MatrixX<S> forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const { return forward(x, one_sequence(x), ranks, cache); }
  void forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    forward(x, one_sequence(x), ranks, cache, y);
  }
  MatrixX<S> forward(ConstMatrixRef<S> x, const BatchRanks& ranks) const
    requires(!needs_linked_cache)
  {
    return forward(x, one_sequence(x), ranks);
  }

  using BackwardWithoutWorkspace<SelfAttention, S>::backward;

  /// The vector-Jacobian product of the cached forward: gradients are added to, dx (in × tokens) is overwritten.
  /// Throws ShapeError, with nothing added, if dy does not fit or the cache was not filled.
  /// Costs the projections' backward and 10·head_dim·heads flops per query and visible key. Allocates only when the workspace grows.
  void backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace, MatrixRef<S> dx) const {
    require_samples(dy.cols(), "Attention::backward: dy");
    require_equal(dx.rows(), in_features(), "Attention::backward: rows of dx");
    require_equal(dx.cols(), dy.cols(), "Attention::backward: samples in dx");
    back_to_projections(dy, cache, gradients, workspace);
    Projections::project_backward(cache.x.view(), cache, gradients, workspace, dx);
  }

  /// The same without dx, for the lowest layer that learns: the gradients have the same bits.
  void backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace, NoInputGradient) const {
    back_to_projections(dy, cache, gradients, workspace);
    Projections::project_gradients(cache.x.view(), cache, gradients, workspace);
  }

  /// Throws what a backward would throw for these arguments, and touches nothing.
  void check_backward(ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients, const Workspace& workspace) const {
    require_samples(dy.cols(), "Attention::backward: dy");
    require_equal(dy.cols(), cache.x.cols(), "Attention::backward: tokens in dy, against the cache (was it filled by forward?)");
    require_equal(dy.rows(), out_features(), "Attention::backward: rows of dy");
    check_cache(cache);
    require_shapes(*this, "Attention::backward: gradient of", gradients);
    o.check_backward(cache.context.view(), dy, cache.o, gradients.o, workspace.o);
    Projections::check_projections(cache.x.view(), cache, gradients, workspace);
  }

  /// Generation: the outputs for the next tokens of one sequence, whose earlier keys and values are in `past`; theirs are appended.
  ///
  /// x in × n, the n ≥ 1 tokens that follow; the rank may change from call to call. Equal bit for bit to the last n columns of one
  /// forward over the whole sequence at the same rank. Throws std::invalid_argument if the attention is not causal or for the rank,
  /// ShapeError if x or `past` do not fit; `past` is then as it was.
  MatrixX<S> extend(ConstMatrixRef<S> x, RankSlice rank, KeyValueCache<S>& past) const
    requires(!needs_linked_cache)
  {
    if (!options.causal)
      throw std::invalid_argument("Attention::extend: expected a causal attention; without it every token sees the future");
    require_samples(x.cols(), "Attention::extend: x");
    require_ranks(rank, x.cols(), max_rank(), "Attention::extend");
    Cache fresh;
    Projections::project(x, rank, fresh);
    const auto inputs = Projections::inputs(fresh);
    past.append(inputs.K, inputs.V);
    auto context = fresh.context.resize(o.in_features(), x.cols());
    split().forward_last(inputs.Q, past.keys(), past.values(), context, fresh.logsumexp.resize(x.cols(), options.heads));
    MatrixX<S> y(out_features(), x.cols());
    o.apply(context, rank, fresh.o, y);
    return y;
  }

  static void members(const auto& f, auto&... t) {
    Projections::members(f, t...);
    f(Child<Output>{"o_proj"}, t.o...);
  }

 protected:
  /// Spells out the options. Throws std::invalid_argument if the heads do not divide the features of the queries.
  void divide(Index features) {
    require_in_range(options.heads, 1, features, "Attention: heads");
    if (options.key_value_heads == 0) options.key_value_heads = options.heads;
    require_in_range(options.key_value_heads, 1, options.heads, "Attention: key_value_heads");
    if (features % options.heads != 0 || options.heads % options.key_value_heads != 0) {
      throw std::invalid_argument("Attention: expected heads to divide the queries' " + std::to_string(features) +
                                  " features and key_value_heads to divide heads, got heads " + std::to_string(options.heads) +
                                  " and key_value_heads " + std::to_string(options.key_value_heads));
    }
  }

 private:
  static Sequences one_sequence(const ConstMatrixRef<S>& x) {
    require_samples(x.cols(), "Attention::forward: x");
    return Sequences::equal(1, x.cols());
  }

  /// The gradients of o, and dQ, dK and dV into the workspace. All parts are asked before the first of them adds anything.
  void back_to_projections(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    check_backward(dy, cache, gradients, workspace);
    auto d_context = workspace.d_context.resize(o.in_features(), dy.cols());
    o.set_backward(cache.context.view(), dy, cache.o, gradients.o, workspace.o, d_context);
    const auto inputs = Projections::inputs(cache);
    const auto d = Projections::input_gradients(workspace, dy.cols());
    split().backward(cache.sequences, inputs.Q, inputs.K, inputs.V, cache.context.view(), cache.logsumexp.view(), d_context,
                     workspace.dot.resize(dy.cols(), options.heads), d.Q, d.K, d.V);
  }

  /// Refuses a cache that an attention of other shapes filled.
  void check_cache(const Cache& cache) const {
    const Index tokens = cache.sequences.tokens();
    require_equal(cache.x.cols(), tokens, "Attention::backward: tokens in the cache, against its sequences");
    require_equal(cache.x.rows(), in_features(), "Attention::backward: rows of the cached x");
    Projections::check_inputs(cache);
    require_equal(cache.logsumexp.cols(), options.heads, "Attention::backward: heads in the cache");
  }

  detail::AttentionHeads<S> split() const { return {options.heads, options.key_value_heads, head_dim(), options.causal}; }
};

}  // namespace dylora

#endif
