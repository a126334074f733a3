#ifndef DYLORA_LAYERS_EMBEDDING_HPP
#define DYLORA_LAYERS_EMBEDDING_HPP

#include <algorithm>
#include <concepts>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/random_normal.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/buffer.hpp"
#include "dylora/linalg/parallel.hpp"
#include "dylora/linalg/product.hpp"

namespace dylora {

/// y_n = W[:, id_n] + s(b) · B[:, :b] · A[:b, id_n]: a frozen table of embeddings, a column for each token, and a low-rank adapter of it.
///
/// LoRA (arXiv 2106.09685) as loralib and PEFT put it on embeddings, at DyLoRA's nested ranks (arXiv 2210.07558).
///
///     Embedding<float> embedding(W, {.max_rank = 8, .alpha = 16}, rng);   // W width × vocabulary; A = 0, B from N(0, 1)
///     Embedding<float>::Cache cache;
///     auto gradients = zeros_like(embedding);
///     const MatrixX<float> y = embedding.forward(ids, 4, cache);           // width × ids, at rank 4
///     embedding.backward(dy, cache, gradients);
///
/// The adapter is a LowRank from the vocabulary to the width, but begins the other way round: only a column of A whose token occurs gets
/// any gradient, so A is what starts at zero. `Table` is MatrixX<S>, or Eigen::Map<const MatrixX<S>> over a table that lives elsewhere:
/// PyTorch's vocabulary × width, row by row, is the same memory. There is no dx, and so this is no Layer; it is const both ways as they
/// are.
///
/// Where the table is the output head too, base.transpose() · x leaves the adapter out, as PEFT does; merged(b) has it in both.
template <std::floating_point S, class Table = MatrixX<S>>
struct Embedding {
  using Scalar = S;

  struct Gradients {
    typename LowRank<S>::Gradients adapter;
  };

  struct Workspace {
    Buffer<S> dh;  // s · B_bᵀ · dy
  };

  /// Filled by one forward, read by any number of backward.
  struct Cache {
    std::vector<Index> ids;
    Index vocabulary = 0;  // that the ids are in
    BatchRanks ranks = RankSlice::none();
    Buffer<S> h;  // A[:b, ids], highest rank × n
  };

  Table base;  // width × vocabulary
  LowRank<S> adapter;

  /// Throws ShapeError if the adapter's features are not the table's.
  Embedding(Table base_, LowRank<S> adapter_) : base(std::move(base_)), adapter(std::move(adapter_)) {
    require_equal(adapter.in_features(), base.cols(), "Embedding: in_features of the adapter, against the vocabulary");
    require_equal(adapter.out_features(), base.rows(), "Embedding: out_features of the adapter, against the width");
  }

  /// With a fresh adapter, which leaves the table as it is: A = 0, B from N(0, 1). Throws as LowRank's constructor does.
  Embedding(Table base_, LowRankOptions options, Rng& rng) : base(std::move(base_)), adapter(fresh(base, options, rng)) {}

  Index vocabulary() const { return base.cols(); }
  Index width() const { return base.rows(); }
  Index max_rank() const { return adapter.max_rank(); }

  /// y_n = W[:, id_n] + s(b) · B_b · A_b[:, id_n], for inference.
  ///
  /// ids n tokens; b ≤ max_rank, one for all of them or one for each run; returns width × n. Throws std::invalid_argument for a token
  /// outside the vocabulary and for the rank, ShapeError if there is no token. Costs 2·b·n·width flops.
  MatrixX<S> forward(std::span<const Index> ids, const BatchRanks& ranks) const {
    Cache scratch;
    return forward(ids, ranks, scratch);
  }

  /// The same, and keeps in the cache (overwritten) what backward needs, a copy of the ids included.
  MatrixX<S> forward(std::span<const Index> ids, const BatchRanks& ranks, Cache& cache) const {
    MatrixX<S> y(width(), static_cast<Index>(ids.size()));
    forward(ids, ranks, cache, y);
    return y;
  }

