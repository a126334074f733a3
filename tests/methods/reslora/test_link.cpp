#include "dylora/methods/chain/chain.hpp"
#include "dylora/methods/reslora/link.hpp"
#include "dylora/methods/reslora/residual_low_rank.hpp"
#include "dylora/methods/reslora/shortcut.hpp"

#include <array>
#include <cmath>
#include <utility>

#include "dylora/core/sequences.hpp"
#include "dylora/layers/attention/attention.hpp"
#include "dylora/ranks/truncate.hpp"
#include "dylora/testing/gradient_check.hpp"
#include "methods/reslora/residual_under_test.hpp"
#include "support/law.hpp"
#include "support/threads.hpp"
#include "support/throws.hpp"

namespace dylora::test {

template <class S, Shortcut shortcut>
struct Kind {
  using Scalar = S;
  using Link = ResidualLink<S, shortcut>;
  using Cache = typename Link::Cache;
  using Gradients = typename Link::Gradients;
  using Workspace = typename Link::Workspace;
  using Chain = TanhChain<S, shortcut>;
  static constexpr Shortcut kind = shortcut;

  static std::vector<Link> links(Index count, Index reach = -1) { return make_links<S, shortcut>(count, reach); }
};
template <class S>
using Kinds = std::tuple<Kind<S, Shortcut::input>, Kind<S, Shortcut::block>, Kind<S, Shortcut::middle>>;
using InDouble = Kinds<double>;
using InFloat = Kinds<float>;

/// Forward and backward of unrelated inputs through a chain.
template <class K>
struct Batch {
  using S = typename K::Scalar;
  std::vector<MatrixX<S>> x, dy;

  Batch(std::size_t count, Index samples, std::uint64_t seed) {
    for (std::size_t n = 0; n < count; ++n) {
      x.push_back(noise<S>(6, samples, seed + n));
      dy.push_back(noise<S>(6, samples, seed + 100 + n));
    }
  }

  std::vector<MatrixX<S>> forward(const std::vector<typename K::Link>& links, const BatchRanks& ranks,
                                  std::vector<typename K::Cache>& caches) const {
    std::vector<MatrixX<S>> y;
    for (std::size_t n = 0; n < links.size(); ++n) {
      y.emplace_back(6, x[n].cols());
      links[n].apply(x[n], ranks, caches[n], y.back());
    }
    return y;
  }

  std::vector<MatrixX<S>> backward(const std::vector<typename K::Link>& links, const std::vector<typename K::Cache>& caches,
                                   std::vector<typename K::Gradients>& gradients, std::vector<typename K::Workspace>& workspaces) const {
    std::vector<MatrixX<S>> dx(links.size());
    for (std::size_t n = links.size(); n-- > 0;) {
      dx[n].resize(6, x[n].cols());
      links[n].set_backward(x[n], dy[n], caches[n], gradients[n], workspaces[n], dx[n]);
    }
    return dx;
  }

