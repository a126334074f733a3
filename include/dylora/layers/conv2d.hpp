#ifndef DYLORA_LAYERS_CONV2D_HPP
#define DYLORA_LAYERS_CONV2D_HPP

#include <algorithm>
#include <concepts>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/layers/layer.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/layers/unfold.hpp"
#include "dylora/linalg/buffer.hpp"
#include "dylora/weights/dense.hpp"
#include "dylora/weights/weight.hpp"

namespace dylora {

struct Conv2dOptions {
  Index in_channels = 1;
  Extent image = {};  ///< the size of the input
  Extent kernel = {};
  Extent stride = {};
  Extent padding = {0, 0};
  Extent dilation = {};
  Index groups = 1;
};

/// A projection that drops inputs of its own accord. On patches that would keep a pixel in one of them and drop it in the next, where
/// PyTorch drops pixels, before the convolution.
template <class P>
concept DroppingProjection = requires(typename P::Cache& cache) { cache.rng; } || requires(typename P::Cache& cache) { cache.adapter.rng; } ||
                             requires(typename P::Cache& cache) { cache.adapter.slices.front().rng; };

/// y[o, p] = bias[o] + Σ_cij W[o, c, i, j] · x[c, p · stride + (i, j) · dilation − padding], and an adapter: a projection of the patches of
/// x. With Linear<S>, the default, ΔW[o, c, :, :] = s(b) · Σ_k<b B[o, k] · A[k, c, :, :]: a convolution down to b channels and a 1 × 1
/// convolution up, as PEFT has it (LoRA, arXiv 2106.09685), at DyLoRA's nested ranks (arXiv 2210.07558).
///
///     Conv2d<float> conv(W, {.in_channels = 16, .image = {32, 32}, .kernel = {3, 3}, .padding = {1, 1}}, {.max_rank = 8}, rng);
///     Conv2d<float>::Cache cache;
///     auto gradients = zeros_like(conv);
///     const MatrixX<float> y = conv.forward(x, 4, cache);            // x (16 · 32 · 32) × n, at rank 4
///     const MatrixX<float> dx = conv.backward(dy, cache, gradients);
///
/// A sample is a column: its channels one after the other, each row by row, as PyTorch has them (C × H × W). W is PyTorch's weight
/// [out, in / groups, kernel height, kernel width] as a matrix of out rows: the same memory as a RowMatrix. A group's output channels read
/// its input channels; each has a projection, and so an adapter with all of its ranks, of its own: "0.lora_A", "1.lora_A" and so on where
/// there is more than one, else "lora_A". Memory holds a copy of x, the patches of some positions at a time (a megabyte of floats, or one
/// patch), and what the projections keep: b values for each position. Backward makes the patches again.
template <std::floating_point S, Projection P = Linear<S>>
  requires(!DroppingProjection<P>)
struct Conv2d : KeepsInput<Conv2d<S, P>, S> {
  using Scalar = S;
  static constexpr std::string_view name = "Conv2d";
  static constexpr bool needs_linked_cache = !SelfContained<P>;

  struct Gradients {
    std::vector<typename P::Gradients> groups;
  };

  struct Workspace {
    typename P::Workspace group;       // which the groups take turns with
    Buffer<S> patches, dy, d_patches;  // of some positions
  };

  /// Filled by one forward or apply, read by any number of backward.
  struct Cache {
    Buffer<S> x;  // empty where the caller keeps x
    BatchRanks ranks = RankSlice::none();
    Index samples = 0;
    std::size_t used = 0;                  // of the parts
    std::vector<typename P::Cache> parts;  // of some positions each, group after group
    Buffer<S> patches, y;                  // scratch memory of apply
  };

  Unfold unfold;
  std::vector<P> groups;  // each from the patches of its input channels to its output channels

  /// Throws std::invalid_argument if there is no group or the channels do not divide into them, ShapeError if a projection does not fit.
  Conv2d(Unfold unfold_, std::vector<P> groups_) : unfold(std::move(unfold_)), groups(std::move(groups_)) {
    require_in_range(static_cast<Index>(groups.size()), 1, in_channels(), "Conv2d: groups");
    require_equal(in_channels() % static_cast<Index>(groups.size()), 0, "Conv2d: input channels modulo groups");
    for (const P& group : groups) {
      require_equal(group.in_features(), unfold.patch_size(group_channels()), "Conv2d: in_features of a group (channels · kernel)");
      require_equal(group.out_features(), groups.front().out_features(), "Conv2d: out_features of a group");
    }
  }

  /// With fresh adapters, which leave the output of the weight as it is. weight out × (in / groups · kernel), to be copied; around views of
  /// one, make the projections yourself.
  template <class Q = P, class W = decltype(Q::base), class Options = typename decltype(Q::adapter)::Options>
    requires std::constructible_from<Q, W, Options, Rng&> && std::constructible_from<W, MatrixX<S>, VectorX<S>>
  Conv2d(std::type_identity_t<W> weight, Conv2dOptions options, std::type_identity_t<Options> adapter, Rng& rng)
      : Conv2d(unfold_of(options), divided(weight, options.groups, [&](W part) { return P(std::move(part), adapter, rng); })) {}

