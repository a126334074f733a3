#ifndef DYLORA_METHODS_LORA_FLOW_GATED_ADAPTERS_HPP
#define DYLORA_METHODS_LORA_FLOW_GATED_ADAPTERS_HPP

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/adapters/factored.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/buffer.hpp"
#include "dylora/linalg/product.hpp"

namespace dylora {

/// Δ_b(x) = Σ_i ω_i · s_i(b_i) · B_i · A_i · x   with b_i = min(b, components of adapter i) and, for each column of x, weights ω from
/// outside
///
/// LoRA-Flow (Wang et al., arXiv 2402.11455): k trained adapters of one projection, all frozen, weighed token by token by the gate
/// (methods/lora_flow/gate.hpp) that the projections of a block share. Nothing is trained here: there is no parameter and no gradient of a
/// factor.
///
///     Linear<float, GatedAdapters<float>> q(W_q, GatedAdapters<float>({translation_q, mathematics_q})), v(…);
///     gate.forward(h, ranks, gate_cache);
///     q_cache.weights = &gate_cache.weights;                      // k × n, before each forward; likewise v_cache
///     q.apply(x, ranks, q_cache, y);
///     q_workspace.adapter.d_weights = &d_weights;                 // k × n, zero before the first backward of the block, added to by each
///     q.add_backward(x, dy, q_cache, q_gradients, q_workspace, dx);
///     gate.add_backward(h, d_weights, gate_cache, gate_gradients, dh);   // after the last
///
/// Component c of all adapters lies side by side, then component c + 1 of those that have one: rank b is a prefix, and all adapters are
/// one product. Without weights a call at RankSlice::none() still works, and no other.
template <std::floating_point S>
class GatedAdapters : public Factored<GatedAdapters<S>, S> {
 public:
  static constexpr std::string_view name = "GatedAdapters";
  static constexpr bool needs_linked_cache = true;
  using Scalar = S;

  struct Gradients {};

  struct Workspace {
    Buffer<S>* d_weights = nullptr;  // the caller's, k × n: backward adds ∂/∂ω to it
    Buffer<S> dh;
  };

  /// Filled by one forward, read by any number of backward. `weights` is the caller's and read by forward alone, which resets it: the next
  /// forward has to be told anew, and cannot read what is no longer there.
  struct Cache {
    const Buffer<S>* weights = nullptr;  // ω, k × n
    BatchRanks ranks = RankSlice::none();
    Index samples = 0;
    Buffer<S> used;   // a copy of the weights
    Buffer<S> h;      // A x, for each component of each adapter up to the highest rank
    Buffer<S> gated;  // ω s h
  };

  /// The adapters' factors are copied. Throws std::invalid_argument if there is no adapter, ShapeError if they disagree about their
  /// features.
  explicit GatedAdapters(const std::vector<LowRank<S>>& adapters) {
    if (adapters.empty()) throw std::invalid_argument("GatedAdapters: expected at least one adapter, got none");
    Index max_rank = 0, total = 0;
    for (const LowRank<S>& adapter : adapters) {
      require_equal(adapter.in_features(), adapters.front().in_features(), "GatedAdapters: in_features of an adapter");
      require_equal(adapter.out_features(), adapters.front().out_features(), "GatedAdapters: out_features of an adapter");
      require_equal(adapter.B.cols(), adapter.A.rows(), "GatedAdapters: columns of B (rank) against rows of A");
      max_rank = std::max(max_rank, adapter.max_rank());
      total += adapter.components();
    }
    const Index k = static_cast<Index>(adapters.size());
    A_.resize(total, adapters.front().in_features());
    B_.resize(adapters.front().out_features(), total);
    scales_.setZero(k, max_rank);
    rows_.push_back(0);
    for (Index c = 0; c < max_rank; ++c) {
      for (Index i = 0; i < k; ++i) {
        const LowRank<S>& adapter = adapters[static_cast<std::size_t>(i)];
        if (adapter.components() > 0) scales_(i, c) = adapter.scale(std::min(c + 1, adapter.components()));
        if (c >= adapter.components()) continue;
        const auto row = static_cast<Index>(owner_.size());
        A_.row(row) = adapter.A.row(c);
        B_.col(row) = adapter.B.col(c);
        owner_.push_back(i);
      }
      rows_.push_back(static_cast<Index>(owner_.size()));
    }
  }

  Index in_features() const { return A_.cols(); }
  Index out_features() const { return B_.rows(); }
  Index max_rank() const { return scales_.cols(); }  ///< the largest of any adapter
  Index count() const { return scales_.rows(); }     ///< k

  /// y += Δ(x) under the weights that the cache points to: h and ω s h, into the cache (the rest of which is overwritten). Also throws
  /// ShapeError if the weights do not fit, std::invalid_argument if there are none. Costs 2·b·n·in flops, and the term 2·b·n·out, for a b
  /// that is the components of all adapters together.
  void prepare_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const {
    cache.samples = 0;  // if this call throws, the cache counts as not filled
    this->check_forward(x, ranks);
    const BatchRanks used = ranks.at_most(max_rank());
    const Index rows = rows_at(used.highest());
    if (rows > 0) {
      require_weights(cache.weights, x.cols(), "GatedAdapters::add_forward: weights");
      cache.used.assign(cache.weights->view());
    }
    auto h = cache.h.resize(rows, x.cols()), gated = cache.gated.resize(rows, x.cols());
    used.for_each_run(x.cols(), [&](Index begin, Index n, RankSlice rank) {
      const Index b = rows_at(rank.active);
      if (b == 0) return;
      set_dot_products(h.block(0, begin, b, n), A_.topRows(b), x.middleCols(begin, n));
      for_each_gain(begin, n, rank.active, cache.used,
                    [&](Index row, Index column, Index, S, S gain) { gated(row, column) = gain * h(row, column); });
    });
    cache.ranks = used;
    cache.weights = nullptr;
    cache.samples = x.cols();
  }

