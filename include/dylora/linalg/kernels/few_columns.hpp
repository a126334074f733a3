#ifndef DYLORA_LINALG_KERNELS_FEW_COLUMNS_HPP
#define DYLORA_LINALG_KERNELS_FEW_COLUMNS_HPP

#include <algorithm>

#include "dylora/core/types.hpp"
#include "dylora/linalg/kernels/operand.hpp"
#include "dylora/linalg/kernels/simd.hpp"

/// Products with so few columns that reading the left operand is all the work: a token or a few through a weight, and dB = dy hᵀ at a low
/// rank. Each element of the left operand is read once, along the memory, and nothing is packed; 2 · rows · columns · depth flops, where 2
/// and 3 columns count as 4. The order of a sum is that of gemm.
namespace dylora::detail {

inline constexpr Index most_few_columns = 4;

/// The columns of the right operand; where it has fewer than `columns`, the last again.
template <class S, int columns>
struct Factors {
  const S* column[columns];
  Index step;

  Factors(const Operand<S>& rhs, Index cols) : step(rhs.row_stride) {
    for (Index c = 0; c < columns; ++c) column[c] = rhs.at(0, std::min(c, cols - 1));
  }

  S operator()(Index k, int c) const { return column[c][k * step]; }
};

/// dst = initial + scale · sum for `rows` rows of one column, at most a vector of them.
template <class S>
void finish(const Pack<S>& sum, Index rows, S scale, const S* initial, S* dst) {
  const Pack<S> result = initial == nullptr ? sum * scale : multiply_add<S>(sum, broadcast(scale), load_some(initial, rows));
  store_some<S>(dst, result, rows);
}

/// sums[c] += columns k to k + count − 1 of lhs, times their factors, for rows [0, rows) of a chunk; sums of a column are `stride` apart.
template <class S, int columns, int count>
void add_columns(const Operand<S>& lhs, Index rows, const Factors<S, columns>& factors, Index k, S* sums, Index stride) {
  S factor[columns][count];
  for (int c = 0; c < columns; ++c) {
    for (int p = 0; p < count; ++p) factor[c][p] = factors(k + p, c);
  }
  Index row = 0;
  for (; row + lanes<S> <= rows; row += lanes<S>) {
    Pack<S> column[count];
#pragma GCC unroll 8
    for (int p = 0; p < count; ++p) column[p] = load(lhs.at(row, p));
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) {
      Pack<S> sum = load(sums + c * stride + row);
#pragma GCC unroll 8
      for (int p = 0; p < count; ++p) sum = multiply_add<S>(column[p], broadcast(factor[c][p]), sum);
      store<S>(sums + c * stride + row, sum);
    }
  }
  if (row == rows) return;
  for (int p = 0; p < count; ++p) {
    const Pack<S> column = load_some(lhs.at(row, p), rows - row);
    for (int c = 0; c < columns; ++c)
      store<S>(sums + c * stride + row, multiply_add<S>(column, broadcast(factor[c][p]), load(sums + c * stride + row)));
  }
}

/// Where columns of lhs are contiguous: down some of them at a time, the sums in cache.
template <class S, int columns>
void multiply_along_columns(Index rows, Index cols, const Product<S>& product, Initial<S> initial, S* dst, Index stride) {
  constexpr Index chunk = 2048;
  const Factors<S, columns> factors(product.rhs, cols);
  const Index sum_stride = std::min(chunk, round_up(rows, lanes<S>));
  S* sums = scratch_memory<S>(columns * sum_stride);
  for (Index row = 0; row < rows; row += chunk) {
    const Index tall = std::min(chunk, rows - row);
    for (Index k = 0; k < product.depth; k += depth_block) {
      const Index end = std::min(product.depth, k + depth_block);
      std::fill_n(sums, columns * sum_stride, S(0));
      Index p = k;
      for (; p + 8 <= end; p += 8) add_columns<S, columns, 8>(product.lhs.from(row, p), tall, factors, p, sums, sum_stride);
      for (; p < end; ++p) add_columns<S, columns, 1>(product.lhs.from(row, p), tall, factors, p, sums, sum_stride);
      for (Index c = 0; c < cols; ++c) {
        S* column = dst + row + c * stride;
        const Initial<S> start = k == 0 ? initial.from(row, c) : Initial<S>{column, stride};
        for (Index r = 0; r < tall; r += lanes<S>) {
          finish<S>(load(sums + c * sum_stride + r), std::min<Index>(lanes<S>, tall - r), product.scale,
                    start.data == nullptr ? nullptr : start.data + r, column + r);
        }
      }
    }
  }
}

