#ifndef DYLORA_RANKS_SCALE_HPP
#define DYLORA_RANKS_SCALE_HPP

#include <cmath>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>

#include "dylora/core/members.hpp"
#include "dylora/core/types.hpp"

/// The factor s(b) in y = W x + s(b) · B_b A_b x. The published implementations disagree about it, so it is a named rule.
///
/// The choice matters. Under a constant scale and squared error there is one optimum for all ranks at once: at every b the adapter is the
/// best rank-b approximation of the change it has to learn. Under α/b the shared leading components cannot suit all ranks: with two
/// components, uniform sampling and singular values that are close (σ₂ > 0.6 σ₁), rank 1 overshoots its best by 20 % and rank 2 reaches 60
/// % of its first singular value; with values further apart the components cease to be aligned.
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

/// The settings (core/members.hpp) of an adapter of type A, in its members: max_rank, and the scale at the first and the last rank, unless
/// max_rank is 0. Rules that agree there are the same one, as far as those of this file go. `adapter` finds A in what is walked.
template <class A, class Get = std::identity>
void scale_settings(const auto& f, Get adapter = {}) {
  const auto scale_at = [adapter](auto rank) {
    return [adapter, rank](const auto& self) -> std::optional<double> {
      const A& a = std::invoke(adapter, self);
      return a.max_rank() > 0 ? std::optional(a.exact_scale(rank(a))) : std::nullopt;
    };
  };
  f(Setting{"max_rank"}, [adapter](const auto& self) { return std::invoke(adapter, self).max_rank(); });
  f(Setting{"scale at rank 1"}, scale_at([](const A&) { return Index{1}; }));
  f(Setting{"scale at max_rank"}, scale_at([](const A& a) { return a.max_rank(); }));
}

}  // namespace dylora

#endif
