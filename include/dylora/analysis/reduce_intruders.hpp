#ifndef DYLORA_ANALYSIS_REDUCE_INTRUDERS_HPP
#define DYLORA_ANALYSIS_REDUCE_INTRUDERS_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>

#include "dylora/adapters/factors.hpp"
#include "dylora/analysis/intruders.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/svd.hpp"

/// Turning intruder dimensions down in a trained weight, after arXiv 2410.21228, which reports less forgetting for little loss on the task;
/// a replication did not find the gain. As PEFT does it:
///
///     const BaseSpectrum base(W0);
///     const MatrixX<double> reduced = reduce_intruders(base, W_merged);
///     const TruncatedFactors adapter = truncated_factors(reduced - W0, 8, scale);      // a low-rank adapter again
///     if (adapter.lost < 0.05) layer.adapter.set_factors(adapter.factors);             // a LowRank<double>
namespace dylora {

/// W + (factor − 1) Σ σ_j u_j v_jᵀ over the intruders of W: their singular values become factor · σ_j, the rest of W stays. PEFT's factor
/// is 0.75; 1 changes nothing and 0 removes them. What is new need not be in the span of an adapter's factors, so the change W' − W0 has a
/// larger rank. Throws as BaseSpectrum::intruders, and std::invalid_argument unless 0 ≤ factor ≤ 1.
template <class M>
MatrixX<double> reduce_intruders(const BaseSpectrum& base, const Eigen::MatrixBase<M>& W, double factor = 0.75,
                                 const IntruderOptions& options = {}) {
  require_option(factor >= 0 && factor <= 1, factor, "reduce_intruders: factor", "a number in [0, 1]");
  detail::require_options(options);
  require_equal(W.rows(), base.rows(), "reduce_intruders: rows of W");
  require_equal(W.cols(), base.cols(), "reduce_intruders: columns of W");
  MatrixX<double> reduced = detail::finite_matrix(W, "reduce_intruders: W");
  const RandomizedSvd svd = detail::largest_singular_vectors(reduced, options);
  const Intruders found = base.intruders_among(svd, options);
  for (std::size_t i = 0; i < found.directions.size(); ++i) {
    if (found.directions[i].cosine >= options.threshold) continue;
    const auto j = static_cast<Index>(i);
    reduced += ((factor - 1) * svd.singular_values[j]) * svd.U.col(j) * svd.V.col(j).transpose();
  }
  return reduced;
}

/// The best approximation of a change of a weight by an adapter.
struct TruncatedFactors {
  LowRankFactors<double> factors;
  double lost;  ///< ‖Δ − scale · B · A‖_F / ‖Δ‖_F; 0 for a Δ that is 0
};

/// Δ ≈ scale · B · A from the largest singular values of Δ: B = U √(Σ / scale), A = √(Σ / scale) Vᵀ. Every prefix is the best approximation
/// of its rank in turn. Throws as thin_svd, and std::invalid_argument unless 1 ≤ rank ≤ min(rows, cols) and scale is a finite number > 0.
template <class M>
TruncatedFactors truncated_factors(const Eigen::MatrixBase<M>& delta, Index rank, double scale) {
  require_option(scale > 0 && std::isfinite(scale), scale, "truncated_factors: scale", "a finite number > 0");
  const MatrixX<double> change = detail::finite_matrix(delta, "truncated_factors: delta");
  require_in_range(rank, 1, std::min(change.rows(), change.cols()), "truncated_factors: rank");
  const Svd svd = detail::thin_svd(change);
  const VectorX<double> root = (svd.singular_values.head(rank) / scale).cwiseSqrt();
  const double norm = svd.singular_values.norm();
  return {{root.asDiagonal() * svd.V.leftCols(rank).transpose(), svd.U.leftCols(rank) * root.asDiagonal(), scale},
          norm > 0 ? svd.singular_values.tail(svd.singular_values.size() - rank).norm() / norm : 0};
}

}  // namespace dylora

#endif
