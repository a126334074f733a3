#ifndef DYLORA_LINALG_KERNELS_DOT_PRODUCTS_HPP
#define DYLORA_LINALG_KERNELS_DOT_PRODUCTS_HPP

#include <algorithm>

#include "dylora/core/types.hpp"
#include "dylora/linalg/kernels/simd.hpp"
#include "dylora/linalg/parallel.hpp"

/// Products whose operands are both contiguous along the depth: with few rows, h = A x and dh = Bᵀ dy of a low-rank adapter; and column by
/// column.
///
/// gemm puts rows into the lanes of a vector, so with one row it would waste all but one of them. Here the lanes run along the depth, and a
/// sum over the lanes ends each element. An element is the sum in order of depth within each lane, then of the lanes in halves: the order
/// depends on the depth alone.
namespace dylora::detail {

/// Above so many rows gemm is as fast, and reads the right operand once instead of once for every four rows.
inline constexpr Index most_dot_rows = 16;

/// Sums that a tile keeps in registers: it has as many columns as make so many with its rows.
#if defined(__AVX512F__)
inline constexpr int dot_sums = 16;
#else
inline constexpr int dot_sums = 8;
#endif

/// dst[i] = Σ a_i ∘ b_i for each of `count` columns of `size` elements. 2 · size · count flops.
template <class S>
void column_dot_products(Index size, Index count, const S* a, Index a_stride, const S* b, Index b_stride, S* dst) {
  for (Index i = 0; i < count; i += lanes<S>) {
    const Index used = std::min<Index>(lanes<S>, count - i);
    Pack<S> sums[lanes<S>];
    for (int c = 0; c < lanes<S>; ++c) {
      sums[c] = zero<S>();
      const Index column = i + std::min<Index>(c, used - 1);
      for (Index k = 0; k < size; k += lanes<S>) {
        const Index some = std::min<Index>(lanes<S>, size - k);
        sums[c] = multiply_add<S>(load_some(a + column * a_stride + k, some), load_some(b + column * b_stride + k, some), sums[c]);
      }
    }
    store_some<S>(dst + i, sums_of_lanes<S>(sums), used);
  }
}

/// dst = scale · lhs · rhs for `rows` rows and `used` columns, at most those of a tile: rows of lhs and columns of rhs contiguous, the
/// strides between them.
template <class S, int rows>
void dot_tile(Index used, Index depth, const S* lhs, Index lhs_stride, const S* rhs, Index rhs_stride, S scale, S* dst, Index stride) {
  constexpr int cols = dot_sums / rows, n = lanes<S>, groups = (rows * cols + n - 1) / n;
  const S* column[cols];
  for (int c = 0; c < cols; ++c) column[c] = rhs + std::min<Index>(c, used - 1) * rhs_stride;
  Pack<S> sum[groups][n];  // of element (r, c) at r + c · rows
#pragma GCC unroll 8
  for (auto& group : sum) {
#pragma GCC unroll 16
    for (auto& pack : group) pack = zero<S>();
  }
  const auto accumulate = [&](const auto& read) {
    Pack<S> row[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) row[r] = read(lhs + r * lhs_stride);
#pragma GCC unroll 16
    for (int c = 0; c < cols; ++c) {
      const Pack<S> factor = read(column[c]);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        Pack<S>& to = sum[(r + c * rows) / n][(r + c * rows) % n];
        to = multiply_add<S>(row[r], factor, to);
      }
    }
  };
  const Index whole = depth / n * n;
  for (Index k = 0; k < whole; k += n) accumulate([&](const S* from) { return load(from + k); });
  if (whole < depth) accumulate([&](const S* from) { return load_some(from + whole, depth - whole); });
  S elements[groups * n];
#pragma GCC unroll 8
  for (int group = 0; group < groups; ++group) store<S>(elements + group * n, sums_of_lanes<S>(sum[group]) * scale);
  for (Index c = 0; c < used; ++c) std::copy_n(elements + c * rows, rows, dst + c * stride);
}

/// dst = scale · lhs · rhs, split over threads along the columns. 2 · rows · cols · depth flops; reads rhs once, lhs from cache.
template <class S>
void dot_products(Index rows, Index cols, Index depth, S scale, const S* lhs, Index lhs_stride, const S* rhs, Index rhs_stride, S* dst,
                  Index stride) {
  const double work = static_cast<double>(rows) * static_cast<double>(cols) * static_cast<double>(depth);
  for_each_range(cols, dot_sums, work, [&](Index begin, Index end) {
    for (Index strip = begin; strip < end; strip += dot_sums) {  // so many columns stay in cache from one tile of rows to the next
      const Index last = std::min(end, strip + dot_sums);
      for (Index row = 0, height; row < rows; row += height) {
        height = rows - row >= 4 ? 4 : rows - row >= 2 ? 2 : 1;
        const auto tile = height == 4 ? dot_tile<S, 4> : height == 2 ? dot_tile<S, 2> : dot_tile<S, 1>;
        const Index width = dot_sums / height;
        for (Index col = strip; col < last; col += width) {
          tile(std::min(width, last - col), depth, lhs + row * lhs_stride, lhs_stride, rhs + col * rhs_stride, rhs_stride, scale,
               dst + row + col * stride, stride);
        }
      }
    }
  });
}

}  // namespace dylora::detail

#endif
