#ifndef DYLORA_METHODS_DORA_DORA_LINEAR_HPP
#define DYLORA_METHODS_DORA_DORA_LINEAR_HPP

#include <concepts>
#include <optional>
#include <string_view>
#include <utility>

#include "dylora/adapters/adapter.hpp"
#include "dylora/adapters/dropout_mask.hpp"
#include "dylora/adapters/factored.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/layers/layer.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/linalg/buffer.hpp"
#include "dylora/linalg/product.hpp"
#include "dylora/methods/dora/magnitude.hpp"
#include "dylora/methods/dora/options.hpp"
#include "dylora/methods/dora/row_norms.hpp"
#include "dylora/methods/dora/scaling.hpp"
#include "dylora/weights/dense.hpp"
#include "dylora/weights/weight.hpp"

namespace dylora {

/// y = diag(m / n_b) · (W + Δ_b) · x + bias,   Δ_b = s(b) · B[:, :b] · A[:b, :],   n_b = ‖row i of W + Δ_b‖ for each row i
///
/// DoRA (Liu et al., arXiv 2402.09353, eq. 5), at every rank b: the rows of the corrected weight give the direction, the trained magnitude
/// m the length. m starts as the row norms of W, so that a fresh layer is its base at every rank.
///
///     DoraLinear<float> layer(W, {.adapter = {.max_rank = 8, .alpha = 16}}, rng);
///     DoraLinear<float>::Cache cache;
///     auto gradients = zeros_like(layer);
///     const MatrixX<float> y = layer.forward(x, 4, cache);
///     const MatrixX<float> dx = layer.backward(dy, cache, gradients);
///     const DenseWeight<float> deployed = layer.merged(4);              // rows of length m
///
/// With an Rng in the cache and a dropout p > 0, a forward draws a mask, and the correction sees x̃ = M ∘ x in its frozen term too
/// (as in PEFT): y = W x + bias + (m/n − 1) ∘ W x̃ + m/n ∘ Δ_b x̃. Else x̃ is x.
///
/// A row of norm 0 gives its bias alone, and its magnitude does not learn. Weight decay would pull m towards 0 and with it the output:
/// exclude "lora_magnitude_vector" from it. Const both ways, as Linear. The base must not change under the layer, which keeps its row
/// norms. Every call computes the norms anew, for 2·b·in·out flops: to serve single samples, merge.
template <std::floating_point S, FactorPairAdapter Inner = LowRank<S>, MergeableWeight W = DenseWeight<S>,
          Magnitude kind = Magnitude::shared>
class DoraLinear : private Linear<S, Inner, W>, public KeepsInput<DoraLinear<S, Inner, W, kind>, S> {
  using Product = Linear<S, Inner, W>;  // W x + bias + Δ_b x
  using Lengths = RowMagnitude<S, kind>;
  using Dx = detail::Dx;

 public:
  using Scalar = S;
  using Options = DoraOptions<typename Inner::Options>;
  using Magnitudes = typename Lengths::Values;
  static constexpr std::string_view name = "DoraLinear";

  struct Gradients : Product::Gradients {
    Gradient<Magnitudes> magnitude;
  };

  struct Workspace : Product::Workspace {
    Buffer<S> direction_dy;              // m/n ∘ dy
    Buffer<S> dm;                        // of each run of ranks, out × runs
    Buffer<S> correction_dx, frozen_dx;  // where inputs were dropped
  };

  /// Filled by one forward or apply, read by any number of backward. Overwritten but for its rng.
  struct Cache {
    Buffer<S> x;             // empty where the caller keeps x
    std::optional<Rng> rng;  // for the masks; none drops nothing
    bool dropped = false;
    DropoutMask<S> mask;
    BatchRanks ranks = RankSlice::none();
    Index samples = 0;
    typename Product::Cache product;
    NestedRowNorms<S> norms;
    Buffer<S> scales;    // m/n, out × highest rank
    Buffer<S> unscaled;  // (W + Δ_b) x̃, out × n
  };

