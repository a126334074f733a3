#include <dylora/layers/embedding.hpp>

#include "finetune/adapted_as.hpp"
#include "finetune/methods.hpp"
#include "finetune/methods/low_rank.hpp"

namespace finetune {

/// Only the token embedding learns.
AnyModel adapt_embedding(const text::BaseModel& base, const Options& o) {
  using Model = gpt::Gpt<float, FrozenLinear<float>, Attention<float, FrozenLinear<float>>, Embedding<float>>;
  Rng rng(o.seed);
  auto frozen = gpt::with_projections<FrozenLinear<float>>(
      base, [](DenseWeight<float> weight, gpt::Place) { return FrozenLinear<float>(std::move(weight)); });
  return adapted_as(Model{base.config, Embedding<float>(base.token_embedding, adapter_options(o), rng), base.position_embedding,
                          std::move(frozen.blocks), base.final_norm, base.head});
}

}  // namespace finetune
