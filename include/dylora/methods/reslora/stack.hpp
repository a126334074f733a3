#ifndef DYLORA_METHODS_RESLORA_STACK_HPP
#define DYLORA_METHODS_RESLORA_STACK_HPP

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>
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
#include "dylora/layers/layer.hpp"
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
///     const MatrixX<float> y = stack.forward(x, 4, cache);
///     const MatrixX<float> dx = stack.backward(dy, cache, gradients);
///     const auto deployed = stack.merged(4);                                  // block shortcuts only: the others have no exact weight
///
/// Const both ways and safe to share, as Linear. Where other layers lie between the links, as in a transformer, link them yourself.
template <std::floating_point S, Shortcut shortcut, FrozenWeight W = DenseWeight<S>>
struct ResidualStack : KeepsInput<ResidualStack<S, shortcut, W>, S> {
  using Scalar = S;
  static constexpr std::string_view name = "ResidualStack";
  using Link = ResidualLink<S, shortcut, W>;

  struct Gradients {
    std::vector<typename Link::Gradients> links;
  };

  struct Workspace {
    std::vector<typename Link::Workspace> links;
    Buffer<S> d, next_d;
  };

  /// Filled by one forward or apply, read by any number of backward.
  struct Cache {
    Buffer<S> x;               // of the first link; empty where the caller keeps x
    std::vector<Buffer<S>> y;  // of every link but the last, which the next one reads
    std::vector<typename Link::Cache> links;
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

  /// y of the last link, for a caller that keeps x, as forward does. x in × n; y out × n, overwritten; the cache is overwritten, and holds
  /// no x. A rank above max_rank means all components. Throws ShapeError if x or y do not fit.
  void apply(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.x.resize(in_features(), 0);  // the caller has it: one of an earlier forward must not stand in for it
    const std::size_t last = links.size() - 1;
    cache.y.resize(last);
    cache.links.resize(links.size());
    require_samples(x.cols(), "ResidualStack::forward: x");
    require_equal(x.rows(), in_features(), "ResidualStack::forward: rows of x");
    require_equal(y.rows(), out_features(), "ResidualStack::forward: rows of y");
    require_equal(y.cols(), x.cols(), "ResidualStack::forward: samples in y");
    link_chain(links, cache.links);
    for (std::size_t n = 0; n < last; ++n)
      links[n].apply(input(x, cache, n), ranks, cache.links[n], cache.y[n].resize(links[n].out_features(), x.cols()));
    links[last].apply(input(x, cache, last), ranks, cache.links[last], y);
  }

  /// Throws what a backward would throw for these arguments, but for links that are called out of turn; touches nothing.
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& /*workspace*/) const {
    require_equal(static_cast<Index>(cache.links.size()), static_cast<Index>(links.size()), "ResidualStack::backward: links in the cache");
    require_equal(static_cast<Index>(cache.y.size()) + 1, static_cast<Index>(links.size()), "ResidualStack::backward: links in the cache");
    require_equal(dy.rows(), out_features(), "ResidualStack::backward: rows of dy");
    require_equal(x.rows(), in_features(), "ResidualStack::backward: rows of the cached x");
    require_equal(x.cols(), dy.cols(), "ResidualStack::backward: samples in x");
    for (std::size_t n = 0; n < links.size(); ++n) {
      if (n > 0) require_equal(cache.y[n - 1].rows(), links[n].in_features(), "ResidualStack::backward: rows of the cached x");
      require_ranks(cache.links[n].adapter.ranks, dy.cols(), links[n].adapter.inner.components(), "ResidualStack::backward: the cache");
    }
    require_shapes(*this, "ResidualStack::backward: gradient of", gradients);
  }

  /// The backward of apply, with the same x: gradients are added to; dy out × n; dx in × n, overwritten.
  /// Throws ShapeError, with nothing added, if something does not fit or the cache was not filled.
  void set_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    check_dx(dy, dx);
    const ConstMatrixRef<S> d = down_to_first(x, dy, cache, gradients, workspace);
    links[0].set_backward(x, d, cache.links[0], gradients.links[0], workspace.links[0], dx);
  }

  /// The same, but dx is added to.
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    check_dx(dy, dx);
    const ConstMatrixRef<S> d = down_to_first(x, dy, cache, gradients, workspace);
    links[0].add_backward(x, d, cache.links[0], gradients.links[0], workspace.links[0], dx);
  }

  /// The same without dx.
  void add_gradients(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    const ConstMatrixRef<S> d = down_to_first(x, dy, cache, gradients, workspace);
    links[0].add_gradients(x, d, cache.links[0], gradients.links[0], workspace.links[0]);
  }

  /// Every link as a plain weight W_n + s · Σ_q B_q A_q, in a stack without adapters; this one stays as it is. Throws std::invalid_argument
  /// for the rank.
  ResidualStack<S, shortcut> merged(RankSlice rank) const
    requires(shortcut == Shortcut::block && MergeableWeight<W>)
  {
    std::vector<ResidualLink<S, shortcut>> plain;
    for (DenseWeight<S>& weight : merge_blocks(links, rank)) {
      LowRank<S> none(RowMatrix<S>(0, weight.cols()), MatrixX<S>(weight.rows(), 0), {});
      plain.emplace_back(std::move(weight), ResidualLowRank<S, shortcut>(std::move(none), 0, 0));
    }
    return ResidualStack<S, shortcut>(std::move(plain));
  }

  static void members(const auto& f, auto&... t) { f(Child<Link>{"links"}, t.links...); }

 private:
  /// What link n reads.
  static ConstMatrixRef<S> input(ConstMatrixRef<S> x, const Cache& cache, std::size_t n) {
    return n == 0 ? x : ConstMatrixRef<S>(cache.y[n - 1].view());
  }

  void check_dx(ConstMatrixRef<S> dy, ConstMatrixRef<S> dx) const {
    require_equal(dx.rows(), in_features(), "ResidualStack::backward: rows of dx");
    require_equal(dx.cols(), dy.cols(), "ResidualStack::backward: samples in dx");
  }

  /// The backward of every link but the first; returns the gradient of what the first one gave.
  ConstMatrixRef<S> down_to_first(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients,
                                  Workspace& workspace) const {
    check_backward(x, dy, cache, gradients, workspace);
    workspace.links.resize(links.size());
    link_chain(gradients.links, workspace.links);
    for (std::size_t n = links.size(); n-- > 1;) {
      const auto d = n + 1 == links.size() ? dy : ConstMatrixRef<S>(workspace.d.view());
      auto next_d = workspace.next_d.resize(links[n].in_features(), dy.cols());
      links[n].set_backward(input(x, cache, n), d, cache.links[n], gradients.links[n], workspace.links[n], next_d);
      std::swap(workspace.d, workspace.next_d);
    }
    return links.size() == 1 ? dy : ConstMatrixRef<S>(workspace.d.view());
  }

  static std::vector<Link> fresh(std::vector<W> bases, const ResidualOptions& options, Rng& rng) {
    std::vector<Link> links;
    for (W& base : bases) links.emplace_back(std::move(base), options, rng);
    return links;
  }
};

}  // namespace dylora

#endif
