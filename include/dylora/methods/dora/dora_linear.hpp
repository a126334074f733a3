#ifndef DYLORA_METHODS_DORA_DORA_LINEAR_HPP
#define DYLORA_METHODS_DORA_DORA_LINEAR_HPP

#include <concepts>
#include <optional>
#include <utility>

#include "dylora/adapters/adapter.hpp"
#include "dylora/adapters/dropout_mask.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
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
/// DoRA (Liu et al., arXiv 2402.09353, eq. 5), at every rank b: the rows of the corrected weight give the direction, the trained magnitude m
/// the length. m starts as the row norms of W, so that a fresh layer is its base at every rank.
///
///     DoraLinear<float> layer(W, {.adapter = {.max_rank = 8, .alpha = 16}}, rng);
///     DoraLinear<float>::Cache cache;
///     auto gradients = zeros_like(layer);
///     const Matrix<float> y = layer.forward(x, 4, cache);
///     const Matrix<float> dx = layer.backward(dy, cache, gradients);
///     const DenseWeight<float> deployed = layer.merged(4);              // rows of length m
///
/// With an Rng in the cache and a dropout p > 0, a forward draws a mask, and the correction sees x̃ = M ∘ x in its frozen term too
/// (as in PEFT): y = W x + bias + (m/n − 1) ∘ W x̃ + m/n ∘ Δ_b x̃. Else x̃ is x.
///
/// A row of norm 0 gives its bias alone, and its magnitude does not learn. Weight decay would pull m towards 0 and with it the output:
/// exclude "lora_magnitude_vector" from it. Const both ways, as Linear. The base must not change under the layer, which keeps its row norms.
/// Every call computes the norms anew, for 2·b·in·out flops: to serve single samples, merge.
template <std::floating_point S, FactorPairAdapter Inner = LowRank<S>, MergeableWeight W = DenseWeight<S>,
          Magnitude kind = Magnitude::shared>
class DoraLinear : private Linear<S, Inner, W> {
  using Product = Linear<S, Inner, W>;  // W x + bias + Δ_b x
  using Lengths = RowMagnitude<S, kind>;

 public:
  using Scalar = S;
  using Options = DoraOptions<typename Inner::Options>;
  using Magnitudes = typename Lengths::Values;

  struct Gradients : Product::Gradients {
    Gradient<Magnitudes> magnitude;
    Buffer<S> direction_dy;              // m/n ∘ dy
    Buffer<S> dm;                        // of each run of ranks, out × runs
    Buffer<S> correction_dx, frozen_dx;  // where inputs were dropped
  };

  struct ProjectionCache {
    std::optional<Rng> rng;  // for the masks; none drops nothing
    bool dropped = false;
    DropoutMask<S> mask;
    BatchRanks ranks = RankSlice::none();
    Index samples = 0;
    typename Inner::Cache adapter;
    NestedRowNorms<S> norms;
    Buffer<S> scales;    // m/n, out × highest rank
    Buffer<S> unscaled;  // (W + Δ_b) x̃, out × n
  };

  /// Filled by one forward, read by any number of backward.
  struct Cache : ProjectionCache {
    Buffer<S> x;
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

  /// y as above, for inference: nothing is dropped or kept. x in × n; b ≤ max_rank, one for all columns or one for each run of them; returns
  /// out × n. Throws ShapeError if x does not fit or has no column, std::invalid_argument for the rank. Costs a Linear's forward, the norms,
  /// and a pass over y.
  Matrix<S> forward(ConstMatrixRef<S> x, const BatchRanks& ranks) const {
    require_ranks(ranks, x.cols(), max_rank(), "DoraLinear::forward");
    ProjectionCache scratch;
    Matrix<S> y(out_features(), x.cols());
    compute(x, ranks, scratch, y, false);
    return y;
  }

  /// The same for training: keeps in the cache (overwritten, but for its rng) what backward needs, x and (W + Δ_b) x̃ among it.
  Matrix<S> forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const {
    Matrix<S> y(out_features(), x.cols());
    forward(x, ranks, cache, y);
    return y;
  }

  /// The same into the caller's y (out × n, overwritten); but for a list of ranks, allocates only when the cache grows.
  void forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.x.resize(in_features(), 0);  // if this call throws, the cache counts as not filled
    require_ranks(ranks, x.cols(), max_rank(), "DoraLinear::forward");
    apply(x, ranks, cache, y);
    cache.x.assign(x);
  }

