#ifndef DYLORA_LINALG_KERNELS_OPERAND_HPP
#define DYLORA_LINALG_KERNELS_OPERAND_HPP

#include "dylora/core/types.hpp"

/// What the kernels under product.hpp share: matrices as pointers and strides, the blocks of the depth, and memory to work in.
namespace dylora::detail {

/// A sum along the depth is one of partial sums, each over so much of it.
inline constexpr Index depth_block = 256;

/// A matrix in either storage order, transposed or not: element (i, j) is data[i · row_stride + j · col_stride].
template <class S>
struct Operand {
  const S* data;
  Index row_stride;
  Index col_stride;

  const S* at(Index row, Index col) const { return data + row * row_stride + col * col_stride; }
  Operand from(Index row, Index col) const { return {at(row, col), row_stride, col_stride}; }
  Operand transposed() const { return {data, col_stride, row_stride}; }
};

/// scale · lhs · rhs, `depth` deep.
template <class S>
struct Product {
  Operand<S> lhs;
  Operand<S> rhs;
  Index depth;
  S scale;

  /// What is left of it for the result from (row, col) on.
  Product from(Index row, Index col) const { return {lhs.from(row, 0), rhs.from(0, col), depth, scale}; }
};

/// What a result starts from: the result itself, one column for all (col_stride 0), or nothing (null).
template <class S>
struct Initial {
  const S* data;
  Index col_stride;

  Initial from(Index row, Index col) const { return data == nullptr ? *this : Initial{data + row + col * col_stride, col_stride}; }
};

inline Index round_up(Index n, Index unit) { return (n + unit - 1) / unit * unit; }

/// A thread's memory for panels and sums, kept between calls so that a product allocates nothing once warm. (A machine without even that
/// much memory ends the program: the first call of a thread may be inside a parallel region, which no exception can leave.)
template <class S>
S* scratch_memory(Index size) {
  thread_local VectorX<S> memory;
  if (memory.size() < size) memory.resize(size);
  return memory.data();
}

}  // namespace dylora::detail

#endif
