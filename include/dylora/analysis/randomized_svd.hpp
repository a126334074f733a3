#ifndef DYLORA_ANALYSIS_RANDOMIZED_SVD_HPP
#define DYLORA_ANALYSIS_RANDOMIZED_SVD_HPP

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "dylora/core/error.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"
#include "dylora/linalg/svd.hpp"

namespace dylora {

struct RandomizedSvdOptions {
  Index oversampling = 10;     ///< columns of the sample beyond the rank: the more, the faster each power iteration gains
  Index power_iterations = 2;  ///< at most; 0 where the singular values fall steeply, dozens where neighbours hardly differ
  double tolerance = 0;        ///< the iterations end before that at a residual ≤ this; at 0 only at an exact result
};

/// The largest singular values of a matrix, and how far they are from exact.
struct RandomizedSvd : Svd {
  double residual = 0;         ///< max over j of ‖W v_j − σ_j u_j‖ / σ_1; Wᵀ u_j = σ_j v_j holds up to rounding
  Index power_iterations = 0;  ///< those that were done
};

namespace detail {

template <class S>
RandomizedSvd randomized_svd(const MatrixX<S>& W, Index rank, const RandomizedSvdOptions& options, Rng& rng) {
  const Index limit = std::min(W.rows(), W.cols());
  require_in_range(rank, 1, limit, "randomized_svd: rank");
  require_in_range(options.oversampling, 0, std::numeric_limits<Index>::max(), "randomized_svd: oversampling");
  require_in_range(options.power_iterations, 0, std::numeric_limits<Index>::max(), "randomized_svd: power_iterations");
  require_option(options.tolerance >= 0 && std::isfinite(options.tolerance), options.tolerance, "randomized_svd: tolerance",
                 "a finite number ≥ 0");

  const Index samples = rank + std::min(options.oversampling, limit - rank);
  RandomizedSvd result;
  MatrixX<S> Y(W.rows(), samples), Z(W.cols(), samples), U(W.rows(), samples);
  set_product(Y, W, random_uniform<S>(W.cols(), samples, 1, rng));
  for (;; ++result.power_iterations) {
    const MatrixX<S> Q = orthonormal_columns(Y);
    set_product(Z, W.transpose(), Q);
    const Svd svd = thin_svd(finite_matrix(Z, "randomized_svd: W"));  // Z = Wᵀ Q, so that W ≈ Q Zᵀ has the left vectors Q · svd.V
    set_product(U, Q, svd.V);
    set_product(Y, W, svd.U);
    result.U = U.leftCols(rank);
    result.singular_values = svd.singular_values.head(rank);
    result.V = svd.U.leftCols(rank);
    const MatrixX<S> missed = Y.leftCols(rank) - result.U * result.singular_values.asDiagonal();
    const double largest = result.singular_values[0];
    result.residual = largest > 0 ? std::sqrt(missed.colwise().squaredNorm().maxCoeff()) / largest : 0;
    if (result.residual <= options.tolerance || result.power_iterations == options.power_iterations) break;
  }
  set_signs(result);
  return result;
}

}  // namespace detail

/// The `rank` largest singular values of W and their vectors: with a random Ω, Q an orthonormal basis of W (Wᵀ W)^q Ω, and the
/// decomposition of Qᵀ W.
///
/// Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 (randomized subspace iteration, q = power_iterations) and 5.1. A power
/// iteration multiplies the share of σ_i in the error of a vector with σ_j > σ_i by (σ_i / σ_j)², so that what lies beyond the
/// rank + oversampling values in the sample fades first. Ω is uniform instead of Gaussian, since that is the same on every platform.
///
///     Rng rng(42);
///     const RandomizedSvd svd = randomized_svd(W, 10, {.power_iterations = 50, .tolerance = 1e-6}, rng);
///
/// The σ are at most those of W, and each is within residual · σ_1 of one of them. Draws cols · (rank + oversampling) numbers; the same
/// seed gives the same bits, with any number of threads. Throws ShapeError and NonFiniteError as thin_svd, std::invalid_argument unless
/// 1 ≤ rank ≤ min(rows, cols) and for an option out of range. Costs (3 + 2 q) products of W with rank + oversampling columns.
template <class M>
RandomizedSvd randomized_svd(const Eigen::MatrixBase<M>& W, Index rank, const RandomizedSvdOptions& options, Rng& rng) {
  return detail::randomized_svd(detail::finite_matrix(W, "randomized_svd: W"), rank, options, rng);
}

}  // namespace dylora

#endif
