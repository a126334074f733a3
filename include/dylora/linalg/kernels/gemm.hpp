#ifndef DYLORA_LINALG_KERNELS_GEMM_HPP
#define DYLORA_LINALG_KERNELS_GEMM_HPP

#include <algorithm>

#include "dylora/core/types.hpp"
#include "dylora/linalg/kernels/few_columns.hpp"
#include "dylora/linalg/kernels/operand.hpp"
#include "dylora/linalg/kernels/simd.hpp"
#include "dylora/linalg/parallel.hpp"

/// The dense product under add_product, blocked after Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008):
/// a tile of the result stays in registers while it runs down the depth, over operands packed into panels where that pays.
///
/// Its promise: an output element is the sum over blocks of `depth_block` of that block's products added in order of depth. The order
/// depends on nothing else: not on the thread count, on the other rows and columns of the call, on storage order or alignment. So the
/// bits are the same for any number of threads, and a sample's result does not change with the batch it is computed in.
namespace dylora::detail {

/// A tile is so many vectors high and columns wide: enough sums to hide the latency of a multiply-add, no more than there are registers.
#if defined(__AVX512F__)
inline constexpr int tile_vectors = 3, tile_cols = 8;
#else
inline constexpr int tile_vectors = 2, tile_cols = 6;
#endif
template <class S>
inline constexpr Index tile_rows = tile_vectors * lanes<S>;

template <class S>
inline constexpr Index rows_block = 288 * 4 / static_cast<Index>(sizeof(S));  // a packed left block of at most 288 KiB stays in L2
inline constexpr Index cols_block = 1032;                                     // a multiple of tile_cols; its panels pass through L1

/// Some rows of the left operand as whole vectors: those of column k start at data + k · step.
template <class S>
struct LeftPanel {
  const S* data;
  Index step;
};

/// dst (vectors · lanes rows × tile_cols columns, `stride` apart) = initial + scale · lhs · rhs.
template <class S, int vectors>
void multiply_tile(Index depth, LeftPanel<S> lhs, Operand<S> rhs, S scale, Initial<S> initial, S* dst, Index stride) {
  Pack<S> sum[tile_cols][vectors];
  const S* factors[tile_cols];
#pragma GCC unroll 8
  for (int j = 0; j < tile_cols; ++j) {
    factors[j] = rhs.at(0, j);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      sum[j][v] = zero<S>();
      prefetch_for_write(dst + j * stride + v * lanes<S>);
    }
  }
  for (Index k = 0; k < depth; ++k) {
    Pack<S> column[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) column[v] = load(lhs.data + k * lhs.step + v * lanes<S>);
#pragma GCC unroll 8
    for (int j = 0; j < tile_cols; ++j) {
      const Pack<S> factor = broadcast<S>(factors[j][k * rhs.row_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[j][v] = multiply_add<S>(column[v], factor, sum[j][v]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < tile_cols; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const Index row = v * lanes<S>;
      const Pack<S> result = initial.data == nullptr
                                 ? sum[j][v] * scale
                                 : multiply_add<S>(sum[j][v], broadcast(scale), load(initial.data + j * initial.col_stride + row));
      store<S>(dst + j * stride + row, result);
    }
  }
}

/// The same for the `rows` × `cols` of a tile that hangs over the edge: through a buffer.
template <class S, int vectors>
void multiply_edge(Index rows, Index cols, Index depth, LeftPanel<S> lhs, Operand<S> rhs, S scale, Initial<S> initial, S* dst,
                   Index stride) {
  constexpr Index height = vectors * lanes<S>;
  alignas(vector_bytes) S tile[height * tile_cols] = {};
  if (initial.data != nullptr) {
    for (Index j = 0; j < cols; ++j) std::copy_n(initial.data + j * initial.col_stride, rows, tile + j * height);
    initial = {tile, height};
  }
  multiply_tile<S, vectors>(depth, lhs, rhs, scale, initial, tile, height);
  for (Index j = 0; j < cols; ++j) std::copy_n(tile + j * height, rows, dst + j * stride);
}

/// How many rows the tile from `row` on takes of those before `end`: as many vectors as a tile has, fewer at the end, and never so many
/// that a single one is left which could have shared with it. No tile lies across `boundary`.
template <class S>
Index next_height(Index row, Index boundary, Index end) {
  const Index rows = (row < boundary ? std::min(boundary, end) : end) - row, vectors = (rows + lanes<S> - 1) / lanes<S>;
  return (vectors == 4 && tile_vectors == 3 ? 2 : std::min<Index>(tile_vectors, vectors)) * lanes<S>;
}

/// Rows [row, row + rows) × depth [0, depth) of `from`, `step` elements from one depth to the next; what hangs over the rows is 0.
template <class S>
void pack_left(const Operand<S>& from, Index row, Index rows, Index depth, S* to, Index step) {
  const S* source = from.at(row, 0);
  if (rows < step) std::fill_n(to, step * depth, S(0));
  if (from.row_stride == 1 && rows == step) {
    for (Index p = 0; p < depth; ++p) {
      for (Index r = 0; r < rows; r += lanes<S>) store<S>(to + p * step + r, load(source + p * from.col_stride + r));
    }
  } else if (from.row_stride == 1) {
    for (Index p = 0; p < depth; ++p) std::copy_n(source + p * from.col_stride, rows, to + p * step);
  } else if (from.col_stride == 1) {
    transpose(rows, depth, source, from.row_stride, to, step);
  } else {
    for (Index p = 0; p < depth; ++p) {
      for (Index r = 0; r < rows; ++r) to[p * step + r] = source[r * from.row_stride + p * from.col_stride];
    }
  }
}

/// Depth [0, depth) × columns [col, col + cols) of `from`, each column contiguous and `depth_block` from the next; what hangs over the
/// columns up to a multiple of tile_cols is 0.
template <class S>
void pack_right(const Operand<S>& from, Index depth, Index col, Index cols, S* to) {
  const S* source = from.at(0, col);
  if (from.row_stride == 1) {
    for (Index c = 0; c < cols; ++c) std::copy_n(source + c * from.col_stride, depth, to + c * depth_block);
  } else if (from.col_stride == 1) {
    transpose(depth, cols, source, from.row_stride, to, depth_block);
  } else {
    for (Index c = 0; c < cols; ++c) {
      for (Index p = 0; p < depth; ++p) to[c * depth_block + p] = source[p * from.row_stride + c * from.col_stride];
    }
  }
  for (Index c = cols; c % tile_cols != 0; ++c) std::fill_n(to + c * depth_block, depth, S(0));
}

/// At most depth_block of the depth of a product, operands in place where that is as fast, else in packed panels.
template <class S>
struct Slab {
  Product<S> part;
  Index direct_rows, direct_cols;  // so many are read in place, whole vectors and tiles of them
  S* left;
  S* right;
  Index first_row = 0, first_col = 0;  // of the packed ones

  void pack_cols(Index begin, Index end) {
    first_col = std::clamp(direct_cols, begin, end);
    pack_right(part.rhs, part.depth, first_col, end - first_col, right);
  }

  void pack_rows(Index begin, Index boundary, Index end) {
    first_row = std::clamp(direct_rows, begin, end);
    for (Index row = first_row, height; row < end; row += height) {
      height = next_height<S>(row, boundary, end);
      pack_left(part.lhs, row, std::min(height, end - row), part.depth, left + (row - first_row) * part.depth, height);
    }
  }

  void multiply(Index row, Index rows, Index height, Index col, Index cols, Initial<S> initial, S* dst, Index stride) const {
    const LeftPanel<S> lhs = row < first_row ? LeftPanel<S>{part.lhs.at(row, 0), part.lhs.col_stride}
                                             : LeftPanel<S>{left + (row - first_row) * part.depth, height};
    const Operand<S> rhs = col < first_col ? part.rhs.from(0, col) : Operand<S>{right + (col - first_col) * depth_block, 1, depth_block};
    if (rows == height && cols == tile_cols) {
      switch (height / lanes<S>) {
        case 1: return multiply_tile<S, 1>(part.depth, lhs, rhs, part.scale, initial, dst, stride);
        case 2: return multiply_tile<S, 2>(part.depth, lhs, rhs, part.scale, initial, dst, stride);
        default: return multiply_tile<S, tile_vectors>(part.depth, lhs, rhs, part.scale, initial, dst, stride);
      }
    }
    switch (height / lanes<S>) {
      case 1: return multiply_edge<S, 1>(rows, cols, part.depth, lhs, rhs, part.scale, initial, dst, stride);
      case 2: return multiply_edge<S, 2>(rows, cols, part.depth, lhs, rhs, part.scale, initial, dst, stride);
      default: return multiply_edge<S, tile_vectors>(rows, cols, part.depth, lhs, rhs, part.scale, initial, dst, stride);
    }
  }
};

/// dst = initial + product + term on the calling thread; dst is column-major with unit row stride. The term, at most depth_block deep or
/// absent (depth 0), is added to a tile while it is still in L1: it costs its flops and no traffic.
///
/// The left operand is packed once per cols_block columns, unless it is contiguous along its columns and used once; the right one once,
/// unless it is contiguous along its columns or one tile wide. Packing memory: 1.3 MiB for float, 2.3 MiB for double, at most twice that
/// with a term. Traffic: lhs once per cols_block columns, rhs once and then from cache, dst once per depth_block of depth.
template <class S>
void gemm_serial(Index rows, Index cols, const Product<S>& product, const Product<S>& term, Initial<S> initial, S* dst, Index stride) {
  const Index whole_rows = rows / lanes<S> * lanes<S>, direct_rows = cols <= tile_cols && product.lhs.row_stride == 1 ? whole_rows : 0;
  const auto direct_cols = [&](const Operand<S>& rhs) {
    return rhs.row_stride == 1 || cols == tile_cols ? cols / tile_cols * tile_cols : 0;
  };
  const Index row_blocks = (rows + rows_block<S> - 1) / rows_block<S>;  // of equal size: a small last one would be slow
  const Index row_block = round_up((rows + row_blocks - 1) / row_blocks, lanes<S>),
              col_block = std::min(cols_block, round_up(cols, tile_cols));
  const Index left = row_block * std::min(product.depth, depth_block), right = col_block * depth_block;
  S* memory = scratch_memory<S>(left + right + (term.depth > 0 ? row_block * term.depth + right : 0));
  for (Index j = 0; j < cols; j += col_block) {
    const Index last_col = std::min(cols, j + col_block);
    for (Index k = 0; k < product.depth; k += depth_block) {
      const Index depth = std::min(depth_block, product.depth - k);
      Slab<S> slabs[] = {{{product.lhs.from(0, k), product.rhs.from(k, 0), depth, product.scale},
                          direct_rows,
                          direct_cols(product.rhs),
                          memory,
                          memory + left},
                         {term, 0, direct_cols(term.rhs), memory + left + right, memory + left + right + row_block * term.depth}};
      const int count = term.depth > 0 && k + depth == product.depth ? 2 : 1;
      for (int s = 0; s < count; ++s) slabs[s].pack_cols(j, last_col);
      for (Index i = 0; i < rows; i += row_block) {
        const Index last_row = std::min(rows, i + row_block);
        for (int s = 0; s < count; ++s) slabs[s].pack_rows(i, direct_rows, last_row);
        for (Index col = j; col < last_col; col += tile_cols) {
          for (Index row = i, height; row < last_row; row += height) {
            height = next_height<S>(row, direct_rows, last_row);
            S* tile = dst + row + col * stride;
            for (int s = 0; s < count; ++s) {
              const Initial<S> start = k == 0 && s == 0 ? initial.from(row, col) : Initial<S>{tile, stride};
              slabs[s].multiply(row, std::min(height, last_row - row), height, col, std::min<Index>(tile_cols, last_col - col), start, tile,
                                stride);
            }
          }
        }
      }
    }
  }
}

/// The same, where there are few columns and the left operands are contiguous along rows or columns.
template <class S>
void gemv_serial(Index rows, Index cols, const Product<S>& product, const Product<S>& term, Initial<S> initial, S* dst, Index stride) {
  const auto multiply = cols == 1 ? multiply_few_columns<S, 1> : multiply_few_columns<S, most_few_columns>;
  multiply(rows, cols, product, initial, dst, stride);
  if (term.depth > 0) multiply(rows, cols, term, {dst, stride}, dst, stride);
}

/// dst = initial + product + term, split over threads along dst's longer side. 2 · rows · cols · (depth + depth of the term) flops.
template <class S>
void gemm(Index rows, Index cols, const Product<S>& product, const Product<S>& term, Initial<S> initial, S* dst, Index stride) {
  const auto contiguous = [](const Product<S>& p) { return p.depth == 0 || p.lhs.row_stride == 1 || p.lhs.col_stride == 1; };
  const bool few = cols <= most_few_columns && contiguous(product) && contiguous(term);
  const auto serial = few ? gemv_serial<S> : gemm_serial<S>;
  const double work = static_cast<double>(rows) * static_cast<double>(cols) * static_cast<double>(product.depth + term.depth);
  if (rows >= cols) {
    for_each_range(rows, few ? 2 * lanes<S> : tile_rows<S>, work, [&](Index begin, Index end) {
      serial(end - begin, cols, product.from(begin, 0), term.from(begin, 0), initial.from(begin, 0), dst + begin, stride);
    });
  } else {
    for_each_range(cols, tile_cols, work, [&](Index begin, Index end) {
      serial(rows, end - begin, product.from(0, begin), term.from(0, begin), initial.from(0, begin), dst + begin * stride, stride);
    });
  }
}

}  // namespace dylora::detail

#endif
