#ifndef DYLORA_METHODS_DORA_SCALING_HPP
#define DYLORA_METHODS_DORA_SCALING_HPP

#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/buffer.hpp"
#include "dylora/linalg/kernels/simd.hpp"
#include "dylora/linalg/parallel.hpp"

/// y = bias + diag(m / n) P over a batch, where the length m and the norm n of each row depend on the rank of the column, and without a
/// rank there is nothing to scale. `scales` holds m / n and `norms` n, those at rank b in column b − 1. Threads share the rows, so that the
/// sum along a row is one thread's and has one order.
namespace dylora::detail {

/// Calls f(row, column, count) for each vector register of the columns [begin, begin + cols) of so many rows, the columns of a row in
/// order.
template <class S, class F>
void for_each_pack(Index rows, Index begin, Index cols, const F& f) {
  const double work = 4 * static_cast<double>(rows) * static_cast<double>(cols);  // memory is what takes time, arithmetic is not
  for_each_range(rows, 4 * lanes<S>, work, [&](Index first, Index last) {
    const Index whole = first + (last - first) / lanes<S> * lanes<S>;
    for (Index j = begin; j < begin + cols; ++j) {
      for (Index i = first; i < whole; i += lanes<S>) f(i, j, Index{lanes<S>});
      if (whole < last) f(whole, j, last - whole);
    }
  });
}

/// values /= norms, where a norm of 0 gives 0: such a row has no direction.
template <class S>
void divide_rows(MatrixRef<S> values, ConstMatrixRef<S> norms) {
  values = (norms.array() == 0).select(S(0), values.array() / norms.array());
}

/// unscaled = source − bias, y += (scales − 1) ∘ unscaled: where y is source, it becomes bias + scales ∘ unscaled, and a scale of 1 leaves
/// it as it was. Columns without a rank are left alone. `unscaled` may have no rows, and then is not written; it may be the source, as y
/// may.
template <class S>
void scale_rows(const BatchRanks& ranks, ConstMatrixRef<S> source, const VectorX<S>& bias, ConstMatrixRef<S> scales, MatrixRef<S> unscaled,
                MatrixRef<S> y) {
  const bool keep = unscaled.rows() > 0;
  ranks.for_each_run(y.cols(), [&](Index begin, Index cols, RankSlice rank) {
    if (rank.active == 0) return;
    const S* const factors = scales.col(rank.active - 1).data();
    for_each_pack<S>(y.rows(), begin, cols, [&](Index i, Index j, Index count) {
      const Pack<S> p = load_some(source.data() + j * source.outerStride() + i, count) - load_some(bias.data() + i, count);
      if (keep) store_some<S>(unscaled.data() + j * unscaled.outerStride() + i, p, count);
      S* const to = y.data() + j * y.outerStride() + i;
      store_some<S>(to, multiply_add<S>(load_some(factors + i, count) - broadcast(S(1)), p, load_some<S>(to, count)), count);
    });
  });
}

/// scaled = scales ∘ dy, and what each run of ranks adds to the gradient of its lengths: dm = Σ dy ∘ unscaled / n over its columns, out ×
/// runs, undefined where a run has no rank.
template <class S>
void scale_rows_backward(const BatchRanks& ranks, ConstMatrixRef<S> dy, ConstMatrixRef<S> unscaled, ConstMatrixRef<S> norms,
                         ConstMatrixRef<S> scales, MatrixRef<S> scaled, Buffer<S>& dm) {
  Index runs = 0, run = 0;
  ranks.for_each_run(dy.cols(), [&](Index, Index, RankSlice) { ++runs; });
  auto sums = dm.resize(dy.rows(), runs);
  ranks.for_each_run(dy.cols(), [&](Index begin, Index cols, RankSlice rank) {
    S* const sum = sums.col(run++).data();
    if (rank.active == 0) {
      scaled.middleCols(begin, cols) = dy.middleCols(begin, cols);
      return;
    }
    const S* const factors = scales.col(rank.active - 1).data();
    for_each_pack<S>(dy.rows(), begin, cols, [&](Index i, Index j, Index count) {
      const Pack<S> g = load_some(dy.data() + j * dy.outerStride() + i, count);
      store_some<S>(scaled.data() + j * scaled.outerStride() + i, load_some(factors + i, count) * g, count);
      const Pack<S> before = j == begin ? zero<S>() : load_some<S>(sum + i, count);
      store_some<S>(sum + i, multiply_add<S>(g, load_some(unscaled.data() + j * unscaled.outerStride() + i, count), before), count);
    });
    divide_rows<S>(sums.col(run - 1), norms.col(rank.active - 1));
  });
}

}  // namespace dylora::detail

#endif
