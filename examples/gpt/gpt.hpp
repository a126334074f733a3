#ifndef DYLORA_EXAMPLES_GPT_GPT_HPP
#define DYLORA_EXAMPLES_GPT_GPT_HPP

#include <algorithm>
#include <cmath>
#include <dylora/dylora.hpp>
#include <span>
#include <string>
#include <vector>

#include "gpt/block.hpp"
#include "gpt/dense_linear.hpp"
#include "gpt/embedding_parts.hpp"

namespace gpt {

struct Config {
  Index vocabulary = 256;
  Index context = 64;  ///< the longest sequence that has positions
  Index width = 128;
  Index layers = 3;
  Index heads = 4;
  bool tied = true;  ///< the head is the token embedding
};

/// A decoder with GPT-2's exact structure: learned positions, layer norm before each branch, causal attention, a GELU MLP four times as
/// wide, a final layer norm, and a head without bias, tied to the token embedding or not.
///
/// `Linear` is the type of its projections: dylora::Linear<S> to adapt a pretrained model (everything else stays frozen), DenseLinear<S> to
/// pretrain one (everything learns). `Attention` may be a dylora::MergedAttention, and `Embedding` a map of memory that lives elsewhere,
/// where a pretrained model has them so, or a dylora::Embedding, whose adapter the head then leaves out. Const both ways; activations are
/// in the caller's Cache.
template <std::floating_point S, dylora::Projection Linear = dylora::Linear<S>, class Attention = dylora::Attention<S, Linear>,
          class Embedding = dylora::MatrixX<S>>
struct Gpt {
  using Scalar = S;
  using Block = typename BlockOf<S, Linear, Attention>::Type;
  using Table = typename EmbeddingParts<Embedding>::Table;

  struct Gradients {
    typename EmbeddingParts<Embedding>::Gradients token_embedding;
    dylora::MatrixX<S> position_embedding, head;
    std::vector<typename Block::Gradients> blocks;
    typename LayerNorm<S>::Gradients final_norm;
  };

  struct Cache {
    std::vector<Index> tokens;
    dylora::Sequences sequences;
    typename EmbeddingParts<Embedding>::Cache token_embedding;
    std::vector<typename Block::Cache> blocks;
    typename LayerNorm<S>::Cache final_norm;
    dylora::Buffer<S> x, normed;
    dylora::Buffer<S> logits;  // vocabulary × tokens: the result of forward
    typename Block::Buffers buffers;
  };

  /// Of one backward at a time, so of one worker.
  struct Workspace {
    dylora::Buffer<S> dx, d_normed;
    typename EmbeddingParts<Embedding>::Workspace token_embedding;
    typename Block::Buffers buffers;
    std::vector<typename Block::Workspace> blocks;  // one that they take turns with, or where they are linked, one each
  };

  Config config;
  Embedding token_embedding;  // width × vocabulary
  Table position_embedding;   // width × context
  std::vector<Block> blocks;
  LayerNorm<S> final_norm;
  Table head;  // width × vocabulary, no elements if tied

  static constexpr bool extends = requires(const Block& block, dylora::MatrixX<S>& x, dylora::KeyValueCache<S>& past) {
    block.extend(x, dylora::RankSlice::none(), past);
  } && dylora::SelfContained<Linear>;

  /// The largest rank that forward accepts; 0 if nothing has an adapter.
  Index max_rank() const {
    Index largest = 0;
    if constexpr (adapts_embedding<Embedding>) largest = token_embedding.max_rank();
    for (const auto& block : blocks) {
      largest = std::max({largest, block.attention.max_rank(), block.fc.max_rank(), block.proj.max_rank()});
    }
    return largest;
  }

  /// cache.logits column i predicts the token after tokens[i].
  /// Throws std::invalid_argument for a token outside the vocabulary, ShapeError for a sequence longer than the context.
  void forward(std::span<const Index> tokens, const dylora::Sequences& sequences, const dylora::BatchRanks& ranks, Cache& cache) const {
    dylora::require_equal(static_cast<Index>(tokens.size()), sequences.tokens(), "Gpt::forward: number of tokens, against the sequences");
    cache.tokens.assign(tokens.begin(), tokens.end());
    cache.sequences = sequences;
    auto x = cache.x.resize(config.width, sequences.tokens());
    embed(tokens, ranks, cache.token_embedding, x);
    for (Index s = 0; s < sequences.count(); ++s) add_positions(0, x.middleCols(sequences.begin(s), sequences.length(s)));
    cache.blocks.resize(blocks.size());
    link_projections(blocks, cache.blocks);
    for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i].forward(x, sequences, ranks, cache.blocks[i], cache.buffers);
    auto normed = cache.normed.resize(config.width, sequences.tokens());
    final_norm.forward(x, cache.final_norm, normed);
    dylora::set_product(cache.logits.resize(config.vocabulary, sequences.tokens()), output_embedding().transpose(), normed);
  }