  /// The same into the caller's y (width × n, overwritten); but for a list of ranks, allocates only when the cache grows.
  void forward(std::span<const Index> ids, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.ids.clear();  // if this call throws, the cache counts as not filled
    const Index n = static_cast<Index>(ids.size());
    require_samples(n, "Embedding::forward: ids");
    require_ranks(ranks, n, max_rank(), "Embedding::forward");
    require_equal(y.rows(), width(), "Embedding::forward: rows of y");
    require_equal(y.cols(), n, "Embedding::forward: samples in y");
    check_adapter();
    check_ids(ids);
    cache.ranks = ranks.at_most(adapter.components());
    const auto id = [&](Index i) { return ids[static_cast<std::size_t>(i)]; };
    for_each_range(n, 1, static_cast<double>(y.size()), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) y.col(i) = base.col(id(i));
    });
    auto h = cache.h.resize(cache.ranks.highest(), n);
    cache.ranks.for_each_run(n, [&](Index begin, Index count, RankSlice rank) {
      const Index b = rank.active;
      if (b == 0) return;
      for (Index i = begin; i < begin + count; ++i) h.col(i).head(b) = adapter.A.col(id(i)).head(b);
      add_product(y.middleCols(begin, count), adapter.B.leftCols(b), h.block(0, begin, b, count), adapter.scale(b));
    });
    cache.vocabulary = vocabulary();
    cache.ids.assign(ids.begin(), ids.end());
  }

  /// gradients += ∂/∂θ, at the ranks of the cached forward, run after run. With s = s(b) and the slice [t, b) trained:
  ///
  ///     y_n = s B_b h_n             dB[:, t:b] += s · dy · h[t:b]ᵀ      dh = s · B_bᵀ · dy
  ///     h_n = A_b[:, id_n]          dA[t:b, id_n] += dh_n[t:b]
  ///
  /// dy width × n. A token that occurs several times adds as often, in the order of the batch; the columns of A that no id names are not
  /// touched. Throws ShapeError if dy does not fit, or the cache was not filled or is of another
  /// vocabulary. Costs 4·b·n·width flops; allocates only when the workspace grows.
  void backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    const Index n = dy.cols();
    check_backward(dy, cache, gradients);
    auto& dA = gradients.adapter.A;
    auto& dB = gradients.adapter.B;
    const auto h = cache.h.view();
    auto dh = workspace.dh.resize(cache.ranks.highest(), n);
    cache.ranks.for_each_run(n, [&](Index begin, Index count, RankSlice rank) {
      const Index b = rank.active, t = rank.trainable_from, trained = rank.trainable();
      if (trained > 0) {
        const auto dy_b = dy.middleCols(begin, count);
        set_dot_products(dh.block(0, begin, b, count), adapter.B.leftCols(b).transpose(), dy_b, adapter.scale(b));
        add_product(dB.middleCols(t, trained), dy_b, h.block(t, begin, trained, count).transpose(), adapter.scale(b));
        scatter(cache.ids, dh, begin, count, rank, dA);
      }
      dA.components.insert(rank);
      dB.components.insert(rank);
    });
  }

  /// The same in a workspace of its own: allocates its scratch memory.
  void backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients) const {
    Workspace workspace;
    backward(dy, cache, gradients, workspace);
  }

  /// W + Δ_b as a new table; this one stays as it is. Throws std::invalid_argument for the rank.
  MatrixX<S> merged(RankSlice rank) const {
    MatrixX<S> table = adapter.delta(rank);
    table += base;
    return table;
  }

  static void members(const auto& f, auto&... t) {
    f(Parameter{"lora_embedding_A", RankAxis::rows, Factor::A, true}, t.adapter.A...);
    f(Parameter{"lora_embedding_B", RankAxis::cols, Factor::B, true}, t.adapter.B...);
    scale_settings<LowRank<S>>(f, &Embedding::adapter);
  }

 private:
  static LowRank<S> fresh(const Table& base, LowRankOptions options, Rng& rng) {
    const Index rank = options.max_rank;
    require_in_range(rank, 0, std::min(base.rows(), base.cols()), "Embedding: max_rank");
    return {RowMatrix<S>::Zero(rank, base.cols()), random_normal<S>(base.rows(), rank, 1, rng), options};
  }

  /// dA[t:b, id_i] += dh[t:b, i], one component after the other: each is a row of dA, which one thread owns.
  static void scatter(const std::vector<Index>& ids, const typename Buffer<S>::View& dh, Index begin, Index count, RankSlice rank,
                      RowMatrix<S>& dA) {
    const Index t = rank.trainable_from;
    for_each_range(rank.trainable(), 1, static_cast<double>(rank.trainable() * count), [&](Index first, Index last) {
      for (Index component = t + first; component < t + last; ++component) {
        for (Index i = begin; i < begin + count; ++i) dA(component, ids[static_cast<std::size_t>(i)]) += dh(component, i);
      }
    });
  }

  void check_ids(std::span<const Index> ids) const {
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0 || ids[i] >= vocabulary())
        require_in_range(ids[i], 0, vocabulary() - 1, "Embedding::forward: id at position " + std::to_string(i));
    }
  }

  /// A and B are public.
  void check_adapter() const {
    require_equal(adapter.B.cols(), adapter.A.rows(), "Embedding: columns of B (rank) against rows of A");
    require_in_range(adapter.A.rows(), 0, max_rank(), "Embedding: components, against options.max_rank");
  }

  void check_backward(ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients) const {
    require_samples(dy.cols(), "Embedding::backward: dy");
    require_equal(dy.cols(), static_cast<Index>(cache.ids.size()),
                  "Embedding::backward: samples in dy, against the cache (was it filled by forward?)");
    require_equal(cache.vocabulary, vocabulary(), "Embedding::backward: vocabulary of the cache");
    require_equal(dy.rows(), width(), "Embedding::backward: rows of dy");
    require_shapes(*this, "Embedding::backward: gradient of", gradients);
    check_adapter();
    require_ranks(cache.ranks, dy.cols(), adapter.components(), "Embedding::backward: the cache");
    require_in_range(cache.ranks.highest(), 0, adapter.components(), "Embedding::backward: rank of the cache");  // cut to nothing since
  }
};

}  // namespace dylora

#endif