  LowRankTerm<S> forward_term(const Cache& cache, const RankRun& run) const {
    const Index b = rows_at(run.rank.active);
    return {B_.leftCols(b), cache.gated.view().block(0, run.begin, b, run.count)};
  }

  /// Throws as Factored's, and ShapeError if the cache or *workspace.d_weights is of other sizes, std::invalid_argument if there is no
  /// d_weights.
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& workspace) const {
    check_cached(x, dy, cache, gradients);
    if (cache.h.rows() > 0) require_weights(workspace.d_weights, dy.cols(), "GatedAdapters::add_backward: d_weights");
  }
  /// The same for a caller that makes d_weights, of the right shape, only after it has asked.
  void check_cached(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients) const {
    this->check_call(x, dy, cache, gradients, max_rank());
    require_equal(cache.h.rows(), rows_at(cache.ranks.highest()), "GatedAdapters::add_backward: components of the cached h");
    if (cache.h.rows() > 0) require_equal(cache.used.rows(), count(), "GatedAdapters::add_backward: weights in the cache (adapters)");
  }

  /// At the cached ranks and weights, with h = A_b x and e = B_bᵀ dy, and for the rows of adapter i its scale s_i:
  ///
  ///     y = B_b (ω s h)      dω_i += Σ over its rows of s_i · h · e      dx += A_bᵀ (ω s e)
  ///
  /// *workspace.d_weights (k × n) is added to. Costs 2·b·n·out flops, and the term 2·b·n·in.
  void prepare_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    check_backward(x, dy, cache, gradients, workspace);
    const auto h = cache.h.view();
    auto dh = workspace.dh.resize(h.rows(), dy.cols());
    if (h.rows() == 0) return;
    auto d_weights = workspace.d_weights->view();
    cache.ranks.for_each_run(dy.cols(), [&](Index begin, Index n, RankSlice rank) {
      const Index b = rows_at(rank.active);
      if (b == 0) return;
      set_dot_products(dh.block(0, begin, b, n), B_.leftCols(b).transpose(), dy.middleCols(begin, n));
      for_each_gain(begin, n, rank.active, cache.used, [&](Index row, Index column, Index adapter, S scale, S gain) {
        d_weights(adapter, column) += scale * h(row, column) * dh(row, column);
        dh(row, column) *= gain;
      });
    });
  }

  LowRankTerm<S> backward_term(const Cache& /*cache*/, const Workspace& workspace, const RankRun& run) const {
    const Index b = rows_at(run.rank.active);
    return {A_.topRows(b).transpose(), workspace.dh.view().block(0, run.begin, b, run.count)};
  }

  /// Δ_b as a matrix, out × in, under weights that are the same for every token: what merges exactly where a gate is constant
  /// (FlowGate::constant_weights), or where weights were chosen once for a task.
  /// Throws ShapeError unless there is a weight for each adapter, std::invalid_argument for the rank.
  MatrixX<S> delta_at(const VectorX<S>& weights, RankSlice rank) const {
    require_equal(weights.size(), count(), "GatedAdapters::delta_at: weights, against the adapters");
    require_ranks(rank, in_features(), max_rank(), "GatedAdapters::delta_at");
    const Index active = rank.at_most(max_rank()).active, b = rows_at(active);
    RowMatrix<S> weighed = A_.topRows(b);
    for (Index row = 0; row < b; ++row) weighed.row(row) *= scales_(owner(row), active - 1) * weights[owner(row)];
    MatrixX<S> result(out_features(), in_features());
    set_product(result, B_.leftCols(b), weighed);
    return result;
  }

  static void members(const auto& f, auto&... /*t*/) {
    f(Constant{"A"}, &GatedAdapters::A_);
    f(Constant{"B"}, &GatedAdapters::B_);
    f(Constant{"scales"}, &GatedAdapters::scales_);
    f(Setting{"component_owners"}, &GatedAdapters::owner_);
  }

 private:
  /// The components of all adapters at a rank.
  Index rows_at(Index rank) const { return rows_[static_cast<std::size_t>(rank)]; }
  Index owner(Index row) const { return owner_[static_cast<std::size_t>(row)]; }

  /// Calls f(row, column, adapter, s, ω s) for all rows of rank b in n columns.
  template <class F>
  void for_each_gain(Index begin, Index n, Index b, const Buffer<S>& used, F&& f) const {
    const auto weights = used.view();
    const auto scales = scales_.col(b - 1);
    const Index rows = rows_at(b);
    for (Index column = begin; column < begin + n; ++column) {
      for (Index row = 0; row < rows; ++row) {
        const Index adapter = owner(row);
        f(row, column, adapter, scales[adapter], weights(adapter, column) * scales[adapter]);
      }
    }
  }

  void require_weights(const Buffer<S>* weights, Index samples, const std::string& what) const {
    if (weights == nullptr) {
      throw std::invalid_argument(what + ": expected " + std::to_string(count()) + " × " + std::to_string(samples) +
                                  ", set by the caller, got none");
    }
    require_equal(weights->rows(), count(), what + ": rows (adapters)");
    require_equal(weights->cols(), samples, what + ": samples");
  }

  RowMatrix<S> A_;            // all components × in
  MatrixX<S> B_;              // out × all components
  std::vector<Index> owner_;  // the adapter of each of these
  std::vector<Index> rows_;   // how many of these there are at each rank
  MatrixX<S> scales_;         // s_i at rank b in (i, b − 1)
};

}  // namespace dylora

#endif