  /// From the gradient of the logits (vocabulary × tokens) to those of everything trained, added to `gradients`.
  void backward(dylora::ConstMatrixRef<S> d_logits, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    const Index n = cache.sequences.tokens();
    dylora::require_equal(d_logits.cols(), n, "Gpt::backward: tokens in d_logits, against the cache (was it filled by forward?)");
    auto d_normed = workspace.d_normed.resize(config.width, n), dx = workspace.dx.resize(config.width, n);
    dylora::set_product(d_normed, output_embedding(), d_logits);
    dx.setZero();
    final_norm.add_backward(d_normed, cache.final_norm, dx);
    constexpr bool shared = dylora::SelfContained<Linear>;
    workspace.blocks.resize(shared ? 1 : blocks.size());
    link_projections(gradients.blocks, workspace.blocks);
    for (std::size_t i = blocks.size(); i-- > 0;)
      blocks[i].backward(dx, cache.blocks[i], gradients.blocks[i], workspace.buffers, workspace.blocks[shared ? 0 : i]);
    if constexpr (adapts_embedding<Embedding>)
      token_embedding.backward(dx, cache.token_embedding, gradients.token_embedding, workspace.token_embedding);
    if constexpr (trains_base<Linear>) {
      final_norm.add_gradients(d_normed, cache.final_norm, gradients.final_norm);
      dylora::add_product(config.tied ? gradients.token_embedding : gradients.head, cache.normed.view(), d_logits.transpose());
      for (Index s = 0; s < cache.sequences.count(); ++s) {
        for (Index i = 0; i < cache.sequences.length(s); ++i) {
          const Index column = cache.sequences.begin(s) + i;
          gradients.token_embedding.col(cache.tokens[static_cast<std::size_t>(column)]) += dx.col(column);
          gradients.position_embedding.col(i) += dx.col(column);
        }
      }
    }
  }

  /// Generation: logits (vocabulary × n) for the next n tokens of one sequence, whose past keys and values are kept one cache per block.
  /// Not for blocks or projections that look further back than at these.
  dylora::MatrixX<S> extend(std::span<const Index> tokens, dylora::RankSlice rank, std::vector<dylora::KeyValueCache<S>>& past) const
    requires extends
  {
    past.resize(blocks.size());
    dylora::MatrixX<S> x(config.width, static_cast<Index>(tokens.size()));
    typename EmbeddingParts<Embedding>::Cache unused;
    embed(tokens, rank, unused, x);
    add_positions(past.empty() ? 0 : past.front().length(), x);
    for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i].extend(x, rank, past[i]);
    typename LayerNorm<S>::Cache scratch;
    dylora::MatrixX<S> normed(x.rows(), x.cols()), logits(config.vocabulary, x.cols());
    final_norm.forward(x, scratch, normed);
    dylora::set_product(logits, output_embedding().transpose(), normed);
    return logits;
  }

  /// The name of the first layer whose cached output holds a NaN or an infinity, or "" if none does.
  std::string first_non_finite(const Cache& cache) const {
    for (std::size_t i = 0; i < cache.blocks.size(); ++i) {
      const auto& block = cache.blocks[i];
      const std::string name = "h." + std::to_string(i);
      if (!block.attention.x.view().allFinite()) return name + ".ln_1";
      if constexpr (requires { block.attention.Q; }) {
        if (!block.attention.Q.view().allFinite()) return name + ".attn.q_proj";
        if (!block.attention.K.view().allFinite()) return name + ".attn.k_proj";
        if (!block.attention.V.view().allFinite()) return name + ".attn.v_proj";
      } else {
        if (!block.attention.QKV.view().allFinite()) return name + ".attn.c_attn";
      }
      if (!block.attention.context.view().allFinite()) return name + ".attn";
      if (!block.mlp_input.view().allFinite()) return name + ".attn.o_proj";
      if (!block.u.view().allFinite()) return name + ".mlp.c_fc";
    }
    if (!cache.normed.view().allFinite()) return "ln_f";
    return cache.logits.view().allFinite() ? "" : "lm_head";
  }

  static void members(const auto& f, auto&... t) {
    if constexpr (trains_base<Linear>) {
      f(dylora::Parameter{"wte.weight"}, t.token_embedding...);
      f(dylora::Parameter{"wpe.weight"}, t.position_embedding...);
    }
    if constexpr (adapts_embedding<Embedding>) f(dylora::Child<Embedding>{"wte"}, t.token_embedding...);
    f(dylora::Child<Block>{"h"}, t.blocks...);
    if constexpr (trains_base<Linear>) {
      f(dylora::Child<LayerNorm<S>>{"ln_f"}, t.final_norm...);
      f(dylora::Parameter{"lm_head.weight"}, t.head...);
    }
  }

 private:
  const Table& output_embedding() const {
    if (!config.tied) return head;
    if constexpr (adapts_embedding<Embedding>) {
      return token_embedding.base;
    } else {
      return token_embedding;
    }
  }

  void embed(std::span<const Index> tokens, const dylora::BatchRanks& ranks, typename EmbeddingParts<Embedding>::Cache& cache,
             dylora::MatrixRef<S> x) const {
    for (std::size_t i = 0; i < tokens.size(); ++i)
      dylora::require_in_range(tokens[i], 0, config.vocabulary - 1, "Gpt: token " + std::to_string(i));
    if constexpr (adapts_embedding<Embedding>) {
      token_embedding.forward(tokens, ranks.at_most(token_embedding.max_rank()), cache, x);
    } else {
      for (std::size_t i = 0; i < tokens.size(); ++i) x.col(static_cast<Index>(i)) = token_embedding.col(tokens[i]);
    }
  }

  /// x are the next tokens of one sequence that has `position` of them already.
  void add_positions(Index position, dylora::MatrixRef<S> x) const {
    if (position + x.cols() > config.context) {
      throw dylora::ShapeError("Gpt: length of the sequence: expected at most the context of " + std::to_string(config.context) +
                               " tokens, got " + std::to_string(position + x.cols()));
    }
    x += position_embedding.middleCols(position, x.cols());
  }
};

