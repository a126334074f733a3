#ifndef DYLORA_IO_PEFT_SCALE_HPP
#define DYLORA_IO_PEFT_SCALE_HPP

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "dylora/core/types.hpp"
#include "dylora/ranks/scale.hpp"

/// PEFT's scale of B A, and the lora_alpha that says a scale.
namespace dylora::detail {

/// lora_alpha / r, or lora_alpha / √r under use_rslora.
inline double peft_scale(double lora_alpha, Index r, bool use_rslora) {
  return (use_rslora ? alpha_over_sqrt_rank : alpha_over_rank)(lora_alpha, r, r);
}

/// The α of the fewest digits for which α / rank is exactly `scale`: what somebody wrote who meant that scale, and the same for all ranks
/// of one α. Where rounding leaves none, the nearest.
inline double lora_alpha_giving(double scale, Index rank) {
  const double product = scale * static_cast<double>(rank);
  for (int digits = 0; digits < 17; ++digits) {
    std::array<char, 32> text{};
    std::snprintf(text.data(), text.size(), "%.*e", digits, product);
    const double alpha = std::strtod(text.data(), nullptr);
    if (alpha / static_cast<double>(rank) == scale) return alpha;
  }
  return alpha_giving(alpha_over_rank, scale, rank, rank);
}

}  // namespace dylora::detail

#endif
