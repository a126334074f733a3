#ifndef DYLORA_METHODS_RESLORA_STACK_HPP
#define DYLORA_METHODS_RESLORA_STACK_HPP

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/buffer.hpp"
#include "dylora/methods/reslora/link.hpp"
#include "dylora/methods/reslora/merge.hpp"
#include "dylora/weights/dense.hpp"
#include "dylora/weights/weight.hpp"

namespace dylora {

/// x_{n+1} = W_n x_n + bias_n + Δ_n: residual links one after the other, and nothing between them (ResLoRA, arXiv 2402.18039; the equations
/// are those of methods/reslora/residual_low_rank.hpp).
///
///     ResidualStack<float, Shortcut::block> stack({W0, W1, W2}, {.adapter = {.max_rank = 8}}, rng);
///     ResidualStack<float, Shortcut::block>::Cache cache;
///     auto gradients = zeros_like(stack);
///     const Matrix<float> y = stack.forward(x, 4, cache);
///     const Matrix<float> dx = stack.backward(dy, cache, gradients);
///     const auto deployed = stack.merged(4);                                  // block shortcuts only: the others have no exact weight
///
/// Const both ways and safe to share, as Linear. Where other layers lie between the links, as in a transformer, link them yourself.
template <std::floating_point S, Shortcut shortcut, FrozenWeight W = DenseWeight<S>>
struct ResidualStack {
  using Scalar = S;
  using Link = ResidualLink<S, shortcut, W>;

  struct Gradients {
    std::vector<typename Link::Gradients> links;
    Buffer<S> d, next_d;
  };

  /// Filled by one forward, read by any number of backward.
  struct Cache {
    std::vector<Buffer<S>> x;
    std::vector<typename Link::ProjectionCache> links;
  };

  std::vector<Link> links;

  /// Gives each link its position. Throws ShapeError if a link does not take what the one before gives, or if two that share something are
  /// not of one shape; std::invalid_argument if there is none.
  explicit ResidualStack(std::vector<Link> links_) : links(std::move(links_)) {
    if (links.empty()) throw std::invalid_argument("ResidualStack: links: expected at least one, got none");
    for (std::size_t n = 0; n < links.size(); ++n) links[n].adapter.position = static_cast<Index>(n);
    for (std::size_t n = 1; n < links.size(); ++n)
      require_equal(links[n].in_features(), links[n - 1].out_features(),
                    "ResidualStack: in_features of a link, against what the one before gives");
    require_chain(links);
  }

  /// With fresh adapters, which leave the bases' output as it is.
  ResidualStack(std::vector<W> bases, ResidualOptions options, Rng& rng) : ResidualStack(fresh(std::move(bases), options, rng)) {}

  Index in_features() const { return links.front().in_features(); }
  Index out_features() const { return links.back().out_features(); }
  Index max_rank() const {
    Index largest = 0;
    for (const Link& link : links) largest = std::max(largest, link.max_rank());
    return largest;
  }

  /// y of the last link, for inference. x in × n; b ≤ max_rank, one for all columns or one for each run of them; returns out × n.
  /// Throws ShapeError if x does not fit or has no column, std::invalid_argument for the rank.
  Matrix<S> forward(ConstMatrixRef<S> x, const BatchRanks& ranks) const {
    Cache scratch;
    return forward(x, ranks, scratch);
  }

  /// The same, and keeps in the cache (overwritten) what backward needs, a copy of x included.
  Matrix<S> forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const {
    Matrix<S> y(out_features(), x.cols());
    forward(x, ranks, cache, y);
    return y;
  }

  /// The same into the caller's y (out × n, overwritten); but for a list of ranks, allocates only when the cache grows.
  void forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.x.resize(links.size());
    cache.links.resize(links.size());
    cache.x[0].resize(in_features(), 0);  // if this call throws, the cache counts as not filled
    require_samples(x.cols(), "ResidualStack::forward: x");
    require_equal(x.rows(), in_features(), "ResidualStack::forward: rows of x");
    require_equal(y.rows(), out_features(), "ResidualStack::forward: rows of y");
    require_equal(y.cols(), x.cols(), "ResidualStack::forward: samples in y");
    require_ranks(ranks, x.cols(), max_rank(), "ResidualStack::forward");
    link(links, cache.links);
    const std::size_t last = links.size() - 1;
    for (std::size_t n = 0; n < last; ++n) {
      const auto input = n == 0 ? x : ConstMatrixRef<S>(cache.x[n].view());
      links[n].apply(input, ranks, cache.links[n], cache.x[n + 1].resize(links[n].out_features(), x.cols()));
    }
    links[last].apply(last == 0 ? x : ConstMatrixRef<S>(cache.x[last].view()), ranks, cache.links[last], y);
    cache.x[0].assign(x);
  }

