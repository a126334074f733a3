#ifndef DYLORA_EXAMPLES_FINETUNE_MEMORY_HPP
#define DYLORA_EXAMPLES_FINETUNE_MEMORY_HPP

#include <cstdio>
#include <dylora/dylora.hpp>
#include <type_traits>

#include "gpt/gpt.hpp"

namespace finetune {

using dylora::Index;

/// What a run will need, in bytes.
struct Memory {
  double base = 0;      ///< the pretrained weights
  double adapters = 0;  ///< parameters, gradients, two moments, two snapshots, and where checkpoints are made, one on its way to the disk
  double activations = 0;  ///< what forward keeps for backward, the workspaces of both, and the logits
};

/// Of a model over batches of so many tokens.
template <class Model>
Memory memory_needed(const Model& model, double base_bytes, Index tokens, bool checkpoints) {
  constexpr double number = sizeof(typename Model::Scalar);
  const gpt::Config& config = model.config;
  const auto width = static_cast<double>(config.width), heads = static_cast<double>(config.heads);
  const auto inner = model.blocks.empty() ? 0 : static_cast<double>(model.blocks.front().fc.out_features());
  double components = 0;
  for (const dylora::AdapterRank& adapter : dylora::adapter_ranks(model)) components += static_cast<double>(adapter.rank);
  const auto layers = static_cast<double>(config.layers);
  // What a backward writes on the way is shared by all blocks, unless their projections are linked.
  using Linear = std::remove_cvref_t<decltype(model.blocks.front().fc)>;
  const double linked = dylora::SelfContained<Linear> ? 0 : (layers - 1) * (4 * width + heads) + components;
  const double kept = layers * (8 * width + inner + heads + 2) + components + linked;
  const double shared = 10 * width + 4 * inner + heads + static_cast<double>(config.vocabulary);
  const double copies = checkpoints ? 6 + 4 : 6;
  return {base_bytes, copies * number * static_cast<double>(dylora::parameter_count(model)),
          number * static_cast<double>(tokens) * (kept + shared)};
}

inline void print(const Memory& memory, const char* where_the_base_is) {
  constexpr double mebibyte = 1 << 20;
  std::printf("memory: %.1f MiB of base weights, %s; %.1f MiB of adapters, gradients and moments; %.1f MiB of activations\n",
              memory.base / mebibyte, where_the_base_is, memory.adapters / mebibyte, memory.activations / mebibyte);
  std::fflush(stdout);
}

}  // namespace finetune

#endif
