#ifndef DYLORA_TESTS_LAYERS_RESIDUAL_UNDER_TEST_HPP
#define DYLORA_TESTS_LAYERS_RESIDUAL_UNDER_TEST_HPP

#include <utility>
#include <vector>

#include "dylora/layers/layer.hpp"
#include "dylora/methods/reslora/link.hpp"
#include "dylora/methods/reslora/residual_low_rank.hpp"
#include "dylora/methods/reslora/shortcut.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

/// Residual links and chains of them, as the tests use them.
namespace dylora::test {

/// T of each shortcut, over any scalar.
template <template <class, Shortcut> class T>
struct EachShortcut {
  template <class S>
  using Input = T<S, Shortcut::input>;
  template <class S>
  using Block = T<S, Shortcut::block>;
  template <class S>
  using Middle = T<S, Shortcut::middle>;

  using UnderTest = InFloatAndDouble<Input, Block, Middle>;
};

template <class S, Shortcut shortcut>
ResidualOptions options_of(As<ResidualLowRank<S, shortcut>>, Index out, Index max_rank) {
  return {.adapter = options_of(As<LowRank<S>>{}, out, max_rank)};
}

/// `count` trained links of features × features.
template <class S, Shortcut shortcut>
std::vector<ResidualLink<S, shortcut>> make_links(Index count, Index reach = -1, Index features = 6, Index max_rank = law_rank) {
  std::vector<ResidualLink<S, shortcut>> links;
  for (Index n = 0; n < count; ++n) {
    const auto seed = static_cast<std::uint64_t>(10 * n);
    auto adapter = make_adapter<ResidualLowRank<S, shortcut>>(features, features, max_rank, seed + 2);
    adapter.reach = reach;
    adapter.position = n;
    links.emplace_back(MakeWeight<DenseWeight<S>>::make(features, features, n % 2 == 0, seed), std::move(adapter));
    randomize<ResidualLink<S, shortcut>>(links.back(), seed + 3);
  }
  return links;
}

/// x_{n+1} = tanh(h_n): a chain as it lies in a model, where its links read what other layers make of the links' outputs.
template <class S, Shortcut shortcut>
struct TanhChain : BackwardWithoutWorkspace<TanhChain<S, shortcut>, S> {
  using Scalar = S;
  using Link = ResidualLink<S, shortcut>;

  struct Gradients {
    std::vector<typename Link::Gradients> links;
  };
  struct Workspace {
    std::vector<typename Link::Workspace> links;
  };
  struct Cache {
    std::vector<MatrixX<S>> x;  // and the output
    std::vector<typename Link::Cache> links;
  };

  std::vector<Link> links;

  Index in_features() const { return links.front().in_features(); }
  Index out_features() const { return links.back().out_features(); }
  Index max_rank() const { return links.front().max_rank(); }

  MatrixX<S> forward(ConstMatrixRef<S> x, const BatchRanks& ranks) const {
    Cache cache;
    return forward(x, ranks, cache);
  }
  MatrixX<S> forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const {
    cache.links.resize(links.size());
    link_chain(links, cache.links);
    cache.x = {MatrixX<S>(x)};
    for (std::size_t n = 0; n < links.size(); ++n) {
      MatrixX<S> h(links[n].out_features(), x.cols());
      links[n].apply(cache.x[n], ranks, cache.links[n], h);
      cache.x.push_back(h.array().tanh());
    }
    return cache.x.back();
  }
  void forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const { y = forward(x, ranks, cache); }

  using BackwardWithoutWorkspace<TanhChain, S>::backward;
  void backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace, MatrixRef<S> dx) const {
    gradients.links.resize(links.size());
    workspace.links.resize(links.size());
    link_chain(gradients.links, workspace.links);
    MatrixX<S> d = dy;
    for (std::size_t n = links.size(); n-- > 0;) {
      d.array() *= 1 - cache.x[n + 1].array().square();
      MatrixX<S> below(links[n].in_features(), d.cols());
      links[n].set_backward(cache.x[n], d, cache.links[n], gradients.links[n], workspace.links[n], below);
      d = below;
    }
    dx = d;
  }

  static void members(const auto& f, auto&... t) { f(Child<Link>{"links"}, t.links...); }
};

}  // namespace dylora::test

#endif