  using Product::adapter, Product::base;
  Magnitudes magnitude;  // out, or out × components
  double dropout;
  NormGradient norm_gradient;

  /// With the row norms of W for a magnitude, which leaves the base's output as it is if B = 0. Throws ShapeError if the adapter's features
  /// are not the weight's, std::invalid_argument unless 0 ≤ dropout < 1. `options.adapter` is not read.
  DoraLinear(W base_, Inner adapter_, Options options = {}) : DoraLinear(Product(std::move(base_), std::move(adapter_)), options) {}

  /// Of trained parts. Throws ShapeError if the magnitude is not one for each row, or for each row and component.
  DoraLinear(W base_, Inner adapter_, Options options, Magnitudes magnitude_) : DoraLinear(std::move(base_), std::move(adapter_), options) {
    Lengths::require(magnitude_, out_features(), adapter.components(), "DoraLinear");
    magnitude = std::move(magnitude_);
  }

  /// Fresh.
  DoraLinear(W base_, Options options, Rng& rng) : DoraLinear(Product(std::move(base_), options.adapter, rng), options) {}

  using Product::in_features, Product::out_features, Product::max_rank;

  using KeepsInput<DoraLinear, S>::forward, KeepsInput<DoraLinear, S>::backward;

  /// y as above, for a caller that keeps x, as composite layers do and as forward does. The cache holds what a backward needs, (W + Δ_b) x̃
  /// among it; with an Rng in the cache, a forward draws a mask.
  ///
  /// x in × n; y out × n, overwritten. A rank above max_rank means all components. Throws ShapeError if x or y do not fit. Costs a Linear's
  /// forward, the norms, and a pass over y.
  void apply(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.x.resize(in_features(), 0);  // the caller has it: one of an earlier forward must not stand in for it
    cache.samples = 0;                 // if this call throws, the cache counts as not filled
    require_equal(x.rows(), in_features(), "DoraLinear::forward: rows of x");
    require_samples(x.cols(), "DoraLinear::forward: x");
    require_equal(y.rows(), out_features(), "DoraLinear::forward: rows of y");
    require_equal(y.cols(), x.cols(), "DoraLinear::forward: samples in y");
    cache.ranks = ranks.at_most(adapter.components());
    if (cache.ranks.highest() > 0) compute_scales(cache.ranks.highest(), cache);
    cache.dropped = cache.rng && cache.mask.draw(x, dropout, *cache.rng);
    auto unscaled = cache.unscaled.resize(out_features(), x.cols());
    if (cache.dropped) {
      Product::apply(cache.mask.x(), ranks, cache.product, unscaled);
      base.apply(x, y);
      add_forward_terms<Inner, S>(adapter, cache.product.adapter, y);
    } else {
      Product::apply(x, ranks, cache.product, y);
    }
    detail::scale_rows<S>(cache.ranks, cache.dropped ? ConstMatrixRef<S>(unscaled) : ConstMatrixRef<S>(y), frozen_.bias,
                          cache.scales.view(), unscaled, y);
    cache.samples = x.cols();
  }

  /// Throws what a backward would throw for these arguments, and touches nothing.
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& workspace) const {
    const Index n = dy.cols();
    require_equal(dy.rows(), out_features(), "DoraLinear::backward: rows of dy");
    require_equal(x.rows(), in_features(), "DoraLinear::backward: rows of x");
    require_equal(x.cols(), n, "DoraLinear::backward: samples in x");
    require_equal(n, cache.samples, "DoraLinear::backward: samples in dy, against the cache (was it filled by apply?)");
    require_equal(cache.unscaled.rows(), out_features(), "DoraLinear::backward: rows of the cached output");
    require_ranks(cache.ranks, n, adapter.components(), "DoraLinear::backward: the cache");
    require_in_range(cache.ranks.highest(), 0, cache.norms.all().cols(), "DoraLinear::backward: rank of the cache, against its norms");
    require_shapes(*this, "DoraLinear::backward: gradient of", gradients);
    Product::check_backward(x, dy, cache.product, gradients, workspace);
  }

