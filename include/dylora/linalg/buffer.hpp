#ifndef DYLORA_LINALG_BUFFER_HPP
#define DYLORA_LINALG_BUFFER_HPP

#include <algorithm>

#include "dylora/core/types.hpp"
#include "dylora/linalg/parallel.hpp"

namespace dylora {

/// A matrix whose memory only grows: what caches and workspaces are made of.
///
/// In a training loop the rank and the batch change from step to step; an Eigen matrix would allocate at each change, this does so only
/// when a shape needs more room than any before it. The elements are contiguous and column-major, whatever the shape.
template <class S>
class Buffer {
 public:
  using View = Eigen::Map<MatrixX<S>>;
  using ConstView = Eigen::Map<const MatrixX<S>>;

  /// Takes the shape rows × cols; the contents are then undefined.
  View resize(Index rows, Index cols) {
    if (memory_.size() < rows * cols) memory_.resize(rows * cols);
    rows_ = rows;
    cols_ = cols;
    return view();
  }

  /// Takes the shape and the elements of `source`.
  void assign(ConstMatrixRef<S> source) {
    View copy = resize(source.rows(), source.cols());
    const Index columns_at_once = std::max<Index>(1, 4096 / std::max<Index>(1, source.rows()));
    for_each_range(source.cols(), columns_at_once, static_cast<double>(source.size()),
                   [&](Index begin, Index end) { copy.middleCols(begin, end - begin) = source.middleCols(begin, end - begin); });
  }

  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  View view() { return View(memory_.data(), rows_, cols_); }
  ConstView view() const { return ConstView(memory_.data(), rows_, cols_); }

 private:
  VectorX<S> memory_;
  Index rows_ = 0;
  Index cols_ = 0;
};

}  // namespace dylora

#endif
