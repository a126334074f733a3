#ifndef DYLORA_ADAPTERS_NONE_HPP
#define DYLORA_ADAPTERS_NONE_HPP

#include <concepts>

#include "dylora/adapters/local_workspace.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"

namespace dylora {

/// Δ = 0: no adapter. It makes a frozen projection inside a composite layer, and accepts any rank because it has no component to choose.
///
///     using Frozen = Linear<float, NoAdapter<float>>;
///     Attention<float, Linear<float>, Frozen, Linear<float>, Frozen> attention(q, k, v, o, {.heads = 4});   // adapters on q and v
template <std::floating_point S>
struct NoAdapter : LocalWorkspace<NoAdapter<S>, S> {
  using Scalar = S;
  struct Options {};
  struct Gradients {};
  struct Workspace {};
  struct Cache {
    BatchRanks ranks = RankSlice::none();
    Index samples = 0;
  };

  NoAdapter(Index in_features, Index out_features) : in_features_(in_features), out_features_(out_features) {}

  Index in_features() const { return in_features_; }
  Index out_features() const { return out_features_; }
  Index max_rank() const { return 0; }

  void add_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> /*y*/) const {
    prepare_forward(x, ranks, cache);
  }
  using LocalWorkspace<NoAdapter, S>::add_backward;
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> /*dx*/) const {
    check_backward(x, dy, cache, gradients, workspace);
  }
  /// Throws ShapeError unless the cache was filled with as many samples.
  void check_backward(ConstMatrixRef<S> /*x*/, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& /*gradients*/,
                      const Workspace& /*workspace*/) const {
    require_equal(dy.cols(), cache.samples, "NoAdapter::add_backward: samples in dy, against the cache (was it filled by add_forward?)");
  }

  void prepare_forward(ConstMatrixRef<S> x, const BatchRanks& /*ranks*/, Cache& cache) const { cache.samples = x.cols(); }
  LowRankTerm<S> forward_term(const Cache& /*cache*/, const RankRun& run) const { return LowRankTerm<S>::none(out_features_, run.count); }
  void prepare_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    check_backward(x, dy, cache, gradients, workspace);
  }
  LowRankTerm<S> backward_term(const Cache& /*cache*/, const Workspace& /*workspace*/, const RankRun& run) const {
    return LowRankTerm<S>::none(in_features_, run.count);
  }

  MatrixX<S> delta(RankSlice /*rank*/) const { return MatrixX<S>::Zero(out_features_, in_features_); }

  static void members(const auto& /*f*/, auto&... /*t*/) {}

 private:
  Index in_features_, out_features_;
};

}  // namespace dylora

#endif
