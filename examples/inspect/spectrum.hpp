#ifndef DYLORA_EXAMPLES_INSPECT_SPECTRUM_HPP
#define DYLORA_EXAMPLES_INSPECT_SPECTRUM_HPP

#include <Eigen/QR>
#include <Eigen/SVD>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "dylora/adapters/factors.hpp"
#include "dylora/analysis/spectrum.hpp"
#include "dylora/core/types.hpp"
#include "dylora/ranks/scale.hpp"

namespace inspect {

using dylora::Index;

/// The scale at the first `rank` components of an adapter that has `scale` with all `components` of its own.
inline double scale_at(dylora::ScaleRule rule, double scale, Index rank, Index components) {
  return rank == components ? scale : rule(dylora::alpha_giving(rule, scale, components, components), rank, components);
}

/// ‖ΔW − ΔW_b‖² at b = 0, 1, …, and so ‖ΔW‖² at first. Where b is larger than the rank, nothing is lost.
using LostEnergy = std::vector<double>;

/// The smallest rank that keeps this part of ‖ΔW‖².
inline Index rank_keeping(double part, const LostEnergy& lost) {
  const auto enough = std::find_if(lost.begin(), lost.end(), [&](double energy) { return energy <= (1 - part) * lost.front(); });
  return enough - lost.begin();
}

/// ‖ΔW − ΔW_b‖ / ‖ΔW‖; 0 for a ΔW that is 0.
inline double relative_error(const LostEnergy& lost, Index rank) {
  const auto b = static_cast<std::size_t>(rank);
  return b < lost.size() && lost.front() > 0 ? std::sqrt(lost[b] / lost.front()) : 0;
}

/// What ΔW = s · B · A is made of, and what is lost at lower ranks.
struct Spectrum {
  std::vector<double> components;       ///< ‖s · B_i‖ · ‖A_i‖, in the order of the file
  std::vector<double> singular_values;  ///< of ΔW, the largest first
  LostEnergy given;                     ///< with the first b components, at the scale s(b) of the rule
  LostEnergy best;                      ///< with the best ΔW_b of rank b: the squares of the other singular values (Eckart and Young)
};

/// ΔW is never formed. With B = Q_B R_B and Aᵀ = Q_A R_A, a sum of components c_i · B_i A_i has the norm and the singular values of
/// Σ c_i · (column i of R_B)(column i of R_A)ᵀ, which is components × components at most. Costs O(components² · (in + out)).
inline Spectrum spectrum_of(const dylora::LowRankFactors<double>& factors, dylora::ScaleRule rule) {
  using Matrix = dylora::MatrixX<double>;
  const Index rank = factors.A.rows();
  Spectrum result;
  result.given.assign(static_cast<std::size_t>(rank) + 1, 0);
  for (Index i = 0; i < rank; ++i) {
    result.components.push_back(std::abs(factors.scale) * factors.B.col(i).norm() * factors.A.row(i).norm());
  }
  result.best = result.given;
  result.singular_values.assign(static_cast<std::size_t>(rank), 0);
  if (factors.A.size() == 0 || factors.B.size() == 0) return result;

  const auto triangle = [](const Matrix& factor) -> Matrix {
    const Eigen::HouseholderQR<Matrix> qr(factor);
    return qr.matrixQR().topRows(std::min(factor.rows(), factor.cols())).template triangularView<Eigen::Upper>();
  };
  const Matrix B = triangle(factors.B), A = triangle(factors.A.transpose()), whole = B * A.transpose();

  const dylora::VectorX<double> sigma = std::abs(factors.scale) * Eigen::BDCSVD<Matrix>(whole).singularValues();
  std::copy(sigma.begin(), sigma.end(), result.singular_values.begin());
  for (Index b = sigma.size(); b-- > 0;) {
    const auto i = static_cast<std::size_t>(b);
    result.best[i] = result.best[i + 1] + sigma[b] * sigma[b];
  }

  Matrix left_out = Matrix::Zero(whole.rows(), whole.cols());  // Σ over the components from b on
  for (Index b = rank; b > 0; --b) {
    const double excess = factors.scale - scale_at(rule, factors.scale, b, rank);  // of the components that stay
    result.given[static_cast<std::size_t>(b)] = (factors.scale * left_out + excess * (whole - left_out)).squaredNorm();
    left_out += B.col(b - 1) * A.col(b - 1).transpose();
  }
  result.given.front() = result.best.front();
  return result;
}

}  // namespace inspect

#endif
