#ifndef DYLORA_LINALG_SVD_HPP
#define DYLORA_LINALG_SVD_HPP

#include <Eigen/QR>
#include <Eigen/SVD>
#include <algorithm>
#include <cstddef>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/parallel.hpp"

/// The singular value decomposition, in double whatever the scalar of the matrix, with the same bits for any number of threads.
namespace dylora {

/// W = U · diag(σ) · Vᵀ with k singular values, the largest first. Each pair of vectors has the sign that makes the largest element of the
/// left one positive, the first of them where two are equally large.
struct Svd {
  MatrixX<double> U;                ///< rows × k, orthonormal columns
  VectorX<double> singular_values;  ///< σ
  MatrixX<double> V;                ///< cols × k, orthonormal columns
};

namespace detail {

/// Calls body(i) for every i in [0, count), on several threads where there are. Eigen's own threading is off inside: it chooses the blocks
/// of a product by the number of threads, which changes the bits. What a call throws is thrown again, that of the lowest i first.
template <class Body>
void for_each_decomposition(Index count, const Body& body) {
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(count));
  for_each_task(std::max<Index>(count, 2), parallel_work, [&](Index i) {  // a team, even for one: Eigen is serial in a team
    if (i >= count) return;
    try {
      body(i);
    } catch (...) {
      errors[static_cast<std::size_t>(i)] = std::current_exception();
    }
  });
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

/// A copy in double. Throws ShapeError if it has no elements, NonFiniteError if one of them is a NaN or an infinity.
template <class M>
MatrixX<double> finite_matrix(const Eigen::MatrixBase<M>& W, std::string_view what) {
  if (W.size() == 0) {
    throw ShapeError(std::string(what) + ": expected a matrix with elements, got " + std::to_string(W.rows()) + " × " +
                     std::to_string(W.cols()));
  }
  MatrixX<double> copy = W.template cast<double>();
  if (copy.allFinite()) return copy;
  throw NonFiniteError(std::string(what) + ": expected finite values, got a NaN or an infinity");
}

inline void set_signs(Svd& svd) {
  for (Index j = 0; j < svd.U.cols(); ++j) {
    Index largest;
    svd.U.col(j).cwiseAbs().maxCoeff(&largest);
    if (svd.U(largest, j) > 0) continue;
    svd.U.col(j) = -svd.U.col(j);
    svd.V.col(j) = -svd.V.col(j);
  }
}

// Templates over the scalar, which is double always, so that only a program which calls them compiles Eigen's decompositions; and it once.

template <class S>
Svd thin_svd(const MatrixX<S>& W) {
  Svd result;
  for_each_decomposition(1, [&](Index) {
    const Eigen::BDCSVD<MatrixX<S>> svd(W, Eigen::ComputeThinU | Eigen::ComputeThinV);
    if (svd.info() != Eigen::Success) throw std::runtime_error("thin_svd: the decomposition did not converge");
    result = {svd.matrixU(), svd.singularValues(), svd.matrixV()};
  });
  set_signs(result);
  return result;
}

/// Orthonormal columns with the span of those of Y, which has at least as many rows.
template <class S>
MatrixX<S> orthonormal_columns(const MatrixX<S>& Y) {
  MatrixX<S> Q = MatrixX<S>::Identity(Y.rows(), Y.cols());
  for_each_decomposition(1, [&](Index) { Q.applyOnTheLeft(Eigen::HouseholderQR<MatrixX<S>>(Y).householderQ()); });
  return Q;
}

/// R of Y = Q R, min(rows, cols) × cols.
template <class S>
MatrixX<S> triangular_factor(const MatrixX<S>& Y) {
  MatrixX<S> R;
  for_each_decomposition(1, [&](Index) {
    const Eigen::HouseholderQR<MatrixX<S>> qr(Y);
    R = qr.matrixQR().topRows(std::min(Y.rows(), Y.cols())).template triangularView<Eigen::Upper>();
  });
  return R;
}

}  // namespace detail

/// The thin decomposition of W: all min(rows, cols) singular values and their vectors, by divide and conquer (Eigen's BDCSVD).
/// Throws ShapeError if W has no elements, NonFiniteError if it holds a NaN or an infinity. Costs O(rows · cols · min(rows, cols)): with
/// one core, a fraction of a second at 768 × 768 and some ten seconds at 4096 × 4096.
template <class M>
Svd thin_svd(const Eigen::MatrixBase<M>& W) {
  return detail::thin_svd(detail::finite_matrix(W, "thin_svd: W"));
}

}  // namespace dylora

#endif
