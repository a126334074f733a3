#ifndef DYLORA_RANKS_ORDER_HPP
#define DYLORA_RANKS_ORDER_HPP

#include <Eigen/QR>
#include <Eigen/SVD>
#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"
#include "dylora/ranks/truncate.hpp"

/// Components in the order of what they contribute, by the singular value decomposition of the product that they make together.
namespace dylora {

namespace detail {

template <class S>
void require_orderable(const RowMatrix<S>& A, const MatrixX<S>& B, std::string_view name) {
  const std::string what = "order_components: " + std::string(name);
  require_equal(B.cols(), A.rows(), what + ": columns of B (rank) against rows of A");
  if (A.rows() > std::min(A.cols(), B.rows())) {
    throw ShapeError(what + ": components: expected at most " + std::to_string(std::min(A.cols(), B.rows())) + ", its features, got " +
                     std::to_string(A.rows()));
  }
  if (A.allFinite() && B.allFinite()) return;
  throw NonFiniteError(what + ": expected finite factors, got a NaN or an infinity");
}

}  // namespace detail

/// B A ← U Σ Vᵀ as  B = U Σ / a,  A = a Vᵀ  with the root mean square a of the norms that the rows of A had: the same product, its
/// components orthogonal, the largest singular value first. Every prefix of the product is then its best approximation of that rank (Eckart
/// and Young).
///
/// The product is never formed: QR of B and of Aᵀ, and the decomposition of a components × components matrix. Costs
/// O(components² · (in + out)); computed in double. With nothing changed, throws NonFiniteError if a factor is not finite,
/// ShapeError if the factors disagree or have more components than features.
template <std::floating_point S>
void order_components(RowMatrix<S>& A, MatrixX<S>& B) {
  const Index components = A.rows();
  detail::require_orderable(A, B, "the adapter");
  if (components == 0) return;

  using Exact = MatrixX<double>;
  const Exact in = A.transpose().template cast<double>(), out = B.template cast<double>();
  const double norm = std::sqrt(in.squaredNorm() / static_cast<double>(components));
  if (norm == 0) return;
  const Eigen::HouseholderQR<Exact> in_qr(in), out_qr(out);
  const auto triangle = [&](const Eigen::HouseholderQR<Exact>& qr) -> Exact {
    return qr.matrixQR().topRows(components).template triangularView<Eigen::Upper>();
  };
  const Exact core = triangle(out_qr) * triangle(in_qr).transpose();
  const Eigen::JacobiSVD<Exact> svd(core, Eigen::ComputeFullU | Eigen::ComputeFullV);
  const Exact U = out_qr.householderQ() * Exact(Exact::Identity(out.rows(), components) * svd.matrixU());
  const Exact V = in_qr.householderQ() * Exact(Exact::Identity(in.rows(), components) * svd.matrixV());
  A = (norm * V.transpose()).template cast<S>();
  B = (U * (svd.singularValues() / norm).asDiagonal()).template cast<S>();
}

/// The same for every LowRank in `trained`, each by itself: its function at max_rank stays what it was, up to rounding. What optimisers
/// keep about the components no longer belongs to them; start a fresh one.
///
/// So a plain LoRA is cut as well as its weights alone allow, and a run that began at max_rank goes on from there to the lower ranks. Under
/// any but a constant scale (alpha_over_max_rank), a prefix is still the best approximation in its direction and of another size.
/// With nothing changed, throws as for one adapter, naming it, and std::invalid_argument for an adapter whose components are not those of a
/// lora_A and a lora_B.
template <class T>
  requires requires { typename T::Scalar; }
void order_components(T& trained) {
  using S = typename T::Scalar;
  struct Factors {
    std::string name;
    RowMatrix<S>* A = nullptr;
    MatrixX<S>* B = nullptr;
    bool known = true;
  };
  std::vector<Factors> adapters;
  detail::zip_adapters(
      [&](std::size_t i, std::string_view name, Parameter parameter, auto& p) {
        if (i == adapters.size()) adapters.push_back({.name = std::string(name)});
        if constexpr (requires { adapters[i].A = &p; }) {
          if (parameter.factor == Factor::A && !parameter.embedding) return void(adapters[i].A = &p);
        } else if constexpr (requires { adapters[i].B = &p; }) {
          if (parameter.factor == Factor::B && !parameter.embedding) return void(adapters[i].B = &p);
        }
        adapters[i].known = false;
      },
      trained);
  for (const Factors& factors : adapters) {
    if (!factors.known || factors.A == nullptr || factors.B == nullptr) {
      throw std::invalid_argument("order_components: adapter " + factors.name +
                                  ": expected components made of lora_A and lora_B alone, got others");
    }
    detail::require_orderable(*factors.A, *factors.B, factors.name);
  }
  for (const Factors& factors : adapters) order_components(*factors.A, *factors.B);
}

}  // namespace dylora

#endif