  /// y and dx of one call, linked for it; gradients are added to.
  std::pair<std::vector<MatrixX<S>>, std::vector<MatrixX<S>>> run(const std::vector<typename K::Link>& links, const BatchRanks& ranks,
                                                                  std::vector<typename K::Cache>& caches,
                                                                  std::vector<typename K::Gradients>& gradients) const {
    std::vector<typename K::Workspace> workspaces(links.size());
    link_chain(links, caches);
    auto y = forward(links, ranks, caches);
    link_chain(gradients, workspaces);
    auto dx = backward(links, caches, gradients, workspaces);
    return {std::move(y), std::move(dx)};
  }
};

/// y and dx of a weight.
inline std::pair<MatrixX<float>, MatrixX<float>> run(const FrozenLinear<float>& base, const MatrixX<float>& x, const MatrixX<float>& dy) {
  FrozenLinear<float>::Cache cache;
  FrozenLinear<float>::Gradients none;
  const MatrixX<float> y = base.forward(x, RankSlice::none(), cache);
  return {y, base.backward(dy, cache, none)};
}

template <class Link>
std::vector<typename Link::Gradients> zeros(const std::vector<Link>& links) {
  std::vector<typename Link::Gradients> gradients;
  for (const Link& link : links) gradients.push_back(zeros_like(link));
  return gradients;
}

/// Calls f(n, rank, batch, y, dx, gradient) for the n-th of three links, after a call at each slice.
template <class K, class F>
void for_each_call(const std::vector<typename K::Link>& links, F&& f) {
  const Batch<K> batch(3, 4, 1);
  std::vector<typename K::Cache> caches(3);
  for (const RankSlice rank : law_slices()) {
    auto gradients = zeros(links);
    const auto [y, dx] = batch.run(links, rank, caches, gradients);
    for (std::size_t n = 0; n < 3; ++n) f(n, rank, batch, y[n], dx[n], gradients[n]);
  }
}

template <class Link>
VectorX<typename Link::Scalar> all_values(const std::vector<typename Link::Gradients>& gradients) {
  std::vector<VectorX<typename Link::Scalar>> parts;
  for (const auto& g : gradients) parts.push_back(values<Link>(g));
  return joined<typename Link::Scalar>(parts);
}

TEMPLATE_LIST_TEST_CASE("a residual chain computes its equation at every rank and reach", "", InDouble) {
  using K = TestType;
  for (const Index reach : {-1, 0, 1, 2, 7}) {
    const auto links = K::links(4, reach);
    const Batch<K> batch(4, 3, 20);
    std::vector<typename K::Cache> caches(4);
    for (Index b = 1; b <= law_rank; ++b) {
      link_chain(links, caches);
      const auto y = batch.forward(links, b, caches);
      for (Index n = 0; n < 4; ++n) {
        const auto at = [&](Index q) { return static_cast<std::size_t>(q); };
        const auto A = [&](Index q) -> MatrixX<double> { return links[at(q)].adapter.inner.A.topRows(b); };
        const auto B = [&](Index q) -> MatrixX<double> { return links[at(q)].adapter.inner.B.leftCols(b); };
        const auto x = [&](Index q) { return batch.x[at(q)]; };
        MatrixX<double> delta = MatrixX<double>::Zero(6, 3);
        const Index back = reach < 0 ? n : std::min(n, reach);
        if (K::kind == Shortcut::input) delta = B(n) * A(n) * (x(n) + x(n == 0 ? 0 : n - 1));
        for (Index q = n - back; q <= n; ++q) {
          if (K::kind == Shortcut::block) delta += B(q) * A(q) * x(n);
          if (K::kind == Shortcut::middle) delta += B(n) * A(q) * x(q);
        }
        MatrixX<double> expected = links[at(n)].base.W * x(n) + law_alpha / static_cast<double>(b) * delta;
        if (n % 2 == 0) expected.colwise() += links[at(n)].base.bias;
        CHECK(gap(y[at(n)], expected) < rounding<double>);
      }
    }
  }
}

TEMPLATE_LIST_TEST_CASE("a residual chain's backward is the derivative through what lies between its links", "", InDouble) {
  using K = TestType;
  for (const Index reach : {-1, 0, 1, 2}) {
    typename K::Chain chain{{}, make_links<double, K::kind>(4, reach, 4, 3)};
    for (auto& link : chain.links) link.base.W *= 0.5;  // tanh at its slope
    for (const RankSlice rank : {RankSlice(1), RankSlice(2), RankSlice(3), RankSlice(3, 2), RankSlice(3, 1)}) {
      Rng rng(4);
      const GradientReport report = check_gradients(chain, MatrixX<double>(0.5 * noise<double>(4, 3, 1)), rank, rng);
      INFO("reach " << reach << ", " << describe(rank) << ": " << report.where);
      CHECK(report.error < 1e-6);
      CHECK(report.entries == 4 * 3 + parameter_count(chain));
    }
  }
}

/// Two attention blocks with all their projections linked.
template <Shortcut shortcut>
struct TwoAttentions : BackwardWithoutWorkspace<TwoAttentions<shortcut>, double> {
  using Scalar = double;
  using Block = Attention<double, ResidualLink<double, shortcut>>;
  struct Gradients {
    std::vector<typename Block::Gradients> blocks;
  };
  struct Workspace {
    std::vector<typename Block::Workspace> blocks;
  };
  struct Cache {
    std::vector<typename Block::Cache> blocks;
  };