  /// Frozen.
  template <class Q = P, class W = decltype(Q::base)>
    requires std::constructible_from<Q, W> && std::constructible_from<W, MatrixX<S>, VectorX<S>>
  Conv2d(std::type_identity_t<W> weight, Conv2dOptions options)
      : Conv2d(unfold_of(options), divided(weight, options.groups, [](W part) { return P(std::move(part)); })) {}

  Index in_channels() const { return unfold.options().channels; }
  Index out_channels() const { return static_cast<Index>(groups.size()) * groups.front().out_features(); }
  Index in_features() const { return unfold.image_size(); }                   ///< in_channels · height · width
  Index out_features() const { return out_channels() * unfold.positions(); }  ///< out_channels · height · width of the output
  /// The largest of any group.
  Index max_rank() const {
    Index largest = 0;
    for (const P& group : groups) largest = std::max(largest, group.max_rank());
    return largest;
  }

  /// y = x convolved with W + Δ_b, plus bias, for a caller that keeps x, as composite layers do and as forward does.
  ///
  /// x in_features × n; y out_features × n, overwritten; the cache is overwritten, and holds no x. A rank above max_rank means all
  /// components. Throws ShapeError if x or y do not fit. For each group costs 2·n·positions·(out·patch + b·(patch + out)) flops.
  void apply(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.x.resize(in_features(), 0);  // the caller has it: one of an earlier forward must not stand in for it
    cache.samples = 0;
    require_equal(x.rows(), in_features(), "Conv2d::forward: rows of x");
    require_samples(x.cols(), "Conv2d::forward: x");
    require_equal(y.rows(), out_features(), "Conv2d::forward: rows of y");
    require_equal(y.cols(), x.cols(), "Conv2d::forward: samples in y");
    cache.ranks = ranks;
    for_each_part(x.cols(), ranks, [&](std::size_t part, std::size_t group, Index begin, Index count, RankSlice rank) {
      cache.used = part + 1;
      if (cache.parts.size() < cache.used) cache.parts.resize(cache.used);
      auto patches = cache.patches.resize(unfold.patch_size(group_channels()), count);
      auto of_part = cache.y.resize(groups[group].out_features(), count);
      unfold.template gather<S>(x, first_channel(group), group_channels(), begin, patches);
      groups[group].apply(patches, rank, cache.parts[part], of_part);
      unfold.template put_output<S>(of_part, first_output(group), begin, y);
    });
    cache.samples = x.cols();
  }

  /// Throws what a backward would throw for these arguments, and touches nothing.
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& workspace) const {
    require_equal(dy.rows(), out_features(), "Conv2d::backward: rows of dy");
    require_equal(dy.cols(), cache.samples, "Conv2d::backward: samples in dy, against the cache (was it filled by forward?)");
    require_equal(x.rows(), in_features(), "Conv2d::backward: rows of x");
    require_equal(x.cols(), dy.cols(), "Conv2d::backward: samples in x");
    require_shapes(*this, "Conv2d::backward: gradient of", gradients);
    Index parts = 0;
    for_each_part(dy.cols(), cache.ranks, [&](std::size_t, std::size_t, Index, Index, RankSlice) { ++parts; });
    require_equal(static_cast<Index>(cache.used), parts, "Conv2d::backward: parts in the cache");
    for_each_part(dy.cols(), cache.ranks, [&](std::size_t part, std::size_t group, Index, Index count, RankSlice) {
      groups[group].check_backward(detail::of_shape<S>(unfold.patch_size(group_channels()), count),
                                   detail::of_shape<S>(groups[group].out_features(), count), cache.parts[part], gradients.groups[group],
                                   workspace.group);
    });
  }

