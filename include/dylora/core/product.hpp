#ifndef DYLORA_CORE_PRODUCT_HPP
#define DYLORA_CORE_PRODUCT_HPP

#include <type_traits>

#include "dylora/core/error.hpp"
#include "dylora/core/gemm.hpp"
#include "dylora/core/types.hpp"

/// The library's only matrix product. Operands may be any Eigen matrix, block, map, or transpose of one, in either storage order: nothing
/// is copied. Define EIGEN_USE_BLAS to send every product through Eigen to the BLAS that you link (its bits then depend on that BLAS).
namespace dylora {

namespace detail {

template <class M>
Operand<typename M::Scalar> operand(const M& m) {
  return m.IsRowMajor ? Operand<typename M::Scalar>{m.data(), m.outerStride(), m.innerStride()}
                      : Operand<typename M::Scalar>{m.data(), m.innerStride(), m.outerStride()};
}

template <bool accumulate, class D, class L, class R, class S>
void multiply_into(D& dst, const L& lhs, const R& rhs, S scale) {
  require_equal(lhs.rows(), dst.rows(), "product: rows of the left operand");
  require_equal(rhs.cols(), dst.cols(), "product: columns of the right operand");
  require_equal(rhs.rows(), lhs.cols(), "product: rows of the right operand");
  require_equal(dst.innerStride(), 1, "product: inner stride of the destination");
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
  if constexpr (D::IsRowMajor) {
    gemm<S>(dst.cols(), dst.rows(), lhs.cols(), scale, operand(rhs).transposed(), operand(lhs).transposed(), dst.data(), dst.outerStride(),
            accumulate);
  } else {
    gemm<S>(dst.rows(), dst.cols(), lhs.cols(), scale, operand(lhs), operand(rhs), dst.data(), dst.outerStride(), accumulate);
  }
#endif
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

}  // namespace dylora

#endif
