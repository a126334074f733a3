#ifndef DYLORA_EXAMPLES_FINETUNE_METHODS_LOW_RANK_HPP
#define DYLORA_EXAMPLES_FINETUNE_METHODS_LOW_RANK_HPP

#include <dylora/dylora.hpp>
#include <dylora/methods/lora_plus.hpp>

#include "finetune/train.hpp"

namespace finetune {

/// DyLoRA, LoRA and rsLoRA, which differ in their ranks and scale alone, and LoRA+, in which B learns faster.
struct LowRankMethod : PlainMethod {
  ParameterGroups groups(const Options& o) const { return o.method == "lora+" ? lora_plus(o.lr_ratio) : ParameterGroups{}; }
};

inline LowRankOptions adapter_options(const Options& o) {
  return {.max_rank = o.max_rank, .alpha = o.alpha, .scale = scale_rules.at(o.scale)};
}

/// The options of the adapter at a place: without components where --targets leaves it out.
inline LowRankOptions adapter_options(const Options& o, gpt::Place place) {
  LowRankOptions options = adapter_options(o);
  if (!make_targets(o).has(place.kind)) options.max_rank = 0;
  return options;
}

}  // namespace finetune

#endif