  /// With u = m/n, P = (W + Δ_b) x̃ (the output less its bias, and so with fewer digits where that is far larger) and g = u ∘ dy, for each
  /// run:
  ///
  ///     dm += (1/n) ∘ Σ_columns dy ∘ P        dx = Wᵀ dy + M ∘ (Wᵀ (g − dy) + (∂Δ/∂x)ᵀ g), without dropout (W + Δ_b)ᵀ g
  ///     dA, dB: those of Δ_b at x̃ and g; if exact, those of the matrix Δ_b at g x̃ᵀ − diag(u ∘ dm/n) (W + Δ_b)
  ///
  /// A shared magnitude learns at every rank, also where the slice trains no component. x as in apply; dy out × n; dx in × n, overwritten;
  /// gradients are added to.
  /// Throws ShapeError, with nothing added, if dy does not fit or the cache was not filled. Costs a Linear's backward and a pass over dy.
  /// Exact, 2·in·out·b flops more and some allocation for each run, and if there are several, their A x̃ again.
  void set_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    backward_into<Dx::set>(x, dy, cache, gradients, workspace, dx);
  }

  /// The same, but dx is added to, as where several projections read one x.
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    backward_into<Dx::add>(x, dy, cache, gradients, workspace, dx);
  }

  /// The same without dx.
  void add_gradients(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    MatrixX<S> none;
    backward_into<Dx::none>(x, dy, cache, gradients, workspace, none);
  }

  /// n_b, from the running sums over the factors; the row norms of W without a rank. Throws std::invalid_argument for the rank.
  VectorX<S> row_norms(RankSlice rank) const {
    require_ranks(rank, in_features(), max_rank(), "DoraLinear::row_norms");
    const Index b = rank.at_most(adapter.components()).active;
    if (b == 0) return frozen_.norms();
    NestedRowNorms<S> norms;
    norms.compute(base, frozen_, adapter, b);
    return norms.at(b);
  }

  /// diag(m/n_b) (W + Δ_b), whose rows have the length |m|, and the bias, as a new weight; without a rank, the base. The layer stays as it
  /// is. Throws std::invalid_argument for the rank.
  DenseWeight<S> merged(RankSlice rank) const
    requires MergeableAdapter<Inner>
  {
    DenseWeight<S> sum = Product::merged(rank);
    const Index b = rank.at_most(adapter.components()).active;
    if (b == 0) return sum;
    Cache scratch;
    compute_scales(b, scratch);
    sum.W.array().colwise() *= scratch.scales.view().col(b - 1).array();
    return sum;
  }

  static void members(const auto& f, auto&... t) {
    f(Child<Inner>{}, t.adapter...);
    f(Parameter{"lora_magnitude_vector", Lengths::axis}, t.magnitude...);
    f(Setting{.name = "dropout probability", .only_in_training = true}, &DoraLinear::dropout);
    f(Setting{.name = "norm gradient", .only_in_training = true},
      [](const DoraLinear& self) { return self.norm_gradient == NormGradient::exact ? "exact" : "detached"; });
  }

 private:
  DoraLinear(Product product, const Options& options)
      : Product(std::move(product)), dropout(options.dropout), norm_gradient(options.norm_gradient), frozen_(base) {
    DropoutMask<S>::require_probability(dropout, "DoraLinear: dropout");
    magnitude = Lengths::make(frozen_.norms(), adapter.components());
  }

  /// The norms and m/n at the ranks 1..R, where 0/0 counts as 0.
  void compute_scales(Index R, Cache& cache) const {
    Lengths::require(magnitude, out_features(), adapter.components(), "DoraLinear");  // it is public
    cache.norms.compute(base, frozen_, adapter, R);
    auto scales = cache.scales.resize(out_features(), R);
    Lengths::set_lengths(magnitude, scales);
    detail::divide_rows<S>(scales, cache.norms.all());
  }

  template <Dx what>
  void backward_into(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                     MatrixRef<S> dx) const {
    const Index n = dy.cols();
    check_backward(x, dy, cache, gradients, workspace);
    if constexpr (what != Dx::none) {
      require_equal(dx.rows(), in_features(), "DoraLinear::backward: rows of dx");
      require_equal(dx.cols(), n, "DoraLinear::backward: samples in dx");
    }
    if (cache.ranks.highest() == 0) return product_backward<what>(x, dy, cache.product, gradients, workspace, dx);
    auto g = workspace.direction_dy.resize(out_features(), n);
    detail::scale_rows_backward<S>(cache.ranks, dy, cache.unscaled.view(), cache.norms.all(), cache.scales.view(), g, workspace.dm);
    if (cache.dropped) {
      if constexpr (what == Dx::none) {
        direction_backward<what>(cache.mask.x(), cache, gradients, workspace, dx);
      } else {
        auto correction = workspace.correction_dx.resize(in_features(), n), frozen = workspace.frozen_dx.resize(in_features(), n);
        direction_backward<Dx::set>(cache.mask.x(), cache, gradients, workspace, correction);
        frozen.setZero();
        base.add_apply_transposed(dy, frozen);
        correction -= frozen;
        if constexpr (what == Dx::set) dx.setZero();
        dx += frozen;
        cache.mask.add_backward(correction, dx);
      }
    } else {
      direction_backward<what>(x, cache, gradients, workspace, dx);
    }
    cache.ranks.for_each_run(n, [&, run = Index{0}](Index, Index, RankSlice rank) mutable {
      const auto dm = workspace.dm.view().col(run++);
      if (rank.active > 0) Lengths::add_gradient(rank, dm, gradients.magnitude);
    });
  }

  template <Dx what>
  void product_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> g, const typename Product::Cache& cache, Gradients& gradients,
                        Workspace& workspace, MatrixRef<S> dx) const {
    if constexpr (what == Dx::set) Product::set_backward(x, g, cache, gradients, workspace, dx);
    if constexpr (what == Dx::add) Product::add_backward(x, g, cache, gradients, workspace, dx);
    if constexpr (what == Dx::none) Product::add_gradients(x, g, cache, gradients, workspace);
  }

  /// dx = (W + Δ_b)ᵀ g, dA and dB, where g and dm are in the workspace and x is what the correction has seen. Where the norms have a
  /// gradient, it is added run after run, for which each run becomes a batch of its own.
  template <Dx what>
  void direction_backward(ConstMatrixRef<S> x, const Cache& cache, Gradients& gradients, Workspace& workspace, MatrixRef<S> dx) const {
    const auto g = workspace.direction_dy.view();
    if (norm_gradient == NormGradient::detached) return product_backward<what>(x, g, cache.product, gradients, workspace, dx);
    cache.ranks.for_each_run(x.cols(), [&, run = Index{0}](Index begin, Index columns, RankSlice rank) mutable {
      const auto dm = workspace.dm.view().col(run++);
      typename Product::Cache of_run;
      const bool whole = columns == x.cols();
      const auto x_b = x.middleCols(begin, columns);
      if (!whole) adapter.prepare_forward(x_b, rank, of_run.adapter);
      product_backward<what>(x_b, g.middleCols(begin, columns), whole ? cache.product : of_run, gradients, workspace,
                             what == Dx::none ? dx : MatrixRef<S>(dx.middleCols(begin, columns)));
      if (rank.active == 0) return;
      const VectorX<S> dn = -cache.scales.view().col(rank.active - 1).cwiseProduct(dm);
      cache.norms.add_backward(base, adapter, rank, dn, gradients.adapter);
    });
  }

  FrozenRows<S> frozen_;
};

}  // namespace dylora

#endif
