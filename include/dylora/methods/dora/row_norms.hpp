#ifndef DYLORA_METHODS_DORA_ROW_NORMS_HPP
#define DYLORA_METHODS_DORA_ROW_NORMS_HPP

#include <cmath>
#include <concepts>
#include <vector>

#include "dylora/adapters/adapter.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/buffer.hpp"
#include "dylora/linalg/product.hpp"
#include "dylora/weights/weight.hpp"

namespace dylora {

namespace detail {

/// Correctly rounded, which Eigen's is not in every position of a vector.
template <class M>
auto square_roots(const M& squares) {
  return squares.unaryExpr([](typename M::Scalar square) { return std::sqrt(square); });
}

/// product = W · factor. From the matrix itself where the weight has one to read; else from its output, off which the bias is taken again,
/// and with it the digits that a larger bias has cost.
template <std::floating_point S, class W>
void set_product_without_bias(MatrixRef<S> product, const W& weight, const VectorX<S>& bias, ConstMatrixRef<S> factor) {
  if constexpr (requires { weight.values(); }) {
    set_product(product, weight.values(), factor);
  } else {
    weight.apply(factor, product);
    product.colwise() -= bias;
  }
}

}  // namespace detail

/// What the norms of corrected rows need of the frozen weight, taken from it once.
template <std::floating_point S>
struct FrozenRows {
  VectorX<S> bias;           // out, zeros if the weight has none
  VectorX<S> squared_norms;  // ‖w_i‖²

  template <MergeableWeight W>
  explicit FrozenRows(const W& weight)
      : bias(weight.dense_bias()), squared_norms(weight.dense().template cast<double>().rowwise().squaredNorm().template cast<S>()) {
    if (bias.size() == 0) bias.setZero(weight.rows());
  }

  VectorX<S> norms() const { return detail::square_roots(squared_norms); }
};

/// n_i(b) = ‖v_i‖ with v_i = w_i + s(b) · B[i, :b] · A[:b, :], the norm of each row of W + Δ_b, at every rank b, without Δ_b:
///
///     n²(b) = ‖w‖² + 2 s(b) · c(b) + s(b)² · q(b),   c = Σ_k B_k ∘ W A_kᵀ,   q = Σ_k B_k ∘ (B_k · A_k A_kᵀ + 2 Σ_{j<k} B_j · A_j A_kᵀ)
///
/// c and q are running sums over the components k < b, so that one pass over them serves all ranks and the norms at b see no later
/// component. (The norm at one rank from the factors: arXiv 2603.22276.) Where the sum cancels to less than 1/64 of what went into it, it
/// would hold rounding errors only, and the norm is that of the row itself.
///
///     const FrozenRows<float> rows(weight);
///     NestedRowNorms<float> norms;
///     norms.compute(weight, rows, adapter, 8);
///     norms.at(4);                                            // at rank 4
///     norms.add_backward(weight, adapter, 4, dn, gradients);  // gradients += ∂n/∂(A, B)
template <std::floating_point S>
class NestedRowNorms {
 public:
  /// At the ranks 1..R of an adapter with factors A and B and a scale; overwrites what there was. Costs 2·R·(out·in + R·(in + out)) flops,
  /// and 2·in·out more for each row and rank that cancels. Allocates only when a buffer grows or a row cancels.
  template <FrozenWeight W, class Adapter>
  void compute(const W& weight, const FrozenRows<S>& rows, const Adapter& adapter, Index R) {
    const Index out = weight.rows();
    const auto A = adapter.A.topRows(R);
    auto WA = WA_.resize(out, R), AA = AA_.resize(R, R), norms = norms_.resize(out, R), workspace = workspace_.resize(out, 6);
    detail::set_product_without_bias<S>(WA, weight, rows.bias, A.transpose());
    set_product(AA, A, A.transpose());

    workspace.leftCols(4).setZero();
    auto c = workspace.col(0).array(), c_size = workspace.col(1).array(), q = workspace.col(2).array(), q_size = workspace.col(3).array();
    auto term = workspace.col(4), size = workspace.col(5);
    for (Index k = 0; k < R; ++k) {
      term = adapter.B.col(k).cwiseProduct(WA.col(k));
      c += term.array();
      c_size += term.array().abs();

      auto weights = weights_.resize(k + 1, 1);
      weights.topRows(k) = 2 * AA.col(k).head(k);
      weights(k) = AA(k, k);
      set_product(term, adapter.B.leftCols(k + 1), weights);
      term.array() *= adapter.B.col(k).array();
      q += term.array();
      q_size += term.array().abs();

      const S s = adapter.scale(k + 1);
      auto squares = norms.col(k);
      squares = rows.squared_norms.array() + 2 * s * c + s * s * q;
      size = rows.squared_norms.array() + 2 * std::abs(s) * c_size + s * s * q_size;
      if ((squares.array() < size.array() / 64).any()) square_directly(weight, adapter, k + 1, size / 64, squares);
      squares = detail::square_roots(squares);
    }
  }

