#ifndef DYLORA_METHODS_LORA_PLUS_HPP
#define DYLORA_METHODS_LORA_PLUS_HPP

#include <cmath>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/train/parameter_groups.hpp"

namespace dylora {

/// lr_B = ratio · lr_A: LoRA+ (Hayou et al., arXiv 2402.12354). The best ratio, above 1, depends on the task; 16 is a usual one, and the
/// larger it is, the more the lr itself should be lowered.
///
///     AdamW optimizer(model, {.lr = 1e-4, .groups = lora_plus(16)});
///     AdamW optimizer(model, {.lr = 1e-4, .weight_decay = 0.1, .groups = without_decay({"lora_magnitude_vector"}, lora_plus(16))});
///
/// What is B is said by Parameter::factor alone: a magnitude, a gain or a gate keeps the optimiser's lr, whatever its name or shape.
/// (PEFT's version puts everything of one dimension into the group of B.)
///
/// Both factors of an embedding's adapter have `embedding_ratio` alone, lr_A = lr_B. The authors' code and PEFT's give them a learning rate
/// of their own, 1e-6 unless set, whatever lr and ratio are; here it moves with the optimiser's lr: for theirs, lora_plus(16, 1e-6 / lr).
/// Throws std::invalid_argument unless both are finite numbers > 0.
inline ParameterGroups lora_plus(double ratio, double embedding_ratio = 1) {
  require_option(ratio > 0 && std::isfinite(ratio), ratio, "lora_plus: ratio", "a finite number > 0");
  require_option(embedding_ratio > 0 && std::isfinite(embedding_ratio), embedding_ratio, "lora_plus: embedding_ratio",
                 "a finite number > 0");
  return [ratio, embedding_ratio](const Parameter& parameter) -> ParameterGroup {
    if (parameter.factor == Factor::none) return {};
    if (parameter.embedding) return {.lr_ratio = embedding_ratio};
    return {.lr_ratio = parameter.factor == Factor::B ? ratio : 1};
  };
}

}  // namespace dylora

#endif
