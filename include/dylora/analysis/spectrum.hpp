#ifndef DYLORA_ANALYSIS_SPECTRUM_HPP
#define DYLORA_ANALYSIS_SPECTRUM_HPP

#include <cmath>
#include <concepts>
#include <string>
#include <string_view>

#include "dylora/adapters/factors.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"
#include "dylora/linalg/svd.hpp"

/// How much of its rank an adapter uses.
///
///     const VectorX<double> sigma = singular_values(layer.adapter.factors(8));  // of ΔW at rank 8, which is never formed
///     effective_rank(sigma);                                                   // 8 if all are equal, near 1 if one dominates
///     component_energies(layer.adapter.factors(8));                            // what each component carries, in their order
namespace dylora {

namespace detail {

template <std::floating_point S>
void require_finite_factors(const LowRankFactors<S>& factors, std::string_view what) {
  require_equal(factors.B.cols(), factors.A.rows(), std::string(what) + ": columns of B (rank) against rows of A");
  if (factors.A.allFinite() && factors.B.allFinite() && std::isfinite(factors.scale)) return;
  throw NonFiniteError(std::string(what) + ": expected finite factors and scale, got a NaN or an infinity");
}

inline void require_spectrum(const VectorX<double>& singular_values, std::string_view what) {
  for (const double sigma : singular_values) {
    if (!std::isfinite(sigma)) throw NonFiniteError(std::string(what) + ": expected finite values, got " + std::to_string(sigma));
    require_option(sigma >= 0, sigma, what, "values ≥ 0");
  }
}

}  // namespace detail

/// The singular values of W, the largest first. Throws and costs as thin_svd.
template <class M>
VectorX<double> singular_values(const Eigen::MatrixBase<M>& W) {
  return detail::thin_svd(detail::finite_matrix(W, "singular_values: W")).singular_values;
}

/// The singular values of scale · B · A that may be other than 0, min(rank, in, out) of them, the largest first.
///
/// The product is never formed: with B = Q_B R_B and Aᵀ = Q_A R_A they are those of scale · R_B R_Aᵀ, which is rank × rank. Throws
/// ShapeError if A and B disagree about the rank, NonFiniteError if something is not finite. Costs O(rank² · (in + out)).
template <std::floating_point S>
VectorX<double> singular_values(const LowRankFactors<S>& factors) {
  detail::require_finite_factors(factors, "singular_values: factors");
  if (factors.A.size() == 0 || factors.B.size() == 0) return {};
  const MatrixX<double> B = factors.B.template cast<double>(), A = factors.A.transpose().template cast<double>();
  const MatrixX<double> left = detail::triangular_factor(B), right = detail::triangular_factor(A);
  MatrixX<double> core(left.rows(), right.rows());
  set_product(core, left, right.transpose());
  return std::abs(factors.scale) * singular_values(core);
}

/// exp(−Σ p_i log p_i) with p_i = σ_i / Σσ: how many equal singular values have this entropy. Between 1 and the rank; 0 if all are 0.
/// Roy and Vetterli, "The effective rank" (EUSIPCO 2007). Throws std::invalid_argument for a value below 0, NonFiniteError for one that is
/// not finite.
inline double effective_rank(const VectorX<double>& singular_values) {
  detail::require_spectrum(singular_values, "effective_rank: singular values");
  const double sum = singular_values.sum();
  if (!(sum > 0)) return 0;
  double entropy = 0;
  for (const double sigma : singular_values) {
    if (const double p = sigma / sum; p > 0) entropy -= p * std::log(p);
  }
  return std::exp(entropy);
}

/// Σσ² / max σ² = ‖W‖_F² / ‖W‖₂²: between 1 and the rank, and blind to small singular values; 0 if all are 0. Throws as effective_rank.
inline double stable_rank(const VectorX<double>& singular_values) {
  detail::require_spectrum(singular_values, "stable_rank: singular values");
  const double largest = singular_values.size() > 0 ? singular_values.maxCoeff() : 0;
  return largest > 0 ? (singular_values / largest).squaredNorm() : 0;
}

/// ‖s B_i A_i‖² / Σ_j ‖s B_j A_j‖² for each component i, in their order: sums to 1, or is all 0 where they are. The scale cancels.
///
/// A share of ‖ΔW‖² only where the components are orthogonal, as order_components makes them: two that are opposite carry half each
/// of a ΔW that is 0. ΔW is never formed. Throws as singular_values; costs O(rank · (in + out)).
template <std::floating_point S>
VectorX<double> component_energies(const LowRankFactors<S>& factors) {
  detail::require_finite_factors(factors, "component_energies: factors");
  const VectorX<double> B = factors.B.template cast<double>().colwise().norm(), A = factors.A.template cast<double>().rowwise().norm();
  VectorX<double> norms = B.cwiseProduct(A);
  const double largest = norms.size() > 0 ? norms.maxCoeff() : 0;
  if (!(largest > 0)) return norms;
  norms = (norms / largest).cwiseAbs2();
  return norms / norms.sum();
}

}  // namespace dylora

#endif