  /// out × R, those at rank b in column b − 1.
  typename Buffer<S>::ConstView all() const { return norms_.view(); }

  /// Those at one of the ranks that compute was given, out elements.
  auto at(Index b) const { return norms_.view().col(b - 1); }

  /// The vector-Jacobian product of compute at one rank, for dn with an element per row and the components that the slice trains. With
  /// V = W + Δ_b and k = dn / n, which counts as 0 where n is:
  ///
  ///     dV = diag(k) V        dB += s · diag(k) · V Aᵀ        dA += s · (diag(k) B)ᵀ · V
  ///
  /// Costs 2·b·in·out flops; allocates some columns of in and of out.
  template <FrozenWeight W, class Adapter, class Gradients>
  void add_backward(const W& weight, const Adapter& adapter, RankSlice rank, const VectorX<S>& dn, Gradients& gradients) const {
    const Index b = rank.active, t = rank.trainable_from, trained = rank.trainable();
    if (trained == 0) return;
    const S s = adapter.scale(b);
    const auto A = adapter.A.topRows(b);
    const auto B = adapter.B.leftCols(b);
    const VectorX<S> k = (at(b).array() == 0).select(S(0), dn.array() / at(b).array());

    MatrixX<S> VA = WA_.view().middleCols(t, trained);
    add_product(VA, B, AA_.view().block(0, t, b, trained), s);
    gradients.B.middleCols(t, trained) += s * k.asDiagonal() * VA;

    const MatrixX<S> kB = k.asDiagonal() * B.rightCols(trained);
    MatrixX<S> VkB = MatrixX<S>::Zero(weight.cols(), trained), BkB(b, trained);
    weight.add_apply_transposed(kB, VkB);
    set_product(BkB, B.transpose(), kB, s);
    add_product(VkB, A.transpose(), BkB);
    gradients.A.middleRows(t, trained) += s * VkB.transpose();
  }

 private:
  /// The squares that are below `least`, from the rows themselves: w_i is Wᵀ times a unit vector, exactly.
  template <class W, class Adapter>
  static void square_directly(const W& weight, const Adapter& adapter, Index b, const VectorX<S>& least, Eigen::Ref<VectorX<S>> squares) {
    std::vector<Index> few;
    for (Index i = 0; i < squares.size(); ++i) {
      if (squares(i) < least(i)) few.push_back(i);
    }
    const auto count = static_cast<Index>(few.size());
    MatrixX<S> units = MatrixX<S>::Zero(weight.rows(), count), rows = MatrixX<S>::Zero(weight.cols(), count);
    for (Index i = 0; i < count; ++i) units(few[static_cast<std::size_t>(i)], i) = 1;
    weight.add_apply_transposed(units, rows);
    const MatrixX<S> B = adapter.B(few, Eigen::seqN(0, b));
    add_product(rows, adapter.A.topRows(b).transpose(), B.transpose(), adapter.scale(b));
    squares(few) = rows.colwise().squaredNorm();
  }

  Buffer<S> WA_;     // W Aᵀ, out × R
  Buffer<S> AA_;     // A Aᵀ, R × R
  Buffer<S> norms_;  // out × R
  Buffer<S> workspace_, weights_;
};

}  // namespace dylora

#endif
