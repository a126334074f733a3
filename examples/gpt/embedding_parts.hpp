#ifndef DYLORA_EXAMPLES_GPT_EMBEDDING_PARTS_HPP
#define DYLORA_EXAMPLES_GPT_EMBEDDING_PARTS_HPP

#include <dylora/dylora.hpp>
#include <dylora/layers/embedding.hpp>

namespace gpt {

/// Whether a token embedding has an adapter: a dylora::Embedding in the place of a matrix.
template <class Embedding>
inline constexpr bool adapts_embedding = requires(const Embedding& embedding) { embedding.adapter; };

/// The matrix of an embedding, and what an adapted one keeps, learns and writes on the way besides.
template <class Embedding>
struct EmbeddingParts {
  struct Nothing {};
  using Table = Embedding;
  using Cache = Nothing;
  using Workspace = Nothing;
  using Gradients = dylora::MatrixX<typename Embedding::Scalar>;  // of pretraining
};
template <class S, class Values>
struct EmbeddingParts<dylora::Embedding<S, Values>> {
  using Table = Values;
  using Cache = typename dylora::Embedding<S, Values>::Cache;
  using Gradients = typename dylora::Embedding<S, Values>::Gradients;
  using Workspace = typename dylora::Embedding<S, Values>::Workspace;
};

}  // namespace gpt

#endif
