#ifndef DYLORA_LAYERS_LINEAR_HPP
#define DYLORA_LAYERS_LINEAR_HPP

#include <concepts>
#include <string_view>
#include <type_traits>
#include <utility>

#include "dylora/adapters/adapter.hpp"
#include "dylora/adapters/factored.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/adapters/none.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/layers/layer.hpp"
#include "dylora/linalg/buffer.hpp"
#include "dylora/linalg/product.hpp"
#include "dylora/weights/dense.hpp"
#include "dylora/weights/weight.hpp"

namespace dylora {

/// y = W x + bias + Δ_b(x): a frozen weight and a trainable adapter.
///
///     Linear<float> layer(W, {.max_rank = 8, .alpha = 16}, rng);
///     Linear<float>::Cache cache;
///     auto gradients = zeros_like(layer);
///     const MatrixX<float> y = layer.forward(x, 4, cache);               // at rank 4
///     const MatrixX<float> dx = layer.backward(dy, cache, gradients);
///
/// A loop that is to allocate nothing brings the results and the scratch memory too:
///
///     Linear<float>::Workspace workspace;
///     layer.forward(x, 4, cache, y);
///     layer.backward(dy, cache, gradients, workspace, dx);
///
/// Const both ways: the layer holds no activation, no mode and no gradient, so threads may share it at different ranks, each with a
/// cache, gradients and a workspace of its own. Two calls in flight must not share a cache.
template <std::floating_point S, Adapter A = LowRank<S>, FrozenWeight W = DenseWeight<S>>
struct Linear : KeepsInput<Linear<S, A, W>, S> {
  using Scalar = S;
  static constexpr std::string_view name = "Linear";
  static constexpr bool needs_linked_cache = !SelfContained<A>;

  struct Gradients {
    typename A::Gradients adapter;
  };

  struct Workspace {
    typename A::Workspace adapter;
    Buffer<S> dx;  // where nobody wants it and the adapter gives no terms
  };

  /// Filled by one forward or apply, read by any number of backward.
  struct Cache {
    Buffer<S> x;  // empty where the caller keeps x
    typename A::Cache adapter;
  };

  W base;
  A adapter;

  /// Throws ShapeError if the adapter's features are not the weight's.
  Linear(W base_, A adapter_) : base(std::move(base_)), adapter(std::move(adapter_)) {
    require_equal(adapter.in_features(), base.cols(), "Linear: in_features of the adapter");
    require_equal(adapter.out_features(), base.rows(), "Linear: out_features of the adapter");
  }

  /// With a fresh adapter, which leaves the base's output as it is.
  template <class Fresh = A, class Options = typename Fresh::Options>
    requires std::constructible_from<Fresh, Index, Index, Options, Rng&>
  Linear(W base_, Options options, Rng& rng) : base(std::move(base_)), adapter(base.cols(), base.rows(), options, rng) {}

  /// Frozen.
  explicit Linear(W base_)
    requires std::same_as<A, NoAdapter<S>>
      : base(std::move(base_)), adapter(base.cols(), base.rows()) {}

  Index in_features() const { return base.cols(); }
  Index out_features() const { return base.rows(); }
  Index max_rank() const { return adapter.max_rank(); }

  /// y = W x + bias + Δ_b(x), for a caller that keeps x, as composite layers do and as forward does.
  ///
  /// x in × n; y out × n, overwritten; the cache is overwritten, and holds no x. A rank above max_rank means all components, since the
  /// parts of a composite may have different numbers of them. Throws ShapeError if x or y do not fit. Costs 2·n·(in·out + b·(in + out))
  /// flops.
  void apply(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.x.resize(in_features(), 0);  // the caller has it: one of an earlier forward must not stand in for it
    require_equal(x.rows(), in_features(), "Linear::forward: rows of x");
    require_samples(x.cols(), "Linear::forward: x");
    require_equal(y.rows(), out_features(), "Linear::forward: rows of y");
    require_equal(y.cols(), x.cols(), "Linear::forward: samples in y");
    if constexpr (fused) {
      adapter.prepare_forward(x, ranks.at_most(max_rank()), cache.adapter);
      const auto runs = cache.adapter.ranks.runs(x.cols());
      if (runs.size() == 1) return base.apply(x, adapter.forward_term(cache.adapter, *runs.begin()), y);
      base.apply(x, y);
      add_forward_terms<A, S>(adapter, cache.adapter, y);
    } else {
      base.apply(x, y);
      adapter.add_forward(x, ranks.at_most(max_rank()), cache.adapter, y);
    }
  }