  /// With u = m/n, P = (W + Δ_b) x̃ (the output less its bias, and so with fewer digits where that is far larger) and g = u ∘ dy, for each run:
  ///
  ///     dm += (1/n) ∘ Σ_columns dy ∘ P        dx = Wᵀ dy + M ∘ (Wᵀ (g − dy) + (∂Δ/∂x)ᵀ g), without dropout (W + Δ_b)ᵀ g
  ///     dA, dB: those of Δ_b at x̃ and g; if exact, those of the matrix Δ_b at g x̃ᵀ − diag(u ∘ dm/n) (W + Δ_b)
  ///
  /// A shared magnitude learns at every rank, also where the slice trains no component. dy out × n; returns in × n, gradients are added to.
  /// Throws ShapeError, with nothing added, if dy does not fit or the cache was not filled. Costs a Linear's backward and a pass over dy.
  /// Exact, 2·in·out·b flops more and some allocation for each run, and if there are several, their A x̃ again.
  Matrix<S> backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients) const {
    Matrix<S> dx(in_features(), dy.cols());
    backward(dy, cache, gradients, dx);
    return dx;
  }

  /// The same into the caller's dx (in × n, overwritten).
  void backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, MatrixRef<S> dx) const {
    require_samples(dy.cols(), "DoraLinear::backward: dy");
    require_equal(dy.cols(), cache.x.cols(), "DoraLinear::backward: samples in dy, against the cache (was it filled by forward?)");
    set_backward(cache.x.view(), dy, cache, gradients, dx);
  }

  /// forward for a caller that keeps x itself, as composite layers do: y (out × n) is overwritten, the cache holds no copy of x.
  /// A rank above max_rank means all components.
  void apply(ConstMatrixRef<S> x, const BatchRanks& ranks, ProjectionCache& cache, MatrixRef<S> y) const {
    compute(x, ranks, cache, y, true);
  }

  /// The backward of apply, with the same x: gradients are added to, dx (in × n) is overwritten.
  void set_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const ProjectionCache& cache, Gradients& gradients, MatrixRef<S> dx) const {
    backward_into<false>(x, dy, cache, gradients, dx);
  }

  /// The same, but dx is added to, as where several projections read one x.
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const ProjectionCache& cache, Gradients& gradients, MatrixRef<S> dx) const {
    backward_into<true>(x, dy, cache, gradients, dx);
  }

  /// n_b, from the running sums over the factors; the row norms of W without a rank. Throws std::invalid_argument for the rank.
  Vector<S> row_norms(RankSlice rank) const {
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
    ProjectionCache scratch;
    compute_scales(b, scratch);
    sum.W.array().colwise() *= scratch.scales.view().col(b - 1).array();
    return sum;
  }

  template <class F, class... T>
  static void zip_parameters(F&& f, T&... t) {
    if constexpr (requires { f.layer("", t...); }) return f.layer("", t...);
    Inner::zip_parameters(f, t.adapter...);
    f(Parameter{"lora_magnitude_vector", Lengths::axis}, t.magnitude...);
  }

 private:
  DoraLinear(Product product, const Options& options)
      : Product(std::move(product)), dropout(options.dropout), norm_gradient(options.norm_gradient), frozen_(base) {
    DropoutMask<S>::require_probability(dropout, "DoraLinear: dropout");
    magnitude = Lengths::make(frozen_.norms(), adapter.components());
  }

  /// The norms and m/n at the ranks 1..R, where 0/0 counts as 0.
  void compute_scales(Index R, ProjectionCache& cache) const {
    Lengths::require(magnitude, out_features(), adapter.components(), "DoraLinear");  // it is public
    cache.norms.compute(base, frozen_, adapter, R);
    auto scales = cache.scales.resize(out_features(), R);
    Lengths::set_lengths(magnitude, scales);
    detail::divide_rows<S>(scales, cache.norms.all());
  }

  /// y; what backward needs is kept if it is wanted.
  void compute(ConstMatrixRef<S> x, const BatchRanks& ranks, ProjectionCache& cache, MatrixRef<S> y, bool keep) const {
    cache.samples = 0;  // if this call throws, the cache counts as not filled
    require_equal(x.rows(), in_features(), "DoraLinear::forward: rows of x");
    require_samples(x.cols(), "DoraLinear::forward: x");
    require_equal(y.rows(), out_features(), "DoraLinear::forward: rows of y");
    require_equal(y.cols(), x.cols(), "DoraLinear::forward: samples in y");
    cache.ranks = ranks.at_most(adapter.components());
    if (cache.ranks.highest() > 0) compute_scales(cache.ranks.highest(), cache);
    cache.dropped = cache.rng && cache.mask.draw(x, dropout, *cache.rng);
    auto unscaled = cache.unscaled.resize(keep ? out_features() : 0, x.cols());
    if (cache.dropped) {
      Product::apply(cache.mask.x(), ranks, cache.adapter, unscaled);
      base.apply(x, y);
      adapter.for_each_forward_term(cache.adapter, [&](Index begin, Index columns, const LowRankTerm<S>& term) {
        add_product(y.middleCols(begin, columns), term.left, term.right, term.scale);
      });
    } else {
      Product::apply(x, ranks, cache.adapter, y);
    }
    detail::scale_rows<S>(cache.ranks, cache.dropped ? ConstMatrixRef<S>(unscaled) : ConstMatrixRef<S>(y), frozen_.bias,
                          cache.scales.view(), unscaled, y);
    cache.samples = x.cols();
  }

  template <bool add>
  void backward_into(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const ProjectionCache& cache, Gradients& gradients, MatrixRef<S> dx) const {
    const Index n = dy.cols();
    require_equal(dy.rows(), out_features(), "DoraLinear::backward: rows of dy");
    require_equal(x.rows(), in_features(), "DoraLinear::backward: rows of x");
    require_equal(x.cols(), n, "DoraLinear::backward: samples in x");
    require_equal(dx.rows(), in_features(), "DoraLinear::backward: rows of dx");
    require_equal(dx.cols(), n, "DoraLinear::backward: samples in dx");
    require_equal(n, cache.samples, "DoraLinear::backward: samples in dy, against the cache (was it filled by apply?)");
    require_equal(cache.unscaled.rows(), out_features(), "DoraLinear::backward: rows of the cached output");
    require_ranks(cache.ranks, n, adapter.components(), "DoraLinear::backward: the cache");
    require_in_range(cache.ranks.highest(), 0, cache.norms.all().cols(), "DoraLinear::backward: rank of the cache, against its norms");
    require_shapes(*this, "DoraLinear::backward: gradient of", gradients);
    if (cache.ranks.highest() == 0) return product_backward<add>(x, dy, cache.adapter, gradients, dx);
    auto g = gradients.direction_dy.resize(out_features(), n);
    detail::scale_rows_backward<S>(cache.ranks, dy, cache.unscaled.view(), cache.norms.all(), cache.scales.view(), g, gradients.dm);
    if (cache.dropped) {
      auto correction = gradients.correction_dx.resize(in_features(), n), frozen = gradients.frozen_dx.resize(in_features(), n);
      direction_backward<false>(cache.mask.x(), cache, gradients, correction);
      frozen.setZero();
      base.add_apply_transposed(dy, frozen);
      correction -= frozen;
      if constexpr (!add) dx.setZero();
      dx += frozen;
      cache.mask.add_backward(correction, dx);
    } else {
      direction_backward<add>(x, cache, gradients, dx);
    }
    cache.ranks.for_each_run(n, [&, run = Index{0}](Index, Index, RankSlice rank) mutable {
      const auto dm = gradients.dm.view().col(run++);
      if (rank.active > 0) Lengths::add_gradient(rank, dm, gradients.magnitude);
    });
  }

  template <bool add>
  void product_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> g, const typename Inner::Cache& cache, Gradients& gradients,
                        MatrixRef<S> dx) const {
    add ? Product::add_backward(x, g, cache, gradients, dx) : Product::set_backward(x, g, cache, gradients, dx);
  }

  /// dx = (W + Δ_b)ᵀ g, dA and dB, where g and dm are in the gradients' workspace and x is what the correction has seen. Where the norms have a
  /// gradient, it is added run after run, for which each run becomes a batch of its own.
  template <bool add>
  void direction_backward(ConstMatrixRef<S> x, const ProjectionCache& cache, Gradients& gradients, MatrixRef<S> dx) const {
    const auto g = gradients.direction_dy.view();
    if (norm_gradient == NormGradient::detached) return product_backward<add>(x, g, cache.adapter, gradients, dx);
    cache.ranks.for_each_run(x.cols(), [&, run = Index{0}](Index begin, Index columns, RankSlice rank) mutable {
      const auto dm = gradients.dm.view().col(run++);
      typename Inner::Cache of_run;
      const bool whole = columns == x.cols();
      const auto x_b = x.middleCols(begin, columns);
      if (!whole) adapter.prepare_forward(x_b, rank, of_run);
      product_backward<add>(x_b, g.middleCols(begin, columns), whole ? cache.adapter : of_run, gradients, dx.middleCols(begin, columns));
      if (rank.active == 0) return;
      const Vector<S> dn = -cache.scales.view().col(rank.active - 1).cwiseProduct(dm);
      cache.norms.add_backward(base, adapter, rank, dn, gradients.adapter);
    });
  }

  FrozenRows<S> frozen_;
};

}  // namespace dylora

#endif