  std::vector<Block> blocks;

  Index in_features() const { return blocks.front().in_features(); }
  Index out_features() const { return blocks.back().out_features(); }
  Index max_rank() const { return blocks.front().max_rank(); }

  static auto projections() { return std::tuple{[](auto& block) -> auto& {return block.q; }
  , [](auto& block) -> auto& { return block.k; }
  , [](auto& block) -> auto& { return block.v; }
  , [](auto& block) -> auto& { return block.o; }
};
}  // namespace dylora::test

MatrixX<double> forward(ConstMatrixRef<double> x, const BatchRanks& ranks) const {
  Cache cache;
  return forward(x, ranks, cache);
}
MatrixX<double> forward(ConstMatrixRef<double> x, const BatchRanks& ranks, Cache& cache) const {
  cache.blocks.resize(blocks.size());
  std::apply([&](auto... member) { (link_chain(blocks, cache.blocks, member), ...); }, projections());
  MatrixX<double> y = x;
  for (std::size_t i = 0; i < blocks.size(); ++i) y += blocks[i].forward(y, ranks, cache.blocks[i]);
  return y;
}
void forward(ConstMatrixRef<double> x, const BatchRanks& ranks, Cache& cache, MatrixRef<double> y) const { y = forward(x, ranks, cache); }
using BackwardWithoutWorkspace<TwoAttentions, double>::backward;
void backward(ConstMatrixRef<double> dy, const Cache& cache, Gradients& gradients, Workspace& workspace, MatrixRef<double> dx) const {
  workspace.blocks.resize(blocks.size());
  std::apply([&](auto... member) { (link_chain(gradients.blocks, workspace.blocks, member), ...); }, projections());
  dx = dy;
  for (std::size_t i = blocks.size(); i-- > 0;) {
    MatrixX<double> d(dx.rows(), dx.cols());
    blocks[i].backward(dx, cache.blocks[i], gradients.blocks[i], workspace.blocks[i], d);
    dx += d;
  }
}

static void members(const auto& f, auto&... t) { f(Child<Block>{"h"}, t.blocks...); }
}
;

TEMPLATE_LIST_TEST_CASE("projections of attention blocks can be linked kind by kind", "", InDouble) {
  TwoAttentions<TestType::kind> model;
  for (Index i = 0; i < 3; ++i) {
    const auto projection = [&](std::uint64_t seed) {
      auto adapter = make_adapter<ResidualLowRank<double, TestType::kind>>(4, 4, 3, seed);
      adapter.position = i;
      return typename TestType::Link(MakeWeight<DenseWeight<double>>::make(4, 4, false, seed + 1), std::move(adapter));
    };
    const auto seed = static_cast<std::uint64_t>(100 * i);
    model.blocks.push_back({projection(seed), projection(seed + 10), projection(seed + 20), projection(seed + 30), {.heads = 2}});
  }
  randomize<TwoAttentions<TestType::kind>>(model, 3);
  Rng rng(4);
  const GradientReport report = check_gradients(model, MatrixX<double>(0.5 * noise<double>(4, 4, 1)), {3, 1}, rng);
  INFO(report.where);
  CHECK(report.error < 1e-6);
  // The layers that a traversal finds are weights with an adapter each.
  int layers = 0;
  for_each_layer(model, [&](std::string_view, auto& layer) { layers += layer.adapter.max_rank() == 3 && layer.base.rows() == 4; });
  CHECK(layers == 12);
}

TEMPLATE_LIST_TEST_CASE("oracle of ResLoRA: links with B = 0 are their weights bit for bit", "", InFloat) {
  using K = TestType;
  auto links = K::links(3);
  for (auto& link : links) link.adapter.inner.B.setZero();
  for_each_call<K>(links, [&](std::size_t n, RankSlice, const auto& batch, const auto& y, const auto& dx, const auto& gradient) {
    const FrozenLinear<float> base(links[n].base);
    const auto expected = run(base, batch.x[n], batch.dy[n]);
    CHECK(same_bits(y, expected.first));
    CHECK(same_bits(dx, expected.second));
    CHECK_FALSE(gradient.adapter.inner.B.isZero(0));
  });
}

TEST_CASE("oracle of ResLoRA: block and middle links that reach no other are LoRA bit for bit") {
  const auto check = [](auto kind) {
    using K = decltype(kind);
    const auto links = K::links(3, 0);
    for_each_call<K>(links, [&](std::size_t n, RankSlice rank, const auto& batch, const auto& y, const auto& dx, const auto& gradient) {
      const Linear<float> lora(links[n].base, links[n].adapter.inner);
      Linear<float>::Cache cache;
      auto expected = zeros_like(lora);
      CHECK(same_bits(y, lora.forward(batch.x[n], rank, cache)));
      CHECK(same_bits(dx, lora.backward(batch.dy[n], cache, expected)));
      CHECK(same_bits(values<typename K::Link>(gradient), values<Linear<float>>(expected)));
    });
  };
  check(Kind<float, Shortcut::block>());
  check(Kind<float, Shortcut::middle>());
}

TEMPLATE_LIST_TEST_CASE("oracle of ResLoRA: evaluating and training leave every weight as it was bit for bit", "", InFloat) {
  using K = TestType;
  const auto links = K::links(3);
  const Batch<K> batch(3, 4, 1);
  std::vector<typename K::Cache> caches(3);
  auto gradients = zeros(links);
  for (int time = 0; time < 3; ++time) {
    (void)batch.run(links, 3, caches, gradients);
  }
  const auto untouched = K::links(3);
  for (std::size_t n = 0; n < 3; ++n) {
    CHECK(same_bits(links[n].base.W, untouched[n].base.W));
    CHECK(same_bits(links[n].base.bias, untouched[n].base.bias));
    CHECK(same_bits(values<typename K::Link>(links[n]), values<typename K::Link>(untouched[n])));
  }
}

TEST_CASE("the newest components of every link that a block shortcut reaches learn from the last output alone") {
  using K = Kind<double, Shortcut::block>;
  const auto links = K::links(4, 2);
  Batch<K> batch(4, 3, 1);
  for (std::size_t n = 0; n < 3; ++n) batch.dy[n].setZero();
  std::vector<K::Cache> caches(4);
  auto gradients = zeros(links);
  (void)batch.run(links, {4, 3}, caches, gradients);
  for (std::size_t n = 0; n < 4; ++n) {
    CHECK(gradients[n].adapter.inner.B.col(3).isZero(0) == (n == 0));
    CHECK(gradients[n].adapter.inner.A.row(3).isZero(0) == (n == 0));
    CHECK(component_values<K::Link>(gradients[n], 0, 3).isZero(0));
    CHECK(component_values<K::Link>(gradients[n], 4).isZero(0));
    CHECK(trained_components<K::Link>(gradients[n]) == std::vector<std::string>{"00010", "00010"});
  }
}

TEMPLATE_LIST_TEST_CASE("micro-batches of other sizes and ranks accumulate as if each had caches and workspaces of its own", "", InFloat) {
  using K = TestType;
  const auto links = K::links(3);
  std::vector<typename K::Cache> shared(3);
  std::vector<typename K::Workspace> workspaces(3);
  auto got = zeros(links), expected = zeros(links);
  const std::array<std::pair<Index, BatchRanks>, 4> micro_batches{
      {{5, 4}, {2, BatchRanks::per_sample({{2, 1}, 5})}, {5, 4}, {7, RankSlice::none()}}};
  std::uint64_t seed = 0;
  for (const auto& [samples, ranks] : micro_batches) {
    const Batch<K> batch(3, samples, ++seed);
    std::vector<typename K::Cache> own(3);
    link_chain(links, shared);
    link_chain(links, own);
    const auto y = batch.forward(links, ranks, shared), y_own = batch.forward(links, ranks, own);
    link_chain(got, workspaces);
    const auto dx = batch.backward(links, shared, got, workspaces);
    std::vector<typename K::Workspace> own_workspaces(3);
    link_chain(expected, own_workspaces);
    const auto dx_own = batch.backward(links, own, expected, own_workspaces);
    for (std::size_t n = 0; n < 3; ++n) {
      CHECK(same_bits(y[n], y_own[n]));
      CHECK(same_bits(dx[n], dx_own[n]));
    }
  }
  CHECK(same_bits(all_values<typename K::Link>(got), all_values<typename K::Link>(expected)));
}

TEMPLATE_LIST_TEST_CASE("a backward can be repeated on the caches of one forward, linked again or not", "", InDouble) {
  using K = TestType;
  const auto links = K::links(3);
  const Batch<K> batch(3, 4, 1);
  std::vector<typename K::Cache> caches(3);
  std::vector<typename K::Workspace> workspaces(3);
  auto once = zeros(links), twice = zeros(links);
  link_chain(links, caches);
  (void)batch.forward(links, 3, caches);
  link_chain(once, workspaces);
  const auto dx = batch.backward(links, caches, once, workspaces);
  link_chain(twice, workspaces);
  (void)batch.backward(links, caches, twice, workspaces);
  const auto again = batch.backward(links, caches, twice, workspaces);
  for (std::size_t n = 0; n < 3; ++n) CHECK(same_bits(again[n], dx[n]));
  CHECK(same_bits(all_values<typename K::Link>(twice), VectorX<double>(2 * all_values<typename K::Link>(once))));
}

TEMPLATE_LIST_TEST_CASE("copies of linked caches and workspaces are chains of their own once they are linked", "", InFloat) {
  using K = TestType;
  const auto links = K::links(3);
  const Batch<K> first(3, 4, 1), second(3, 4, 50);
  std::vector<typename K::Cache> caches(3);
  std::vector<typename K::Workspace> workspaces(3);
  auto gradients = zeros(links);
  link_chain(links, caches);
  const auto y = first.forward(links, 3, caches);
  link_chain(gradients, workspaces);
  auto other_caches = caches;
  auto other_gradients = gradients;
  auto other_workspaces = workspaces;
  link_chain(links, other_caches);
  (void)second.forward(links, 5, other_caches);
  link_chain(other_gradients, other_workspaces);
  (void)second.backward(links, other_caches, other_gradients, other_workspaces);
  const auto dx = first.backward(links, caches, gradients, workspaces);

  std::vector<typename K::Cache> fresh(3);
  auto expected = zeros(links);
  const auto dx_expected = first.run(links, 3, fresh, expected).second;
  for (std::size_t n = 0; n < 3; ++n) CHECK(same_bits(dx[n], dx_expected[n]));
  CHECK(same_bits(all_values<typename K::Link>(gradients), all_values<typename K::Link>(expected)));
}

TEMPLATE_LIST_TEST_CASE("copies of linked caches, gradients and workspaces, and those that have moved, are refused until they are linked",
                        "", InFloat) {
  using K = TestType;
  const auto links = K::links(3);
  const Batch<K> batch(3, 4, 1);
  MatrixX<float> y(6, 4), dx(6, 4);
  std::vector<typename K::Cache> caches(3);
  std::vector<typename K::Workspace> workspaces(3);
  auto gradients = zeros(links);
  link_chain(links, caches);
  auto copies = caches;
  for (std::size_t n = 0; n < 3; ++n)
    CHECK_THROWS_SAYING(std::invalid_argument, links[n].apply(batch.x[n], 3, copies[n], y), "cache", "linked for this adapter", "moved");
  (void)batch.forward(links, 3, caches);
  caches.reserve(caches.capacity() + 1);  // what was linked is no longer there
  for (std::size_t n = 0; n < 3; ++n)
    CHECK_THROWS_SAYING(std::invalid_argument, links[n].apply(batch.x[n], 3, caches[n], y), "cache", "linked for this adapter", "moved");
  link_chain(links, caches);
  (void)batch.forward(links, 3, caches);
  caches.reserve(caches.capacity() + 1);  // for a backward they may move
  auto expected = zeros(links);
  link_chain(expected, workspaces);
  const auto dx_expected = batch.backward(links, caches, expected, workspaces);

  const auto refused = [&](std::vector<typename K::Workspace>& given, const std::string& what, const std::string& wanted) {
    CHECK_THROWS_SAYING(std::invalid_argument, links[2].set_backward(batch.x[2], batch.dy[2], caches[2], gradients[2], given[2], dx), what,
                        wanted, "moved");
  };
  link_chain(gradients, workspaces);
  auto copied = workspaces;
  refused(copied, "workspace", "one that was linked");
  workspaces.reserve(workspaces.capacity() + 1);
  refused(workspaces, "workspace", "one that was linked");
  link_chain(gradients, workspaces);
  gradients.reserve(gradients.capacity() + 1);
  refused(workspaces, "gradients", "those that were linked");
  link_chain(gradients, workspaces);
  const auto got = batch.backward(links, caches, gradients, workspaces);
  for (std::size_t n = 0; n < 3; ++n) CHECK(same_bits(got[n], dx_expected[n]));
  CHECK(same_bits(all_values<typename K::Link>(gradients), all_values<typename K::Link>(expected)));
}

TEMPLATE_LIST_TEST_CASE("a link refuses what an earlier batch has left", "", InFloat) {
  using K = TestType;
  const auto links = K::links(3);
  const Batch<K> batch(3, 4, 1), small(3, 2, 1);
  std::vector<typename K::Cache> caches(3);
  MatrixX<float> y(6, 4), y_small(6, 2);
  link_chain(links, caches);
  CHECK_THROWS_SAYING(ShapeError, links[1].apply(batch.x[1], 3, caches[1], y), "earlier link", "this batch", "got none");
  (void)batch.forward(links, 3, caches);
  // The same size, so that nothing but the order of the calls tells.
  CHECK_THROWS_SAYING(ShapeError, links[2].apply(batch.x[2], 3, caches[2], y), "earlier link", "got that of another batch");
  CHECK_THROWS_SAYING(ShapeError, links[1].apply(batch.x[1], 3, caches[1], y), "earlier link", "got that of another batch");
  links[0].apply(batch.x[0], 3, caches[0], y);
  CHECK_THROWS_SAYING(ShapeError, links[2].apply(batch.x[2], 3, caches[2], y), "earlier link", "this batch");
  CHECK_THROWS_SAYING(ShapeError, links[1].apply(small.x[1], 3, caches[1], y_small), "samples in x", "expected 4", "got 2");
  links[1].apply(batch.x[1], 3, caches[1], y);
  links[2].apply(batch.x[2], 3, caches[2], y);
  // Linked for the next batch: nothing is left of this one.
  link_chain(links, caches);
  CHECK_THROWS_SAYING(ShapeError, links[1].apply(batch.x[1], 3, caches[1], y), "earlier link", "got none");
}

TEMPLATE_LIST_TEST_CASE("links of one chain refuse ranks that differ", "", InFloat) {
  using K = TestType;
  const auto links = K::links(2);
  const Batch<K> batch(2, 4, 1);
  std::vector<typename K::Cache> caches(2);
  MatrixX<float> y(6, 4);
  const auto refused = [&](const BatchRanks& ranks) {
    link_chain(links, caches);
    links[0].apply(batch.x[0], {4, 3}, caches[0], y);
    CHECK_THROWS_SAYING(std::invalid_argument, links[1].apply(batch.x[1], ranks, caches[1], y), "ranks", "earlier link (highest 4)",
                        "got others (highest " + std::to_string(ranks.highest()));
  };
  refused(3);
  refused(4);
  refused(BatchRanks::per_sample({{4, 3}, {4, 3}, {4, 3}, 1}));
  refused(RankSlice::none());
}

TEMPLATE_LIST_TEST_CASE("a link refuses a cache or a workspace that is not linked as its own", "", InFloat) {
  using K = TestType;
  const auto links = K::links(3);
  const Batch<K> batch(3, 4, 1);
  MatrixX<float> y(6, 4), dx(6, 4);
  std::vector<typename K::Cache> caches(3);
  std::vector<typename K::Workspace> workspaces(3);
  // As an inference that knows no chain would: rather an error than another function.
  CHECK_THROWS_SAYING(ShapeError, links[2].apply(batch.x[2], 3, caches[2], y), "earlier links of the cache", "linked", "expected 2",
                      "got 0");
  STATIC_REQUIRE_FALSE(Layer<typename K::Link>);
  STATIC_REQUIRE(Projection<typename K::Link>);
  const auto others = K::links(3);
  link_chain(others, caches);
  CHECK_THROWS_SAYING(std::invalid_argument, links[0].apply(batch.x[0], 3, caches[0], y), "cache", "linked for this adapter",
                      "got another's");
  link_chain(links, caches);
  (void)batch.forward(links, 3, caches);
  auto gradients = zeros(links);
  CHECK_THROWS_SAYING(ShapeError, links[2].set_backward(batch.x[2], batch.dy[2], caches[2], gradients[2], workspaces[2], dx),
                      "earlier links of the workspace", "linked", "expected 2", "got 0");
  link_chain(gradients, workspaces);
  CHECK_THROWS_SAYING(ShapeError, links[1].set_backward(batch.x[1], batch.dy[1], caches[1], gradients[1], workspaces[1], dx), "later links",
                      "expected 1", "got 0");
  links[2].set_backward(batch.x[2], batch.dy[2], caches[2], gradients[2], workspaces[2], dx);
  links[2].set_backward(batch.x[2], batch.dy[2], caches[2], gradients[2], workspaces[2], dx);
  CHECK_THROWS_SAYING(ShapeError, links[1].set_backward(batch.x[1], batch.dy[1], caches[1], gradients[1], workspaces[1], dx), "later links",
                      "expected 1", "got 2");
  // Linked again, what the unfinished backward has left is gone.
  link_chain(gradients, workspaces);
  for (auto& g : gradients) set_zero(links[0], g);
  auto expected = zeros(links);
  (void)batch.backward(links, caches, gradients, workspaces);
  link_chain(expected, workspaces);
  (void)batch.backward(links, caches, expected, workspaces);
  CHECK(same_bits(all_values<typename K::Link>(gradients), all_values<typename K::Link>(expected)));
}

TEMPLATE_LIST_TEST_CASE("a backward refuses a cache of another batch than the later links' and adds nothing", "", InFloat) {
  using K = TestType;
  const auto links = K::links(2);
  const Batch<K> batch(2, 4, 1), small(2, 2, 1);
  std::vector<typename K::Cache> caches(2), others(2);
  std::vector<typename K::Workspace> workspaces(2);
  link_chain(links, caches);
  (void)batch.forward(links, 3, caches);
  link_chain(links, others);
  (void)small.forward(links, 3, others);
  auto gradients = zeros(links);
  link_chain(gradients, workspaces);
  MatrixX<float> dx(6, 4), dx_small(6, 2);
  links[1].set_backward(batch.x[1], batch.dy[1], caches[1], gradients[1], workspaces[1], dx);
  CHECK_THROWS_SAYING(ShapeError, links[0].set_backward(small.x[0], small.dy[0], others[0], gradients[0], workspaces[0], dx_small), "cache",
                      "expected that of the batch", "4 samples", "got 2 samples");
  CHECK(values<typename K::Link>(gradients[0]).isZero(0));
  // Of the right batch, but not as zeros_like makes it.
  gradients[0].adapter.inner.B.resize(6, 1);
  CHECK_THROWS_SAYING(ShapeError, links[0].set_backward(batch.x[0], batch.dy[0], caches[0], gradients[0], workspaces[0], dx),
                      "gradient of lora_B", "6 × 5", "got 6 × 1");
}

TEMPLATE_LIST_TEST_CASE("a chain is refused unless its links have one shape and are in their places", "", InFloat) {
  using K = TestType;
  std::vector<typename K::Cache> caches(3);
  auto links = K::links(3);
  links[2].adapter.position = 1;
  CHECK_THROWS_SAYING(ShapeError, link_chain(links, caches), "position", "expected 2", "got 1");
  links = K::links(3);
  links[1].adapter.reach = 1;
  CHECK_THROWS_SAYING(ShapeError, link_chain(links, caches), "reach", "expected -1", "got 1");
  links = K::links(3);
  truncate(links[1], 4);
  CHECK_THROWS_SAYING(ShapeError, link_chain(links, caches), "components", "expected 4", "got 5");
  links = K::links(3);
  const auto replaced = [&](Index in, Index out) {
    auto adapter = make_adapter<ResidualLowRank<float, K::kind>>(in, out, 5, 1);
    adapter.position = 1;
    links[1] = typename K::Link(MakeWeight<DenseWeight<float>>::make(out, in, false, 1), adapter);
  };
  replaced(7, 6);
  CHECK_THROWS_SAYING(ShapeError, link_chain(links, caches), "in_features", "expected 7", "got 6");
  replaced(6, 7);
  if (K::kind == Shortcut::input) {
    CHECK_NOTHROW(link_chain(links, caches));
  } else {
    CHECK_THROWS_SAYING(ShapeError, link_chain(links, caches), "out_features", "expected 7", "got 6");
  }
  // Where nothing is shared, nothing need agree.
  if (K::kind != Shortcut::input) {
    for (auto& link : links) link.adapter.reach = 0;
    CHECK_NOTHROW(link_chain(links, caches));
  }
  caches.resize(2);
  CHECK_THROWS_SAYING(ShapeError, link_chain(K::links(3), caches), "number of caches", "expected 3", "got 2");
  auto gradients = zeros(K::links(3));
  std::vector<typename K::Workspace> workspaces(2);
  CHECK_THROWS_SAYING(ShapeError, link_chain(gradients, workspaces), "number of workspaces", "expected 3", "got 2");
}

TEST_CASE("linking does nothing for layers without shortcuts") {
  std::vector<Linear<float>> layers{MakeLayer<Linear<float>>::make(1, 3), MakeLayer<Linear<float>>::make(1, 3)};
  std::vector<Linear<float>::Cache> caches(1);
  std::vector<Linear<float>::Gradients> gradients(2);
  std::vector<Linear<float>::Workspace> workspaces(1);
  CHECK_NOTHROW(link_chain(layers, caches));
  CHECK_NOTHROW(link_chain(gradients, workspaces));
}

TEMPLATE_LIST_TEST_CASE("a chain without components is its weights and learns nothing", "", InFloat) {
  using K = TestType;
  auto links = K::links(3);
  for (auto& link : links) truncate(link, 0);
  const Batch<K> batch(3, 4, 1);
  std::vector<typename K::Cache> caches(3);
  auto gradients = zeros(links);
  const auto [y, dx] = batch.run(links, 5, caches, gradients);
  for (std::size_t n = 0; n < 3; ++n) {
    const auto expected = run(FrozenLinear<float>(links[n].base), batch.x[n], batch.dy[n]);
    CHECK(same_bits(y[n], expected.first));
    CHECK(same_bits(dx[n], expected.second));
  }
}

// Past the threshold for threads.
TEMPLATE_LIST_TEST_CASE("a chain gives the same bits for any number of threads", "", InFloat) {
  using K = TestType;
  const typename K::Chain chain{{}, make_links<float, K::kind>(2, -1, 150, 12)};
  const MatrixX<float> x = noise<float>(150, 300, 1), dy = noise<float>(150, 300, 2);
  const BatchRanks ranks = BatchRanks::per_sequence(Sequences({100, 150, 50}), {12, {7, 3}, 12});
  const auto results = [&] {
    typename K::Chain::Cache cache;
    auto gradients = zeros_like(chain);
    const MatrixX<float> y = chain.forward(x, ranks, cache), dx = chain.backward(dy, cache, gradients);
    return joined<float>({y.reshaped(), dx.reshaped(), values<typename K::Chain>(gradients)});
  };
  const VectorX<float> expected = results();
  for_each_threading(results, [&](const VectorX<float>& got, const std::string& where) {
    INFO(where);
    CHECK(same_bits(got, expected));
  });
}

}  // namespace dylora::test
