#ifndef DYLORA_WEIGHTS_MATRIX_WEIGHT_HPP
#define DYLORA_WEIGHTS_MATRIX_WEIGHT_HPP

#include <concepts>

#include "dylora/core/error.hpp"
#include "dylora/core/named.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"

namespace dylora {

/// The verbs of a frozen weight that is a matrix in memory, whoever owns it. A base of the weight, DenseWeight : MatrixWeight<DenseWeight,
/// S>, which has a name that messages begin with, rows(), cols(), and values(), out × in, and offsets(), out elements or none, which are
/// added to each output.
template <class Derived, std::floating_point S>
class MatrixWeight {
 public:
  /// y = W x + bias. 2·out·in·n flops.
  void apply(ConstMatrixRef<S> x, MatrixRef<S> y) const { apply(x, LowRankTerm<S>::none(self().rows(), x.cols()), y); }

  /// y = W x + bias + term. One pass over y; 2·n·(out·in + rank·out) flops.
  void apply(ConstMatrixRef<S> x, const LowRankTerm<S>& term, MatrixRef<S> y) const {
    require_equal(x.rows(), self().cols(), detail::named<Derived, "::apply: rows of x">());
    require_equal(y.rows(), self().rows(), detail::named<Derived, "::apply: rows of y">());
    require_equal(y.cols(), x.cols(), detail::named<Derived, "::apply: samples in y">());
    set_affine<S>(y, self().values(), x, self().offsets(), term);
  }

  /// dx += Wᵀ dy. 2·out·in·n flops.
  void add_apply_transposed(ConstMatrixRef<S> dy, MatrixRef<S> dx) const { add_product(dx, self().values().transpose(), dy); }

  /// dx = Wᵀ dy + term. One pass over dx; 2·n·(out·in + rank·in) flops.
  void apply_transposed(ConstMatrixRef<S> dy, const LowRankTerm<S>& term, MatrixRef<S> dx) const {
    set_affine<S>(dx, self().values().transpose(), dy, VectorX<S>(), term);
  }

  /// dx += Wᵀ dy + term. One pass over dx; 2·n·(out·in + rank·in) flops.
  void add_apply_transposed(ConstMatrixRef<S> dy, const LowRankTerm<S>& term, MatrixRef<S> dx) const {
    add_affine<S>(dx, self().values().transpose(), dy, term);
  }

  /// A copy of W, without the bias.
  MatrixX<S> dense() const { return self().values(); }

  /// A copy of the bias; no elements if there is none.
  VectorX<S> dense_bias() const { return self().offsets(); }

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }
};

}  // namespace dylora

#endif
