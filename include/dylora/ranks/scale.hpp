#ifndef DYLORA_RANKS_SCALE_HPP
#define DYLORA_RANKS_SCALE_HPP

#include <cmath>
#include <stdexcept>
#include <string>

#include "dylora/core/types.hpp"

/// The factor s(b) in y = W x + s(b) · B_b A_b x. The published implementations disagree about it, so it is a named rule.
///
/// The choice matters. Under a constant scale and squared error there is one optimum for all ranks at once: at every b the adapter is the
/// best rank-b approximation of the change it has to learn. Under α/b the shared leading components cannot suit all ranks: with two
/// components, uniform sampling and singular values that are close (σ₂ > 0.6 σ₁), rank 1 overshoots its best by 20 % and rank 2 reaches 60 %
/// of its first singular value; with values further apart the components cease to be aligned.
namespace dylora {

/// A rule is a plain function, so that users can write their own and writers of adapter files can recognise the known ones.
using ScaleRule = double (*)(double alpha, Index rank, Index max_rank);

/// α / b: DyLoRA, arXiv 2210.07558, eq. 7. The default; at b = max_rank it is LoRA's α / r.
inline double alpha_over_rank(double alpha, Index rank, Index /*max_rank*/) { return alpha / static_cast<double>(rank); }

/// α / √b: the rank-stabilised scale of rsLoRA (arXiv 2312.03732) at the active rank; smaller jumps between neighbouring ranks.
inline double alpha_over_sqrt_rank(double alpha, Index rank, Index /*max_rank*/) { return alpha / std::sqrt(static_cast<double>(rank)); }

/// α / max_rank: the same at every rank, so that truncation only drops components and rescales nothing.
inline double alpha_over_max_rank(double alpha, Index /*rank*/, Index max_rank) { return alpha / static_cast<double>(max_rank); }

/// The α for which `rule` gives exactly `scale` at `rank`: how an adapter takes over the scale of another. One that no α gives exactly, for
/// rounding, is missed by an ulp or two. Throws std::invalid_argument if the rule is not proportional to α.
inline double alpha_giving(ScaleRule rule, double scale, Index rank, Index max_rank) {
  const auto error = [&](double alpha) { return std::abs(rule(alpha, rank, max_rank) - scale); };
  const double quotient = scale / rule(1, rank, max_rank);
  double alpha = quotient;
  for (const double direction : {-HUGE_VAL, HUGE_VAL}) {
    double next = quotient;
    for (int neighbours = 0; neighbours < 4; ++neighbours) {  // the quotient is that near, however it was rounded
      next = std::nextafter(next, direction);
      if (error(next) < error(alpha)) alpha = next;
    }
  }
  if (error(alpha) <= 1e-14 * std::abs(scale)) return alpha;
  throw std::invalid_argument("scale rule: expected one that is proportional to alpha, got one that has no alpha for a scale of " +
                              std::to_string(scale));
}

}  // namespace dylora

#endif
