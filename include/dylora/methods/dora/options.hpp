#ifndef DYLORA_METHODS_DORA_OPTIONS_HPP
#define DYLORA_METHODS_DORA_OPTIONS_HPP

#include <concepts>

#include "dylora/adapters/adapter.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

/// Whether the gradient of A and B takes the norms of the corrected rows for constants, as the paper (section 4.3) and PEFT do, or goes
/// through them too. The output, its gradient in x and that of the magnitude are the same.
enum class NormGradient { detached, exact };

/// An adapter that is a pair of factors and nothing else, made of them and with a gradient for each: Δ_b = s(b) · B[:, :b] · A[:b, :].
template <class A>
concept FactorPairAdapter =
    FactoredAdapter<A> && std::constructible_from<A, RowMatrix<typename A::Scalar>, MatrixX<typename A::Scalar>, typename A::Options> &&
    requires(const A& adapter, typename A::Gradients& gradients, Index rank) {
      { adapter.A } -> std::same_as<const RowMatrix<typename A::Scalar>&>;  // components × in
      { adapter.B } -> std::same_as<const MatrixX<typename A::Scalar>&>;     // out × components
      { adapter.scale(rank) } -> std::same_as<typename A::Scalar>;          // s(b)
      { adapter.components() } -> std::same_as<Index>;
      gradients.A.middleRows(rank, rank) += adapter.A;
      gradients.B.middleCols(rank, rank) += adapter.B;
    };

template <class AdapterOptions>
struct DoraOptions {
  AdapterOptions adapter = {};
  double dropout = 0;                                   ///< p in [0, 1): how often an input of the correction is dropped
  NormGradient norm_gradient = NormGradient::detached;  ///< what dA and dB are
};

}  // namespace dylora

#endif
