#ifndef DYLORA_LINALG_PRODUCT_HPP
#define DYLORA_LINALG_PRODUCT_HPP

#include <limits>
#include <type_traits>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/kernels/dot_products.hpp"
#include "dylora/linalg/kernels/gemm.hpp"

/// The library's only matrix products. Operands may be any Eigen matrix, block, map, or transpose of one, in either storage order: nothing
/// is copied. Define EIGEN_USE_BLAS to send every product through Eigen to the BLAS that you link (its bits then depend on that BLAS).
namespace dylora {

/// scale · left · right, of low rank: what an adapter adds to the output of a frozen weight, in the same pass over that output. Refers to
/// its factors; not to be copied where one of them was not column-major, since then it holds a temporary.
template <class S>
struct LowRankTerm {
  ConstMatrixRef<S> left;   // rows × rank, where a rank of 0 adds nothing
  ConstMatrixRef<S> right;  // rank × cols
  S scale = 1;

  /// Nothing, of the shape rows × cols.
  static LowRankTerm none(Index rows, Index cols) {
    return {Eigen::Map<const MatrixX<S>>(nullptr, rows, 0), Eigen::Map<const MatrixX<S>>(nullptr, 0, cols)};
  }
};

namespace detail {

template <class M>
Operand<typename M::Scalar> operand(const M& m) {
  return m.IsRowMajor ? Operand<typename M::Scalar>{m.data(), m.outerStride(), m.innerStride()}
                      : Operand<typename M::Scalar>{m.data(), m.innerStride(), m.outerStride()};
}

template <class D, class L, class R>
void require_product(const D& dst, const L& lhs, const R& rhs) {
  require_equal(lhs.rows(), dst.rows(), "product: rows of the left operand");
  require_equal(rhs.cols(), dst.cols(), "product: columns of the right operand");
  require_equal(rhs.rows(), lhs.cols(), "product: rows of the right operand");
  require_equal(dst.innerStride(), 1, "product: inner stride of the destination");
}

template <bool accumulate, class D, class L, class R, class S>
void multiply_into(D& dst, const L& lhs, const R& rhs, S scale) {
  require_product(dst, lhs, rhs);
  if (dst.size() == 0) return;
#ifdef EIGEN_USE_BLAS
  if constexpr (accumulate) {
    dst.noalias() += scale * lhs * rhs;
  } else {
    dst.noalias() = scale * lhs * rhs;
  }
#else
  if (lhs.cols() == 0) {
    if constexpr (!accumulate) dst.setZero();
    return;
  }
  const Initial<S> initial{accumulate ? dst.data() : nullptr, dst.outerStride()};
  if constexpr (D::IsRowMajor) {
    gemm<S>(dst.cols(), dst.rows(), {operand(rhs).transposed(), operand(lhs).transposed(), lhs.cols(), scale}, {}, initial, dst.data(),
            dst.outerStride());
  } else {
    gemm<S>(dst.rows(), dst.cols(), {operand(lhs), operand(rhs), lhs.cols(), scale}, {}, initial, dst.data(), dst.outerStride());
  }
#endif
}

template <class D, class L, class R, class S>
void require_affine(const D& dst, const L& lhs, const R& rhs, const LowRankTerm<S>& term) {
  require_product(dst, lhs, rhs);
  require_product(dst, term.left, term.right);
  require_in_range(lhs.cols(), 1, std::numeric_limits<Index>::max(), "product: columns of the left operand");
}

/// The term as gemm takes it along, or an empty one if it is too deep for that.
template <class S>
Product<S> taken_along(const LowRankTerm<S>& term) {
  const Index rank = term.left.cols();
  return rank > 0 && rank <= depth_block ? Product<S>{operand(term.left), operand(term.right), rank, term.scale} : Product<S>{};
}

}  // namespace detail

/// dst += scale · lhs · rhs.
///
/// dst is rows × cols with contiguous columns (or rows, if row-major), lhs rows × depth, rhs depth × cols; dst must not overlap either.
/// Same bits for any thread count, and each element depends on its own row of lhs and column of rhs only.
/// Throws ShapeError if the shapes do not fit, or dst is strided both ways (a row of a column-major matrix: write its transpose).
/// Costs 2·rows·cols·depth flops; no heap memory once this thread is warm.
template <class D, class L, class R>
void add_product(D&& dst, const L& lhs, const R& rhs, typename std::remove_cvref_t<D>::Scalar scale = 1) {
  detail::multiply_into<true>(dst, lhs, rhs, scale);
}

/// dst = scale · lhs · rhs; what dst held is never read. Otherwise as add_product.
template <class D, class L, class R>
void set_product(D&& dst, const L& lhs, const R& rhs, typename std::remove_cvref_t<D>::Scalar scale = 1) {
  detail::multiply_into<false>(dst, lhs, rhs, scale);
}

/// dst = scale · lhs · rhs where lhs has few rows and both run along the depth in memory, as in h = A x and dh = Bᵀ dy: faster than
/// set_product there, and the order of a sum is another one (linalg/kernels/dot_products.hpp), chosen by the number of rows and the depth
/// alone: an element depends on that number, its own row and its own column.
/// Operands in any other storage order are multiplied by set_product. Otherwise as add_product.
template <class D, class L, class R>
void set_dot_products(D&& dst, const L& lhs, const R& rhs, typename std::remove_cvref_t<D>::Scalar scale = 1) {
#ifndef EIGEN_USE_BLAS
  using Destination = std::remove_cvref_t<D>;
  if constexpr (L::IsRowMajor && !R::IsRowMajor && !Destination::IsRowMajor) {
    if (lhs.rows() <= detail::most_dot_rows && lhs.innerStride() == 1 && rhs.innerStride() == 1) {
      detail::require_product(dst, lhs, rhs);
      return detail::dot_products<typename Destination::Scalar>(dst.rows(), dst.cols(), lhs.cols(), scale, lhs.data(), lhs.outerStride(),
                                                                rhs.data(), rhs.outerStride(), dst.data(), dst.outerStride());
    }
  }
#endif
  set_product(dst, lhs, rhs, scale);
}

/// dst = bias + lhs · rhs + term, where bias is a column for every column of dst, or has no elements.
///
/// The bits of add_product with lhs and rhs and then with the factors of the term, on a dst that holds the bias; but one pass over dst does
/// all three. Throws std::invalid_argument if lhs has no column. Otherwise as add_product.
template <class S, class L>
void set_affine(MatrixRef<S> dst, const L& lhs, ConstMatrixRef<S> rhs, const Eigen::Ref<const VectorX<S>>& bias,
                const LowRankTerm<S>& term) {
  if (bias.size() > 0) require_equal(bias.size(), dst.rows(), "product: size of the bias");
#ifdef EIGEN_USE_BLAS
  set_product(dst, lhs, rhs);
  if (bias.size() > 0) dst.colwise() += bias;
  add_product(dst, term.left, term.right, term.scale);
#else
  detail::require_affine(dst, lhs, rhs, term);
  if (dst.size() == 0) return;
  const auto along = detail::taken_along(term);
  detail::gemm<S>(dst.rows(), dst.cols(), {detail::operand(lhs), detail::operand(rhs), lhs.cols(), S(1)}, along,
                  {bias.size() > 0 ? bias.data() : nullptr, 0}, dst.data(), dst.outerStride());
  if (along.depth == 0) add_product(dst, term.left, term.right, term.scale);
#endif
}

/// dst += lhs · rhs + term, as set_affine.
template <class S, class L>
void add_affine(MatrixRef<S> dst, const L& lhs, ConstMatrixRef<S> rhs, const LowRankTerm<S>& term) {
#ifdef EIGEN_USE_BLAS
  add_product(dst, lhs, rhs);
  add_product(dst, term.left, term.right, term.scale);
#else
  detail::require_affine(dst, lhs, rhs, term);
  if (dst.size() == 0) return;
  const auto along = detail::taken_along(term);
  detail::gemm<S>(dst.rows(), dst.cols(), {detail::operand(lhs), detail::operand(rhs), lhs.cols(), S(1)}, along,
                  {dst.data(), dst.outerStride()}, dst.data(), dst.outerStride());
  if (along.depth == 0) add_product(dst, term.left, term.right, term.scale);
#endif
}

}  // namespace dylora

#endif