/// Columns k to k + lanes − 1 of a vector of rows of lhs, rows contiguous, times their factors, are added to a sum for each column of the
/// result: turned in registers.
///
/// Not inlined: between two of these the compiler would keep all factors in registers, and spill everything else.
template <class S, int columns>
[[gnu::noinline]] void add_rows(const Operand<S>& lhs, const Factors<S, columns>& factors, Index k, Pack<S> (&sums)[columns]) {
  Pack<S> square[lanes<S>];
#pragma GCC unroll 16
  for (int r = 0; r < lanes<S>; ++r) {
    square[r] = load(lhs.at(r, k));
    prefetch(lhs.at(r, k), 2 * vector_bytes);  // so many rows at a time are more than the machine foresees by itself
  }
  transpose_registers<S>(square);
#pragma GCC unroll 16
  for (int p = 0; p < lanes<S>; ++p) {
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) sums[c] = multiply_add<S>(square[p], broadcast(factors(k + p, c)), sums[c]);
  }
}

/// The same for `rows` rows and `count` columns, fewer than a vector has lanes.
template <class S, int columns>
void add_some_rows(const Operand<S>& lhs, Index rows, Index count, const Factors<S, columns>& factors, Index k, Pack<S> (&sums)[columns]) {
  for (Index p = 0; p < count; ++p) {
    S column[lanes<S>] = {};
    for (Index r = 0; r < rows; ++r) column[r] = *lhs.at(r, k + p);
    for (int c = 0; c < columns; ++c) sums[c] = multiply_add<S>(load(column), broadcast(factors(k + p, c)), sums[c]);
  }
}

/// Where rows of lhs are contiguous: along two vectors of rows at a time. With one, and one column, each multiply-add would wait for the
/// one before it.
template <class S, int columns>
void multiply_along_rows(Index rows, Index cols, const Product<S>& product, Initial<S> initial, S* dst, Index stride) {
  constexpr Index vectors = 2, height = vectors * lanes<S>;
  const Factors<S, columns> factors(product.rhs, cols);
  for (Index row = 0; row < rows; row += height) {
    const auto used = [&](Index v) { return std::clamp<Index>(rows - row - v * lanes<S>, 0, lanes<S>); };
    const Operand<S> lhs[vectors] = {product.lhs.from(row, 0), product.lhs.from(std::min(row + lanes<S>, rows - 1), 0)};
    for (Index k = 0; k < product.depth; k += depth_block) {
      const Index end = std::min(product.depth, k + depth_block);
      Pack<S> sums[vectors][columns];
      for (auto& vector : sums) {
        for (auto& pack : vector) pack = zero<S>();
      }
      for (Index p = k; p < end; p += lanes<S>) {
        const Index count = std::min<Index>(lanes<S>, end - p);
        for (Index v = 0; v < vectors; ++v) {
          if (used(v) == lanes<S> && count == lanes<S>) {
            add_rows<S, columns>(lhs[v], factors, p, sums[v]);
          } else {
            add_some_rows<S, columns>(lhs[v], used(v), count, factors, p, sums[v]);
          }
        }
      }
      for (Index v = 0; v < vectors && used(v) > 0; ++v) {
        for (Index c = 0; c < cols; ++c) {
          S* column = dst + row + v * lanes<S> + c * stride;
          const Initial<S> start = k == 0 ? initial.from(row + v * lanes<S>, c) : Initial<S>{column, stride};
          finish<S>(sums[v][c], used(v), product.scale, start.data, column);
        }
      }
    }
  }
}

/// dst = initial + product for at most most_few_columns columns, where the left operand is contiguous along its rows or columns.
template <class S, int columns>
void multiply_few_columns(Index rows, Index cols, const Product<S>& product, Initial<S> initial, S* dst, Index stride) {
  const auto multiply = product.lhs.row_stride == 1 ? multiply_along_columns<S, columns> : multiply_along_rows<S, columns>;
  multiply(rows, cols, product, initial, dst, stride);
}

}  // namespace dylora::detail

#endif
