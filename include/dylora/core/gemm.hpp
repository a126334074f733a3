#ifndef DYLORA_CORE_GEMM_HPP
#define DYLORA_CORE_GEMM_HPP

#include <algorithm>
#include <cstring>

#include "dylora/core/parallel.hpp"
#include "dylora/core/types.hpp"

/// The dense product under add_product, blocked after Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008):
/// a tile of the result stays in registers while it runs down the depth, over operands packed into panels where that pays.
///
/// Its promise: an output element is the sum over blocks of `depth_block` of that block's products added in order of depth. The order
/// depends on nothing else: not on the thread count, on the other rows and columns of the call, on storage order or alignment. So the
/// bits are the same for any number of threads, and a sample's result does not change with the batch it is computed in.
namespace dylora::detail {

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64, tile_vectors = 3, tile_cols = 8;
#elif defined(__AVX__)
inline constexpr int vector_bytes = 32, tile_vectors = 2, tile_cols = 6;
#else
inline constexpr int vector_bytes = 16, tile_vectors = 2, tile_cols = 6;
#endif

template <class S>
inline constexpr int lanes = vector_bytes / static_cast<int>(sizeof(S));
template <class S>
inline constexpr Index tile_rows = tile_vectors * lanes<S>;

inline constexpr Index depth_block = 256;
template <class S>
inline constexpr Index rows_block = 5 * tile_rows<S>;  // a packed left block of at most 240 KiB stays in L2
inline constexpr Index cols_block = 480;               // a multiple of every tile_cols; a packed right block of at most 960 KiB

inline Index round_up(Index n, Index unit) { return (n + unit - 1) / unit * unit; }

/// One vector register.
#if defined(__GNUC__)
template <class S>
using Pack [[gnu::vector_size(vector_bytes)]] = S;
#else
template <class S>
using Pack = Eigen::Array<S, lanes<S>, 1>;
#endif

template <class S>
Pack<S> zero() {
#if defined(__GNUC__)
  return Pack<S>{};
#else
  return Pack<S>::Zero();
#endif
}

template <class S>
Pack<S> load(const S* from) {
  Pack<S> pack;
  std::memcpy(&pack, from, sizeof pack);
  return pack;
}

template <class S>
void store(S* to, const Pack<S>& pack) {
  std::memcpy(to, &pack, sizeof pack);
}

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

/// Some rows of the left operand as whole vectors: those of column k start at data + k · step.
template <class S>
struct LeftPanel {
  const S* data;
  Index step;
};

/// tile_cols columns of the right operand: element k of column j is columns[j][k · step].
template <class S, Index step>
struct RightPanel {
  const S* columns[tile_cols];
};

/// dst (vectors · lanes rows × tile_cols columns, `stride` apart) = [dst +] scale · lhs · rhs.
template <class S, int vectors, bool accumulate, Index step>
void multiply_tile(Index depth, LeftPanel<S> lhs, RightPanel<S, step> rhs, S scale, S* dst, Index stride) {
  Pack<S> sum[tile_cols][vectors];
#pragma GCC unroll 8
  for (auto& column : sum) {
#pragma GCC unroll 8
    for (auto& pack : column) pack = zero<S>();
  }
  for (Index k = 0; k < depth; ++k) {
    Pack<S> column[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) column[v] = load(lhs.data + k * lhs.step + v * lanes<S>);
#pragma GCC unroll 8
    for (int j = 0; j < tile_cols; ++j) {
      const S factor = rhs.columns[j][k * step];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[j][v] += column[v] * factor;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < tile_cols; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      S* to = dst + j * stride + v * lanes<S>;
      if constexpr (accumulate) {
        store<S>(to, load(to) + sum[j][v] * scale);
      } else {
        store<S>(to, sum[j][v] * scale);
      }
    }
  }
}

/// Copies rows [row, row + rows) × depth [k, k + depth) of `from` to panels of `width` rows, each contiguous along the depth; the last is
/// padded with zeros to a multiple of `unit` rows and is only as wide as that.
template <Index width, Index unit, class S>
void pack_panels(const Operand<S>& from, Index row, Index rows, Index k, Index depth, S* to) {
  for (Index i = 0; i < rows; i += width) {
    const Index used = std::min(width, rows - i), padded = round_up(used, unit);
    const S* source = from.at(row + i, k);
    if (used < padded) std::fill_n(to, padded * depth, S(0));
    if (from.row_stride == 1) {
      for (Index p = 0; p < depth; ++p) std::copy_n(source + p * from.col_stride, used, to + p * padded);
    } else {
      for (Index r = 0; r < used; ++r) {
        const S* line = source + r * from.row_stride;
        for (Index p = 0; p < depth; ++p) to[p * padded + r] = line[p * from.col_stride];
      }
    }
    to += padded * depth;
  }
}

/// A thread's packing memory, at most 1.2 MiB, kept between calls so that a product allocates nothing once warm. (A machine without
/// even that much memory ends the program: the first call of a thread may be inside a parallel region, which no exception can leave.)
template <class S>
struct PackingMemory {
  Vector<S> left, right;

