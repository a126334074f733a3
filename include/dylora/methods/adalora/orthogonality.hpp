#ifndef DYLORA_METHODS_ADALORA_ORTHOGONALITY_HPP
#define DYLORA_METHODS_ADALORA_ORTHOGONALITY_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <type_traits>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"

namespace dylora {

/// ‖A Aᵀ − 1‖² + ‖Bᵀ B − 1‖² and its gradients, 4 (A Aᵀ − 1) A and 4 B (Bᵀ B − 1).
template <std::floating_point S>
struct Orthogonality {
  double value;
  RowMatrix<S> A;
  MatrixX<S> B;
};

namespace detail {

/// M Mᵀ − 1, where a row of M is a component.
template <class M>
auto gram_less_one(const M& components) {
  using S = typename M::Scalar;
  MatrixX<S> gram(components.rows(), components.rows());
  set_product(gram, components, components.transpose());
  gram.diagonal().array() -= S(1);
  return gram;
}

}  // namespace detail

/// How far the components of an adapter are from being orthogonal and of length 1: AdaLoRA's penalty (Zhang et al., arXiv 2303.10512),
/// with squared Frobenius norms as the paper has them. (Its code is said to take their roots and the mean over all matrices; unconfirmed.)
/// Throws ShapeError if A and B disagree about the rank. Costs 4·rank²·(in + out) flops.
template <std::floating_point S>
Orthogonality<S> orthogonality(const RowMatrix<S>& A, const MatrixX<S>& B) {
  require_equal(B.cols(), A.rows(), "orthogonality: columns of B (rank) against rows of A");
  const MatrixX<S> of_A = detail::gram_less_one(A), of_B = detail::gram_less_one(B.transpose());
  Orthogonality<S> result{static_cast<double>(of_A.squaredNorm()) + static_cast<double>(of_B.squaredNorm()),
                          RowMatrix<S>(A.rows(), A.cols()), MatrixX<S>(B.rows(), B.cols())};
  set_product(result.A, of_A, A, S(4));
  set_product(result.B, B, of_B, S(4));
  return result;
}

/// The same for every factor A and B in `trained` but those of embeddings: gradients += weight · ∂/∂θ for the components that were trained;
/// returns weight times the sum of the penalties. What is penalised is the prefix up to the last of those components, so that a step at
/// rank b makes the first b of them orthogonal, and a frozen prefix is something to be orthogonal to.
///
///     train_step(model, optimizer, gradients, [&] {
///       …                                                              // forward, loss, backward
///       return loss + add_orthogonality(model, gradients, 0.1);
///     });
///
/// In AdaLoRA a component's size is in its singular value. Here it is in A and B, whose components the penalty draws to length 1: keep the
/// weight small. Where B is 0, so is its gradient. Throws std::invalid_argument unless the weight is a finite number ≥ 0, ShapeError if the
/// gradients do not fit.
template <class T>
double add_orthogonality(const T& trained, typename T::Gradients& gradients, double weight) {
  require_option(weight >= 0 && std::isfinite(weight), weight, "add_orthogonality: weight", "a finite number ≥ 0");
  require_shapes(trained, "add_orthogonality: gradient of", gradients);
  double sum = 0;
  for_each_parameter(
      [&](Parameter parameter, const auto& p, auto& g) {
        using S = typename std::remove_cvref_t<decltype(p)>::Scalar;
        if (parameter.factor == Factor::none || parameter.embedding) return;
        const bool rows = parameter.rank_axis == RankAxis::rows;
        Index reached = 0;
        detail::for_each_trained_range(parameter.rank_axis, g, [&](Index, Index end) { reached = end; });
        if (reached == 0) return;
        const auto prefix = detail::component_block(parameter.rank_axis, p, 0, reached);
        const MatrixX<S> gram = rows ? detail::gram_less_one(prefix) : detail::gram_less_one(prefix.transpose());
        sum += static_cast<double>(gram.squaredNorm());
        detail::for_each_trained_range(parameter.rank_axis, g, [&](Index begin, Index end) {
          auto into = detail::component_block(parameter.rank_axis, g, begin, end);
          if (rows) {
            add_product(into, gram.middleRows(begin, end - begin), prefix, static_cast<S>(4 * weight));
          } else {
            add_product(into, prefix, gram.middleCols(begin, end - begin), static_cast<S>(4 * weight));
          }
        });
      },
      trained, gradients);
  return weight * sum;
}

}  // namespace dylora

#endif