/// A model to pretrain: all matrices uniform with GPT-2's standard deviation of 0.02, the two projections back into the residual stream
/// smaller by √(2 · layers).
template <std::floating_point S>
Gpt<S, DenseLinear<S>> random_gpt(const Config& config, dylora::Rng& rng) {
  const double bound = 0.02 * std::sqrt(3.0), into_residual = bound / std::sqrt(2.0 * static_cast<double>(config.layers));
  const Index width = config.width;
  const auto linear = [&](Index out, Index in, double limit) {
    return DenseLinear<S>(dylora::random_uniform<S>(out, in, limit, rng), dylora::VectorX<S>::Zero(out));
  };
  Gpt<S, DenseLinear<S>> model{config, {}, {}, {}, LayerNorm<S>(width), {}};
  model.token_embedding = dylora::random_uniform<S>(width, config.vocabulary, bound, rng);
  model.position_embedding = dylora::random_uniform<S>(width, config.context, bound, rng);
  for (Index i = 0; i < config.layers; ++i) {
    auto q = linear(width, width, bound), k = linear(width, width, bound), v = linear(width, width, bound);
    auto o = linear(width, width, into_residual);
    auto fc = linear(4 * width, width, bound);
    auto proj = linear(width, 4 * width, into_residual);
    model.blocks.push_back({LayerNorm<S>(width),
                            LayerNorm<S>(width),
                            {std::move(q), std::move(k), std::move(v), std::move(o), {.heads = config.heads}},
                            std::move(fc),
                            std::move(proj)});
  }
  if (!config.tied) model.head = dylora::random_uniform<S>(width, config.vocabulary, bound, rng);
  return model;
}

/// A projection's place in a model.
struct Place {
  enum Kind { q, k, v, o, fc, proj };
  Index block;
  Kind kind;
};

/// Which projections carry an adapter.
struct Targets {
  bool q = true, k = true, v = true, o = true, mlp = true;

  bool has(Place::Kind kind) const {
    switch (kind) {
      case Place::q: return q;
      case Place::k: return k;
      case Place::v: return v;
      case Place::o: return o;
      default: return mlp;
    }
  }
};

/// The pretrained model with each projection as make(its weight, its place) gives it, in the order of the traversal.
template <class Linear, std::floating_point S, class Make>
Gpt<S, Linear> with_projections(const Gpt<S, DenseLinear<S>>& base, Make&& make) {
  Gpt<S, Linear> model{base.config, base.token_embedding, base.position_embedding, {}, base.final_norm, base.head};
  for (std::size_t i = 0; i < base.blocks.size(); ++i) {
    const auto& block = base.blocks[i];
    const auto& attention = block.attention;
    const auto linear = [&](const DenseLinear<S>& from, Place::Kind kind) -> Linear {
      return make(dylora::DenseWeight<S>(from.W, from.bias), Place{static_cast<Index>(i), kind});
    };
    auto q = linear(attention.q, Place::q), k = linear(attention.k, Place::k), v = linear(attention.v, Place::v);
    auto o = linear(attention.o, Place::o);
    auto fc = linear(block.fc, Place::fc), proj = linear(block.proj, Place::proj);
    model.blocks.push_back(Block<S, Linear>{block.attention_norm,
                                            block.mlp_norm,
                                            {std::move(q), std::move(k), std::move(v), std::move(o), attention.options},
                                            std::move(fc),
                                            std::move(proj)});
  }
  return model;
}

/// The pretrained model with fresh adapters on its projections: the same function until they are trained.
template <std::floating_point S>
Gpt<S> adapted(const Gpt<S, DenseLinear<S>>& base, dylora::LowRankOptions options, dylora::Rng& rng, Targets targets = {}) {
  return with_projections<dylora::Linear<S>>(base, [&](dylora::DenseWeight<S> weight, Place place) {
    dylora::LowRankOptions chosen = options;
    if (!targets.has(place.kind)) chosen.max_rank = 0;
    return dylora::Linear<S>(std::move(weight), chosen, rng);
  });
}

}  // namespace gpt

#endif
