#ifndef DYLORA_LAYERS_ATTENTION_HEADS_HPP
#define DYLORA_LAYERS_ATTENTION_HEADS_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

#include "dylora/core/sequences.hpp"
#include "dylora/core/types.hpp"
#include "dylora/layers/attention/kernel.hpp"
#include "dylora/linalg/kernels/dot_products.hpp"
#include "dylora/linalg/parallel.hpp"

namespace dylora::detail {

/// What an attention is made of, or the gradients of it: features × tokens each.
template <class M>
struct QueriesKeysValues {
  M Q, K, V;
};

/// How an attention divides into independent tasks: the features of Q and of the context (O) into heads, those of K and V into
/// key/value heads, each shared by a group of heads, and the columns into sequences. Tensors are features × tokens; logsumexp and dot
/// are tokens × heads.
template <class S>
struct AttentionHeads {
  Index heads, key_value_heads, head_dim;
  bool causal;

  /// O = V · softmax(s · Kᵀ Q) in every head of every sequence. A task owns one head of one tile of queries.
  void forward(const Sequences& sequences, ConstMatrixRef<S> Q, ConstMatrixRef<S> K, ConstMatrixRef<S> V, MatrixRef<S> O,
               MatrixRef<S> logsumexp) const {
    std::vector<std::pair<Index, Index>> tiles;  // sequence, tile of it
    for (Index s = 0; s < sequences.count(); ++s) {
      for (Index tile = 0; tile < tile_count(sequences.length(s)); ++tile) tiles.emplace_back(s, tile);
    }
    for_each_task(static_cast<Index>(tiles.size()) * heads, work(sequences), [&](Index task) {
      const auto [s, tile] = tiles[static_cast<std::size_t>(task / heads)];
      const Index head = task % heads, begin = sequences.begin(s), n = sequences.length(s);
      attend_tile({n, n, 0, causal}, tile, head, Q.middleCols(begin, n), K.middleCols(begin, n), V.middleCols(begin, n),
                  O.middleCols(begin, n), logsumexp.col(head).data() + begin);
    });
  }

  /// The same for the last queries of one sequence, whose keys and values are all there.
  void forward_last(ConstMatrixRef<S> Q, ConstMatrixRef<S> K, ConstMatrixRef<S> V, MatrixRef<S> O, MatrixRef<S> logsumexp) const {
    const AttentionShape shape{Q.cols(), K.cols(), K.cols() - Q.cols(), true};
    for_each_task(tile_count(Q.cols()) * heads, work(Q.cols(), K.cols()), [&](Index task) {
      const Index head = task % heads;
      attend_tile(shape, task / heads, head, Q, K, V, O, logsumexp.col(head).data());
    });
  }

  /// dQ, dK and dV, overwritten, from dO; `dot` is workspace. A task owns one key/value head of one sequence, with all the heads that
  /// share it.
  void backward(const Sequences& sequences, ConstMatrixRef<S> Q, ConstMatrixRef<S> K, ConstMatrixRef<S> V, ConstMatrixRef<S> O,
                ConstMatrixRef<S> logsumexp, ConstMatrixRef<S> dO, MatrixRef<S> dot, MatrixRef<S> dQ, MatrixRef<S> dK,
                MatrixRef<S> dV) const {
    for_each_task(sequences.count() * key_value_heads, 2.5 * work(sequences), [&](Index task) {
      const Index s = task / key_value_heads, shared = task % key_value_heads, begin = sequences.begin(s), n = sequences.length(s);
      const auto part = [&](auto& matrix, Index head) { return head_rows(matrix, head).middleCols(begin, n); };
      part(dK, shared).setZero();
      part(dV, shared).setZero();
      for (Index head = shared * group(); head < (shared + 1) * group(); ++head) {
        part(dQ, head).setZero();
        S* const dots = dot.col(head).data() + begin;
        column_dot_products(head_dim, n, part(O, head).data(), O.outerStride(), part(dO, head).data(), dO.outerStride(), dots);
        attend_backward<S>({n, n, 0, causal}, temperature(), part(Q, head), part(K, shared), part(V, shared),
                           logsumexp.col(head).data() + begin, dots, part(dO, head), part(dQ, head), part(dK, shared), part(dV, shared));
      }
    });
  }

 private:
  Index group() const { return heads / key_value_heads; }
  S temperature() const { return static_cast<S>(1 / std::sqrt(static_cast<double>(head_dim))); }

  static Index tile_count(Index queries) { return (queries + attention_tile - 1) / attention_tile; }

  double work(Index queries, Index keys) const {
    return 2.0 * static_cast<double>(heads * head_dim) * static_cast<double>(queries) * static_cast<double>(keys);
  }
  double work(const Sequences& sequences) const {
    double sum = 0;
    for (Index s = 0; s < sequences.count(); ++s) sum += work(sequences.length(s), sequences.length(s));
    return sum;
  }

  template <class M>
  auto head_rows(M& matrix, Index head) const {
    return matrix.middleRows(head * head_dim, head_dim);
  }

  void attend_tile(const AttentionShape& shape, Index tile, Index head, ConstMatrixRef<S> Q, ConstMatrixRef<S> K, ConstMatrixRef<S> V,
                   MatrixRef<S> O, S* logsumexp) const {
    const Index query = tile * attention_tile, shared = head / group();
    attend<S>(shape, temperature(), query, std::min(attention_tile, shape.queries - query), head_rows(Q, head), head_rows(K, shared),
              head_rows(V, shared), head_rows(O, head), logsumexp);
  }
};

}  // namespace dylora::detail

#endif