  /// Throws what a backward would throw for these arguments, and touches nothing.
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& workspace) const {
    require_equal(dy.rows(), out_features(), "Linear::backward: rows of dy");
    adapter.check_backward(x, dy, cache.adapter, gradients.adapter, workspace.adapter);
  }

  /// The backward of apply, with the same x: gradients += ∂/∂θ at the rank of the cached forward, and
  ///
  ///     dx = Wᵀ dy + (∂Δ/∂x)ᵀ dy
  ///
  /// dy out × n; dx in × n, overwritten. Throws ShapeError, with nothing added, if something does not fit or the cache was not filled.
  /// Costs 2·n·(in·out + 2·b·(in + out)) flops; allocates only when the workspace grows.
  void set_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    backward_into<false>(x, dy, cache, gradients, workspace, dx);
  }

  /// The same, but dx is added to, as where several projections read one x.
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    backward_into<true>(x, dy, cache, gradients, workspace, dx);
  }

  /// The same without dx. Costs 2·n·b·(in + 2·out) flops; an adapter that is no FactoredAdapter computes its part of dx all the same.
  void add_gradients(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    require_equal(dy.rows(), out_features(), "Linear::backward: rows of dy");
    if constexpr (FactoredAdapter<A>) {
      adapter.prepare_backward(x, dy, cache.adapter, gradients.adapter, workspace.adapter);
    } else if constexpr (!std::is_empty_v<typename A::Gradients>) {
      auto dx = workspace.dx.resize(in_features(), dy.cols());
      dx.setZero();
      adapter.add_backward(x, dy, cache.adapter, gradients.adapter, workspace.adapter, dx);
    }
  }

  /// W + Δ_b and the bias, as a new weight; the layer stays as it is. Throws std::invalid_argument for the rank.
  DenseWeight<S> merged(RankSlice rank) const
    requires MergeableAdapter<A> && MergeableWeight<W>
  {
    MatrixX<S> delta = adapter.delta(rank);
    delta += base.dense();
    return {std::move(delta), base.dense_bias()};
  }

  static void members(const auto& f, auto&... t) { f(Child<A>{}, t.adapter...); }

 private:
  /// The frozen weight meets the whole batch at once, with the adapter's term along where one rank is for all of it.
  static constexpr bool fused = FactoredAdapter<A> && FusedWeight<W>;

  /// dx (overwritten unless `add`). The adapter goes first: it may refuse, and nothing has been touched then.
  template <bool add>
  void backward_into(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                     MatrixRef<S> dx) const {
    require_equal(dy.rows(), out_features(), "Linear::backward: rows of dy");
    require_equal(dx.rows(), in_features(), "Linear::backward: rows of dx");
    require_equal(dx.cols(), dy.cols(), "Linear::backward: samples in dx");
    if constexpr (fused) {
      adapter.prepare_backward(x, dy, cache.adapter, gradients.adapter, workspace.adapter);
      const auto runs = cache.adapter.ranks.runs(dy.cols());
      const bool one_rank = runs.size() == 1;
      const LowRankTerm<S> term =
          one_rank ? adapter.backward_term(cache.adapter, workspace.adapter, *runs.begin()) : LowRankTerm<S>::none(dx.rows(), dx.cols());
      add ? base.add_apply_transposed(dy, term, dx) : base.apply_transposed(dy, term, dx);
      if (!one_rank) add_backward_terms<A, S>(adapter, cache.adapter, workspace.adapter, dx);
    } else {
      adapter.check_backward(x, dy, cache.adapter, gradients.adapter, workspace.adapter);
      if constexpr (!add) dx.setZero();
      adapter.add_backward(x, dy, cache.adapter, gradients.adapter, workspace.adapter, dx);
      base.add_apply_transposed(dy, dx);
    }
  }
};

/// A frozen projection: no adapter, nothing trained.
template <std::floating_point S, FrozenWeight W = DenseWeight<S>>
using FrozenLinear = Linear<S, NoAdapter<S>, W>;

}  // namespace dylora

#endif