  /// The vector-Jacobian product of the cached forward: gradients are added to; dy out × n; returns dx, in × n.
  /// Throws ShapeError if dy does not fit or the cache was not filled.
  Matrix<S> backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients) const {
    Matrix<S> dx(in_features(), dy.cols());
    backward(dy, cache, gradients, dx);
    return dx;
  }

  /// The same into the caller's dx (in × n, overwritten).
  void backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, MatrixRef<S> dx) const {
    require_samples(dy.cols(), "ResidualStack::backward: dy");
    require_equal(dy.cols(), cache.x.empty() ? 0 : cache.x[0].cols(),
                  "ResidualStack::backward: samples in dy, against the cache (was it filled by forward?)");
    require_equal(static_cast<Index>(cache.links.size()), static_cast<Index>(links.size()), "ResidualStack::backward: links in the cache");
    require_equal(dy.rows(), out_features(), "ResidualStack::backward: rows of dy");
    require_equal(dx.rows(), in_features(), "ResidualStack::backward: rows of dx");
    require_equal(dx.cols(), dy.cols(), "ResidualStack::backward: samples in dx");
    for (std::size_t n = 0; n < links.size(); ++n) {
      require_equal(cache.x[n].rows(), links[n].in_features(), "ResidualStack::backward: rows of the cached x");
      require_ranks(cache.links[n].ranks, dy.cols(), links[n].adapter.inner.components(), "ResidualStack::backward: the cache");
    }
    require_shapes(*this, "ResidualStack::backward: gradient of", gradients);
    link(gradients.links);
    for (std::size_t n = links.size(); n-- > 0;) {
      const auto d = n + 1 == links.size() ? dy : ConstMatrixRef<S>(gradients.d.view());
      auto next_d = gradients.next_d.resize(links[n].in_features(), n == 0 ? 0 : dy.cols());
      links[n].set_backward(cache.x[n].view(), d, cache.links[n], gradients.links[n], n == 0 ? dx : MatrixRef<S>(next_d));
      std::swap(gradients.d, gradients.next_d);
    }
  }

  /// Every link as a plain weight W_n + s · Σ_q B_q A_q, in a stack without adapters; this one stays as it is. Throws std::invalid_argument
  /// for the rank.
  ResidualStack<S, shortcut> merged(RankSlice rank) const
    requires(shortcut == Shortcut::block && MergeableWeight<W>)
  {
    std::vector<ResidualLink<S, shortcut>> plain;
    for (DenseWeight<S>& weight : merge_blocks(links, rank)) {
      LowRank<S> none(RowMatrix<S>(0, weight.cols()), Matrix<S>(weight.rows(), 0), {});
      plain.emplace_back(std::move(weight), ResidualLowRank<S, shortcut>(std::move(none), 0, 0));
    }
    return ResidualStack<S, shortcut>(std::move(plain));
  }

  template <class F, class... T>
  static void zip_parameters(F&& f, T&... t) {
    zip_links(f, t.links...);
  }

 private:
  static std::vector<Link> fresh(std::vector<W> bases, const ResidualOptions& options, Rng& rng) {
    std::vector<Link> links;
    for (W& base : bases) links.emplace_back(std::move(base), options, rng);
    return links;
  }

  /// As zip_elements, which asks for elements that can be made from nothing.
  template <class F, class First, class... Rest>
  static void zip_links(F& f, First& first, Rest&... rest) {
    (match(rest, first.size()), ...);
    for (std::size_t n = 0; n < first.size(); ++n) Link::zip_parameters(scoped("links." + std::to_string(n), f), first[n], rest[n]...);
  }

  template <class Beside>
  static void match(Beside& beside, std::size_t count) {
    if constexpr (!std::is_const_v<Beside> && std::default_initializable<typename Beside::value_type>) beside.resize(count);
    require_equal(static_cast<Index>(beside.size()), static_cast<Index>(count), "ResidualStack: number of links");
  }
};

}  // namespace dylora

#endif
