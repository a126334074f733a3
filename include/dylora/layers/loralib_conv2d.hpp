#ifndef DYLORA_LAYERS_LORALIB_CONV2D_HPP
#define DYLORA_LAYERS_LORALIB_CONV2D_HPP

#include <algorithm>
#include <concepts>
#include <utility>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"
#include "dylora/ranks/scale.hpp"
#include "dylora/weights/dense.hpp"

namespace dylora {

struct LoralibConv2dOptions {
  Index kernel = 3;  ///< k, of a k × k kernel: loralib has no other
  Index groups = 1;
  double alpha = 1;
  ScaleRule scale = alpha_over_rank;
};

/// No layer, but what makes one: the adapter of a convolution in loralib's layout,
/// Δ_b = s(b) · (B[:, :b·k] · A[:b·k, :]) read row by row as out × (in / groups · k · k).
///
/// For checkpoints of loralib's Conv2d (LoRA, arXiv 2106.09685), to be merged, or trained further as a LowRank; a new adapter of a
/// convolution is better off in Conv2d's own layout. What is read row by row is no product of a k × k and a 1 × 1 convolution: a unit of
/// rank is k rows of A and k columns of B, and Δ as a matrix has up to k · k times the rank.
///
///     const LoralibConv2d<float> trained(lora_A, lora_B, {.kernel = 3, .alpha = 16});
///     const DenseWeight<float> weight = trained.merged(base, 4);                    // at rank 4
///     Conv2d<float> conv(unfold, {Linear<float>(base, trained.low_rank())});        // the same function at rank 4 · 9, and all below
template <std::floating_point S>
class LoralibConv2d {
 public:
  using Options = LoralibConv2dOptions;

  /// lora_A r·k × in·k, lora_B (out / groups · k) × r·k, as the file has them. Throws ShapeError if they do not fit each other or the
  /// options, std::invalid_argument unless kernel and groups are at least 1.
  LoralibConv2d(RowMatrix<S> A, MatrixX<S> B, Options options) : A_(std::move(A)), B_(std::move(B)), options_(options) {
    const Index k = options.kernel, groups = options.groups;
    require_in_range(k, 1, std::max<Index>(1, A_.cols()), "LoralibConv2d: kernel");
    require_in_range(groups, 1, std::max<Index>(1, A_.cols()), "LoralibConv2d: groups");
    require_equal(B_.cols(), A_.rows(), "LoralibConv2d: columns of lora_B (rank * kernel) against rows of lora_A");
    require_equal(A_.rows() % k, 0, "LoralibConv2d: rows of lora_A modulo kernel");
    require_equal(A_.cols() % (k * groups), 0, "LoralibConv2d: columns of lora_A modulo kernel * groups");
    require_equal(B_.rows() % k, 0, "LoralibConv2d: rows of lora_B modulo kernel");
  }

  Index max_rank() const { return A_.rows() / options_.kernel; }
  Index out_channels() const { return B_.rows() / options_.kernel * options_.groups; }
  Index patch_size() const { return A_.cols() / options_.groups * options_.kernel; }  ///< in / groups · k · k

  /// Δ_b, out × (in / groups · k · k): the first b · k rows of A and columns of B. Throws std::invalid_argument if b > max_rank.
  MatrixX<S> delta(RankSlice rank) const {
    require_in_range(rank.active, 0, max_rank(), "LoralibConv2d::delta: rank");
    const Index rows = rank.active * options_.kernel;
    RowMatrix<S> product(B_.rows(), A_.cols());
    set_product(product, B_.leftCols(rows), A_.topRows(rows), rows > 0 ? static_cast<S>(scale(rank.active)) : S(0));
    return Eigen::Map<const RowMatrix<S>>(product.data(), out_channels(), patch_size());
  }

  /// W + Δ_b and the bias of W. Throws ShapeError if W (out × in / groups · k · k) does not fit, std::invalid_argument if b > max_rank.
  DenseWeight<S> merged(const DenseWeight<S>& base, RankSlice rank) const {
    require_equal(base.rows(), out_channels(), "LoralibConv2d::merged: rows of the weight");
    require_equal(base.cols(), patch_size(), "LoralibConv2d::merged: columns of the weight");
    return {delta(rank) + base.dense(), base.bias};
  }

  /// Δ as an adapter of Conv2d, to train on from here: of rank r·k·k, and at rank b·k·k it is Δ_b, whichever of the scale rules of
  /// ranks/scale.hpp it has. Row o of Δ is rows o·k … o·k + k − 1 of B · A side by side. So its components are, for each unit of rank, each
  /// of these k places and each of the unit's k rows of A: that row, in that place of a row of zeros, with every k-th element of its column
  /// of B. Throws std::invalid_argument for groups above 1, where Δ divides the rows of B · A otherwise.
  LowRank<S> low_rank() const {
    require_in_range(options_.groups, 1, 1, "LoralibConv2d::low_rank: groups");
    const Index k = options_.kernel, rank = max_rank(), width = A_.cols();
    RowMatrix<S> A = RowMatrix<S>::Zero(rank * k * k, width * k);
    MatrixX<S> B(out_channels(), rank * k * k);
    Index component = 0;
    for (Index i = 0; i < rank; ++i) {
      for (Index t = 0; t < k; ++t) {
        for (Index q = i * k; q < (i + 1) * k; ++q, ++component) {
          A.row(component).segment(t * width, width) = A_.row(q);
          for (Index o = 0; o < out_channels(); ++o) B(o, component) = B_(o * k + t, q);
        }
      }
    }
    const double alpha = rank > 0 ? alpha_giving(options_.scale, scale(rank), rank * k * k, rank * k * k) : options_.alpha;
    return {std::move(A), std::move(B), {.alpha = alpha, .scale = options_.scale}};
  }

 private:
  double scale(Index rank) const { return options_.scale(options_.alpha, rank, max_rank()); }

  RowMatrix<S> A_;
  MatrixX<S> B_;
  Options options_;
};

}  // namespace dylora

#endif
