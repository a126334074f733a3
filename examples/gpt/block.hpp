#ifndef DYLORA_EXAMPLES_GPT_BLOCK_HPP
#define DYLORA_EXAMPLES_GPT_BLOCK_HPP

#include <dylora/dylora.hpp>
#include <dylora/methods/reslora/link.hpp>

#include "gpt/gelu.hpp"
#include "gpt/layer_norm.hpp"

namespace gpt {

/// Whether a projection trains the pretrained weights themselves; layer norms and embeddings then learn too.
template <class Projection>
inline constexpr bool trains_base = requires { requires Projection::trains_base; };

/// x ← x + attention(norm₁(x));   x ← x + W_proj gelu(W_fc norm₂(x))
template <std::floating_point S, dylora::Projection Linear, class SelfAttention = dylora::Attention<S, Linear>>
struct Block {
  using Attention = SelfAttention;

  struct Gradients {
    typename LayerNorm<S>::Gradients attention_norm, mlp_norm;
    typename Attention::Gradients attention;
    typename Linear::Gradients fc, proj;
  };

  struct Cache {
    typename LayerNorm<S>::Cache attention_norm, mlp_norm;
    typename Attention::Cache attention;
    dylora::Buffer<S> mlp_input, u;
    typename Linear::Cache fc, proj;
  };

  /// Buffers that all blocks take turns with.
  struct Buffers {
    dylora::Buffer<S> branch, a, slope, hidden;
  };

  /// What the backward of the parts writes on the way: all blocks take turns with it too, but for projections that are linked.
  struct Workspace {
    typename Attention::Workspace attention;
    typename Linear::Workspace fc, proj;
  };

  LayerNorm<S> attention_norm, mlp_norm;
  Attention attention;
  Linear fc, proj;

  /// x (width × tokens) is updated in place.
  void forward(dylora::MatrixRef<S> x, const dylora::Sequences& sequences, const dylora::BatchRanks& ranks, Cache& cache,
               Buffers& buffers) const {
    auto branch = buffers.branch.resize(x.rows(), x.cols());
    auto norm = cache.mlp_input.resize(x.rows(), x.cols());
    attention_norm.forward(x, cache.attention_norm, norm);
    attention.forward(norm, sequences, ranks, cache.attention, branch);
    add_columns<S>(x, branch);

    mlp_norm.forward(x, cache.mlp_norm, norm);
    auto u = cache.u.resize(fc.out_features(), x.cols()), a = buffers.a.resize(fc.out_features(), x.cols());
    fc.apply(norm, ranks, cache.fc, u);
    gelu<S>(u, a);
    proj.apply(a, ranks, cache.proj, branch);
    add_columns<S>(x, branch);
  }

  /// dx holds the gradient of the block's output and becomes that of its input.
  void backward(dylora::MatrixRef<S> dx, const Cache& cache, Gradients& gradients, Buffers& buffers, Workspace& workspace) const {
    const Index width = fc.out_features(), n = dx.cols();
    auto branch = buffers.branch.resize(dx.rows(), n);
    auto a = buffers.a.resize(width, n), slope = buffers.slope.resize(width, n), hidden = buffers.hidden.resize(width, n);
    gelu_and_slope<S>(cache.u.view(), a, slope);  // dearer to keep a for each block than to compute it again with the slope
    proj.set_backward(a, dx, cache.proj, gradients.proj, workspace.proj, hidden);
    for_each_column(width, n, [&](Index i) { hidden.col(i).array() *= slope.col(i).array(); });
    fc.set_backward(cache.mlp_input.view(), hidden, cache.fc, gradients.fc, workspace.fc, branch);
    norm_backward(mlp_norm, branch, cache.mlp_norm, gradients.mlp_norm, dx);

    attention.backward(dx, cache.attention, gradients.attention, workspace.attention, branch);
    norm_backward(attention_norm, branch, cache.attention_norm, gradients.attention_norm, dx);
  }

  /// The block's output for the next tokens of one sequence; x is updated in place.
  void extend(dylora::MatrixRef<S> x, dylora::RankSlice rank, dylora::KeyValueCache<S>& past) const {
    Cache fresh;
    dylora::MatrixX<S> norm(x.rows(), x.cols()), hidden(fc.out_features(), x.cols()), branch(x.rows(), x.cols());
    attention_norm.forward(x, fresh.attention_norm, norm);
    x += attention.extend(norm, rank, past);
    mlp_norm.forward(x, fresh.mlp_norm, norm);
    fc.apply(norm, rank, fresh.fc, hidden);
    gelu<S>(hidden, hidden);
    proj.apply(hidden, rank, fresh.proj, branch);
    x += branch;
  }

  static void members(const auto& f, auto&... t) {
    if constexpr (trains_base<Linear>) {
      f(dylora::Child<LayerNorm<S>>{"ln_1"}, t.attention_norm...);
      f(dylora::Child<LayerNorm<S>>{"ln_2"}, t.mlp_norm...);
    }
    f(dylora::Child<Attention>{"attn"}, t.attention...);
    f(dylora::Child<Linear>{"mlp.c_fc"}, t.fc...);
    f(dylora::Child<Linear>{"mlp.c_proj"}, t.proj...);
  }

 private:
  static void norm_backward(const LayerNorm<S>& norm, dylora::ConstMatrixRef<S> dy, const typename LayerNorm<S>::Cache& cache,
                            typename LayerNorm<S>::Gradients& gradients, dylora::MatrixRef<S> dx) {
    norm.add_backward(dy, cache, dx);
    if constexpr (trains_base<Linear>) norm.add_gradients(dy, cache, gradients);
  }
};

/// Calls f(part) for what belongs to each projection in the cache or the workspace of a block.
template <class Parts, class F>
void for_each_projection(Parts& parts, F&& f) {
  f(parts.attention.q);
  f(parts.attention.k);
  f(parts.attention.v);
  f(parts.attention.o);
  f(parts.fc);
  f(parts.proj);
}

/// The type of a model's blocks: this one, unless a kind of projection needs another.
template <std::floating_point S, class Linear, class Attention>
struct BlockOf {
  using Type = Block<S, Linear, Attention>;
};

namespace detail {

/// Calls f(member) for each kind of projection, where member(part) is it in a block or in what belongs to one.
template <class Parts, class F>
void for_each_kind(const Parts& parts, F&& f) {
  f([](auto& part) -> auto& { return part.fc; });
  f([](auto& part) -> auto& { return part.proj; });
  if constexpr (requires { parts.front().attention.q; }) {
    f([](auto& part) -> auto& { return part.attention.q; });
    f([](auto& part) -> auto& { return part.attention.k; });
    f([](auto& part) -> auto& { return part.attention.v; });
    f([](auto& part) -> auto& { return part.attention.o; });
  }
}

}  // namespace detail

/// Where projections reach back to the same ones of earlier blocks (ResLoRA): says where these are, to the caches of `blocks` before a
/// forward, and to the workspaces of their gradients before a backward.
template <class Blocks, class Parts>
void link_projections(Blocks& blocks, Parts& parts) {
  detail::for_each_kind(blocks, [&](auto member) { dylora::link_chain(blocks, parts, member); });
}

}  // namespace gpt

#endif