  static PackingMemory& of_this_thread(Index rows, Index cols, Index depth) {
    thread_local PackingMemory memory;
    depth = std::min(depth, depth_block);
    const Index left = std::min(rows_block<S>, round_up(rows, lanes<S>)) * depth;
    const Index right = std::min(cols_block, round_up(cols, tile_cols)) * depth;
    if (memory.left.size() < left) memory.left.resize(left);
    if (memory.right.size() < right) memory.right.resize(right);
    return memory;
  }
};

/// One tile of dst, `rows` × `cols` of it wanted: through a buffer where the tile hangs over the edge.
template <class S, int vectors, bool accumulate, Index step>
void multiply_edge(Index rows, Index cols, Index depth, LeftPanel<S> lhs, const RightPanel<S, step>& rhs, S scale, S* dst, Index stride) {
  constexpr Index height = vectors * lanes<S>;
  if (rows == height && cols == tile_cols) return multiply_tile<S, vectors, accumulate>(depth, lhs, rhs, scale, dst, stride);
  alignas(vector_bytes) S tile[height * tile_cols] = {};
  for (Index j = 0; accumulate && j < cols; ++j) std::copy_n(dst + j * stride, rows, tile + j * height);
  multiply_tile<S, vectors, accumulate>(depth, lhs, rhs, scale, tile, height);
  for (Index j = 0; j < cols; ++j) std::copy_n(tile + j * height, rows, dst + j * stride);
}

/// All tiles of one block of rows under one right panel. `left` gives the panel of the tile that starts at row i.
template <class S, bool accumulate, Index step, class Left>
void multiply_column(Index rows, Index cols, Index depth, const Left& left, const RightPanel<S, step>& rhs, S scale, S* dst, Index stride) {
  for (Index i = 0; i < rows; i += tile_rows<S>) {
    const Index tall = std::min(tile_rows<S>, rows - i);
    const auto multiply = [&]<int vectors>() {
      multiply_edge<S, vectors, accumulate>(tall, cols, depth, left(i), rhs, scale, dst + i, stride);
    };
    switch ((tall + lanes<S> - 1) / lanes<S>) {
      case 1: multiply.template operator()<1>(); break;
      case 2: multiply.template operator()<2>(); break;
      default: multiply.template operator()<tile_vectors>();
    }
  }
}

/// dst = [dst +] scale · lhs · rhs on the calling thread; dst is column-major with unit row stride.
///
/// The left operand is packed unless a panel of it is used only once, the right one unless its columns are contiguous and read few times.
template <class S>
void gemm_serial(Index rows, Index cols, Index depth, S scale, const Operand<S>& lhs, const Operand<S>& rhs, S* dst, Index stride,
                 bool accumulate) {
  const bool direct_left = lhs.row_stride == 1 && rows % lanes<S> == 0 && cols <= tile_cols;
  const bool direct_right = rhs.row_stride == 1 && rows <= 2 * rows_block<S>;
  PackingMemory<S>& memory = PackingMemory<S>::of_this_thread(direct_left ? 0 : rows, direct_right ? 0 : cols, depth);
  for (Index j = 0; j < cols; j += cols_block) {
    const Index wide = std::min(cols_block, cols - j);
    for (Index k = 0; k < depth; k += depth_block) {
      const Index deep = std::min(depth_block, depth - k);
      if (!direct_right) pack_panels<tile_cols, tile_cols>(rhs.transposed(), j, wide, k, deep, memory.right.data());
      for (Index i = 0; i < rows; i += rows_block<S>) {
        const Index tall = std::min(rows_block<S>, rows - i);
        if (!direct_left) pack_panels<tile_rows<S>, lanes<S>>(lhs, i, tall, k, deep, memory.left.data());
        const auto left = [&](Index row) -> LeftPanel<S> {
          if (direct_left) return {lhs.at(i + row, k), lhs.col_stride};
          return {memory.left.data() + row * deep, round_up(std::min(tile_rows<S>, tall - row), lanes<S>)};
        };
        const auto multiply = [&]<bool add, Index step>(Index col, const RightPanel<S, step>& right) {
          multiply_column<S, add>(tall, std::min<Index>(tile_cols, wide - col), deep, left, right, scale, dst + i + (j + col) * stride,
                                  stride);
        };
        for (Index col = 0; col < wide; col += tile_cols) {
          const auto run = [&]<Index step>(const RightPanel<S, step>& right) {
            accumulate || k > 0 ? multiply.template operator()<true>(col, right) : multiply.template operator()<false>(col, right);
          };
          if (direct_right) {
            RightPanel<S, 1> right;
            for (Index c = 0; c < tile_cols; ++c) right.columns[c] = rhs.at(k, j + std::min(col + c, wide - 1));
            run(right);
          } else {
            RightPanel<S, tile_cols> right;
            for (Index c = 0; c < tile_cols; ++c) right.columns[c] = memory.right.data() + col * deep + c;
            run(right);
          }
        }
      }
    }
  }
}

/// dst = [dst +] scale · lhs · rhs, split over threads along dst's longer side. 2 · rows · cols · depth flops.
template <class S>
void gemm(Index rows, Index cols, Index depth, S scale, const Operand<S>& lhs, const Operand<S>& rhs, S* dst, Index stride,
          bool accumulate) {
  const double work = static_cast<double>(rows) * static_cast<double>(cols) * static_cast<double>(depth);
  if (rows >= cols) {
    for_each_range(rows, tile_rows<S>, work, [&](Index begin, Index end) {
      gemm_serial(end - begin, cols, depth, scale, lhs.from(begin, 0), rhs, dst + begin, stride, accumulate);
    });
  } else {
    for_each_range(cols, tile_cols, work, [&](Index begin, Index end) {
      gemm_serial(rows, end - begin, depth, scale, lhs, rhs.from(0, begin), dst + begin * stride, stride, accumulate);
    });
  }
}

}  // namespace dylora::detail

#endif
