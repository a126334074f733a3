#ifndef DYLORA_ADAPTERS_FACTORS_HPP
#define DYLORA_ADAPTERS_FACTORS_HPP

#include <concepts>

#include "dylora/core/types.hpp"

namespace dylora {

/// Δ = scale · B · A: an adapter at one rank, as other programs keep it.
template <std::floating_point S>
struct LowRankFactors {
  RowMatrix<S> A;    ///< rank × in
  MatrixX<S> B;       ///< out × rank
  double scale = 1;  ///< what B · A is multiplied by; α / rank where a format has an α
};

}  // namespace dylora

#endif
