#ifndef DYLORA_METHODS_PRILORA_IMPORTANCE_HPP
#define DYLORA_METHODS_PRILORA_IMPORTANCE_HPP

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

/// |A_ij| · e_j: what entry (i, j) contributes, where e_j is the norm of input feature j. Throws ShapeError unless there is an e_j for each
/// column.
template <class S>
MatrixX<double> importance(const RowMatrix<S>& A, const VectorX<double>& norms) {
  require_equal(norms.size(), A.cols(), "importance: norms, against the columns of A");
  return A.template cast<double>().cwiseAbs() * norms.asDiagonal();
}

}  // namespace dylora

#endif