  /// The backward of apply, with the same x: gradients += ∂/∂θ, at the ranks of the cached forward, and dx = the convolution transposed, of
  /// dy with W + Δ_b. dy out_features × n; dx in_features × n, overwritten. Throws ShapeError, with nothing added, if something does not
  /// fit or the cache was not filled.
  void set_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    backward_into<detail::Dx::set>(x, dy, cache, gradients, workspace, dx);
  }

  /// The same, but dx is added to, as where several projections read one x.
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    backward_into<detail::Dx::add>(x, dy, cache, gradients, workspace, dx);
  }

  /// The same without dx.
  void add_gradients(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    MatrixX<S> none;
    backward_into<detail::Dx::none>(x, dy, cache, gradients, workspace, none);
  }

  /// The convolution with W + Δ_b, frozen; this one stays as it is. Throws std::invalid_argument for the rank.
  Conv2d<S, FrozenLinear<S>> merged(RankSlice rank) const
    requires requires(const P& group) {
      { group.merged(rank) } -> std::convertible_to<DenseWeight<S>>;
    }
  {
    require_ranks(rank, in_features(), max_rank(), "Conv2d::merged");
    std::vector<FrozenLinear<S>> frozen;
    for (const P& group : groups) frozen.emplace_back(group.merged(rank.at_most(group.max_rank())));
    return {unfold, std::move(frozen)};
  }

  /// The frozen weight of all groups and the bias, for PyTorch: conv.merged(8).weight().
  DenseWeight<S> weight() const
    requires MergeableWeight<decltype(P::base)>
  {
    MatrixX<S> W(out_channels(), groups.front().in_features());
    VectorX<S> bias(groups.front().base.dense_bias().size() > 0 ? out_channels() : 0);
    for (std::size_t i = 0; i < groups.size(); ++i) {
      W.middleRows(first_output(i), groups[i].out_features()) = groups[i].base.dense();
      if (bias.size() > 0) bias.segment(first_output(i), groups[i].out_features()) = groups[i].base.dense_bias();
    }
    return {std::move(W), std::move(bias)};
  }

  static void members(const auto& f, auto& first, auto&... beside) {
    (detail::match_size(beside.groups, first.groups.size(), "Conv2d"), ...);
    if (first.groups.size() == 1) return f(Child<P>{}, first.groups.front(), beside.groups.front()...);
    f(Child<P>{}, first.groups, beside.groups...);
  }

 private:
  static constexpr Index most_elements = Index{1} << 18;  // of a workspace

  static Unfold unfold_of(const Conv2dOptions& o) { return Unfold({o.in_channels, o.image, o.kernel, o.stride, o.padding, o.dilation}); }

  /// What `make` makes of the rows of each group.
  template <class Weight, class Make>
  static std::vector<P> divided(const Weight& weight, Index count, const Make& make) {
    require_in_range(count, 1, weight.rows(), "Conv2d: groups");
    require_equal(weight.rows() % count, 0, "Conv2d: output channels modulo groups");
    const MatrixX<S> W = weight.dense();
    const VectorX<S> bias = weight.dense_bias();
    const Index rows = W.rows() / count;
    std::vector<P> groups;
    for (Index first = 0; first < W.rows(); first += rows)
      groups.push_back(make({W.middleRows(first, rows).eval(), bias.size() > 0 ? bias.segment(first, rows).eval() : bias}));
    return groups;
  }

  Index group_channels() const { return in_channels() / static_cast<Index>(groups.size()); }
  Index first_channel(std::size_t group) const { return static_cast<Index>(group) * group_channels(); }
  Index first_output(std::size_t group) const { return static_cast<Index>(group) * groups[group].out_features(); }

  /// Calls f(part, group, first position, positions, rank) for each group at some positions of each run. Where a part ends depends on
  /// shapes and on the run alone, so that a run has the same bits wherever it is.
  template <class F>
  void for_each_part(Index samples, const BatchRanks& ranks, const F& f) const {
    const Index widest = std::max(unfold.patch_size(group_channels()), groups.front().out_features());
    const Index at_once = std::max<Index>(1, most_elements / widest), positions = unfold.positions();
    std::size_t part = 0;
    ranks.for_each_run(samples, [&](Index begin, Index count, RankSlice rank) {
      const Index end = (begin + count) * positions;
      for (Index first = begin * positions; first < end; first += at_once) {
        for (std::size_t group = 0; group < groups.size(); ++group) f(part++, group, first, std::min(at_once, end - first), rank);
      }
    });
  }

  template <detail::Dx what>
  void backward_into(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                     MatrixRef<S> dx) const {
    if constexpr (what != detail::Dx::none) {
      require_equal(dx.rows(), in_features(), "Conv2d::backward: rows of dx");
      require_equal(dx.cols(), dy.cols(), "Conv2d::backward: samples in dx");
    }
    check_backward(x, dy, cache, gradients, workspace);
    if constexpr (what == detail::Dx::set) dx.setZero();
    for_each_part(dy.cols(), cache.ranks, [&](std::size_t part, std::size_t group, Index begin, Index count, RankSlice) {
      auto patches = workspace.patches.resize(unfold.patch_size(group_channels()), count);
      auto dy_of_part = workspace.dy.resize(groups[group].out_features(), count);
      unfold.template gather<S>(x, first_channel(group), group_channels(), begin, patches);
      unfold.template take_output<S>(dy, first_output(group), begin, dy_of_part);
      if constexpr (what == detail::Dx::none) {
        groups[group].add_gradients(patches, dy_of_part, cache.parts[part], gradients.groups[group], workspace.group);
      } else {
        auto d_patches = workspace.d_patches.resize(patches.rows(), count);
        groups[group].set_backward(patches, dy_of_part, cache.parts[part], gradients.groups[group], workspace.group, d_patches);
        unfold.template add_scatter<S>(d_patches, first_channel(group), group_channels(), begin, dx);
      }
    });
  }
};

}  // namespace dylora

#endif
