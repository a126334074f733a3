#ifndef DYLORA_IO_GGUF_SCALE_HPP
#define DYLORA_IO_GGUF_SCALE_HPP

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <utility>
#include <vector>

#include "dylora/adapters/factors.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/gguf/modules.hpp"

/// A GGUF adapter has one α for all of its modules. Here is which.
namespace dylora::detail {

struct GgufFactors {
  GgufPlace place;
  RowMatrix<float> A;
  MatrixX<double> B;  // still without the part of the scale that α cannot say
  double scale;

  Index rank() const { return A.rows(); }
};

template <class S>
GgufFactors gguf_factors(const GgufPlace& place, const LowRankFactors<S>& factors) {
  GgufFactors result{place, factors.A.template cast<float>(), factors.B.template cast<double>(), factors.scale};
  if (place.heads > 0) result.B = gguf_row_order(result.B.rows(), place.heads) * result.B;
  if (result.scale < 0) {
    result.B = -result.B;
    result.scale = -result.scale;
  }
  return result;
}

/// llama.cpp's scale, in its precision.
inline float gguf_scale(float alpha, Index rank) { return alpha == 0 ? 1 : alpha / static_cast<float>(rank); }

/// The α from which every module gets its scale to the last bit of a float, or 0 if there is none. Where several neighbours do, the one of
/// the fewest digits: the 16 or 0.3 that somebody chose, and the same one each time a file is loaded and saved again.
inline float common_gguf_alpha(const std::vector<GgufFactors>& modules) {
  const auto digits = [](float alpha) {
    std::array<char, 64> text{};
    return std::to_chars(text.data(), text.data() + text.size(), alpha).ptr - text.data();
  };
  const GgufFactors& first = modules.front();
  float best = 0, alpha = static_cast<float>(static_cast<double>(static_cast<float>(first.scale)) * static_cast<double>(first.rank()));
  for (int i = 0; i < 2; ++i) alpha = std::nextafter(alpha, 0.0F);
  for (int i = 0; i < 5; ++i, alpha = std::nextafter(alpha, HUGE_VALF)) {  // the rounding of α / r reaches no further
    const bool fits = alpha > 0 && std::isfinite(alpha) && std::all_of(modules.begin(), modules.end(), [&](const GgufFactors& module) {
                        const float scale = gguf_scale(alpha, module.rank());
                        return scale > 0 && scale == static_cast<float>(module.scale);
                      });
    if (fits && (best == 0 || digits(alpha) < digits(best))) best = alpha;
  }
  return best;
}

/// What a file says about the scale, where 0 means nothing. If no α suits all modules, it is the largest rank, and B takes along what is
/// missing: a positive α is what every reader understands alike. Baked, the scale is 1: α = r, or nothing where ranks differ.
inline float gguf_alpha(const std::vector<GgufFactors>& modules, bool baked) {
  Index lowest = modules.front().rank(), highest = lowest;
  for (const GgufFactors& module : modules) {
    lowest = std::min(lowest, module.rank());
    highest = std::max(highest, module.rank());
  }
  if (baked) return lowest == highest ? static_cast<float>(highest) : 0;
  const float common = common_gguf_alpha(modules);
  return common > 0 ? common : static_cast<float>(highest);
}

}  // namespace dylora::detail

#endif
