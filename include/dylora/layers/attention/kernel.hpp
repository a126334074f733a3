#ifndef DYLORA_LAYERS_ATTENTION_KERNEL_HPP
#define DYLORA_LAYERS_ATTENTION_KERNEL_HPP

#include <algorithm>
#include <cmath>
#include <limits>

#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"

/// softmax(s · Kᵀ Q) for one head of one sequence, in tiles, forward and backward: the scores are never stored whole
/// (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).
///
/// Shapes: Q, O, dQ, dO are head_dim × queries; K, V, dK, dV head_dim × keys, one column per token. Query i stands at position
/// `offset` + i and sees, if causal, the keys 0 … offset + i. A score tile holds a query per column, padded to `attention_tile` rows, so
/// that every exponential is computed the same way wherever it falls: a query's result does not depend on the queries beside it.
namespace dylora::detail {

inline constexpr Index attention_tile = 64;

/// keys × queries
template <class S>
using ScoreTile = Eigen::Matrix<S, attention_tile, attention_tile>;

struct AttentionShape {
  Index queries;
  Index keys;
  Index offset;
  bool causal;

  /// One past the last key that the queries before `end` see.
  Index visible_keys(Index end) const { return causal ? std::min(keys, offset + end) : keys; }
};

/// Overwrites what a query must not see, keys and padding, with `value`: with −∞ before the exponential, and again with 0 after it, because
/// Eigen's vectorised exp(−∞) is a tiny number instead of 0.
template <class S>
void mask_scores(ScoreTile<S>& scores, const AttentionShape& shape, Index query, Index queries, Index key, Index keys, S value) {
  for (Index i = 0; i < queries; ++i) {
    const Index visible = std::clamp(shape.visible_keys(query + i + 1) - key, Index{0}, keys);
    scores.col(i).tail(attention_tile - visible).setConstant(value);
  }
}

/// O = V · softmax(s · Kᵀ Q) for queries [query, query + queries), at most a tile of them; `logsumexp` (one per query) is kept for
/// backward. 4 · head_dim flops per query and visible key; memory: one score tile on the stack.
template <class S>
void attend(const AttentionShape& shape, S scale, Index query, Index queries, ConstMatrixRef<S> Q, ConstMatrixRef<S> K, ConstMatrixRef<S> V,
            MatrixRef<S> O, S* logsumexp) {
  constexpr S infinity = std::numeric_limits<S>::infinity();
  ScoreTile<S> scores;
  Eigen::Array<S, attention_tile, 1> highest, sum;
  highest.setConstant(-infinity);
  sum.setZero();
  auto out = O.middleCols(query, queries);
  out.setZero();
  const Index visible = shape.visible_keys(query + queries);
  for (Index key = 0; key < visible; key += attention_tile) {
    const Index keys = std::min(attention_tile, visible - key);
    auto tile = scores.topLeftCorner(keys, queries);
    set_product(tile, K.middleCols(key, keys).transpose(), Q.middleCols(query, queries), scale);
    mask_scores(scores, shape, query, queries, key, keys, -infinity);
    for (Index i = 0; i < queries; ++i) {
      auto column = scores.col(i).array();
      const S top = std::max(highest[i], column.maxCoeff());
      if (top == -infinity && (column == -infinity).all()) {  // sees none of these keys; a NaN among them must show
        column.setZero();
        continue;
      }
      column = (column - top).exp();
      if (top != highest[i] && highest[i] != -infinity) {
        const S shrink = std::exp(highest[i] - top);
        sum[i] *= shrink;
        out.col(i) *= shrink;
      }
      highest[i] = top;
      sum[i] += column.sum();
    }
    mask_scores(scores, shape, query, queries, key, keys, S(0));
    add_product(out, V.middleCols(key, keys), tile);
  }
  for (Index i = 0; i < queries; ++i) {
    out.col(i) /= sum[i];
    logsumexp[query + i] = highest[i] + std::log(sum[i]);
  }
}

/// The backward of attend for one query head. With P = exp(s · Kᵀ Q − logsumexp), recomputed tile by tile, and `dot` the sum of dO ∘ O over
/// the features of each query:
///
///     O = V P             dV += dO · Pᵀ               dP = Vᵀ · dO
///     P = softmax(Z)      dZ = P ∘ (dP − dot)
///     Z = s · Kᵀ Q        dQ += s · K · dZ            dK += s · Q · dZᵀ
///
/// dQ, dK and dV are added to. 10 · head_dim flops per query and visible key; memory: two score tiles on the stack.
template <class S>
void attend_backward(const AttentionShape& shape, S scale, ConstMatrixRef<S> Q, ConstMatrixRef<S> K, ConstMatrixRef<S> V,
                     const S* logsumexp, const S* dot, ConstMatrixRef<S> dO, MatrixRef<S> dQ, MatrixRef<S> dK, MatrixRef<S> dV) {
  ScoreTile<S> P, dZ;
  for (Index query = 0; query < shape.queries; query += attention_tile) {
    const Index queries = std::min(attention_tile, shape.queries - query), visible = shape.visible_keys(query + queries);
    const auto Qi = Q.middleCols(query, queries), dOi = dO.middleCols(query, queries);
    for (Index key = 0; key < visible; key += attention_tile) {
      const Index keys = std::min(attention_tile, visible - key);
      const auto Kj = K.middleCols(key, keys), Vj = V.middleCols(key, keys);
      auto p = P.topLeftCorner(keys, queries), dz = dZ.topLeftCorner(keys, queries);
      set_product(p, Kj.transpose(), Qi, scale);
      mask_scores(P, shape, query, queries, key, keys, -std::numeric_limits<S>::infinity());
      for (Index i = 0; i < queries; ++i) P.col(i) = (P.col(i).array() - logsumexp[query + i]).exp();
      mask_scores(P, shape, query, queries, key, keys, S(0));
      set_product(dz, Vj.transpose(), dOi);
      for (Index i = 0; i < queries; ++i) dz.col(i) = p.col(i).array() * (dz.col(i).array() - dot[query + i]);
      add_product(dV.middleCols(key, keys), dOi, p.transpose());
      add_product(dQ.middleCols(query, queries), Kj, dz, scale);
      add_product(dK.middleCols(key, keys), Qi, dz.transpose(), scale);
    }
  }
}

}  // namespace dylora::detail

#endif
