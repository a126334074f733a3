#include "dylora/methods/reslora/link.hpp"
#include "dylora/methods/reslora/merge.hpp"
#include "dylora/methods/reslora/shortcut.hpp"

#include <utility>

#include "methods/reslora/residual_under_test.hpp"
#include "support/law.hpp"
#include "support/throws.hpp"

namespace dylora::test {

/// The links' outputs for these inputs.
template <class Link>
std::vector<MatrixX<double>> outputs(const std::vector<Link>& links, const std::vector<MatrixX<double>>& x, Index rank) {
  std::vector<typename Link::Cache> caches(links.size());
  link_chain(links, caches);
  std::vector<MatrixX<double>> y;
  for (std::size_t n = 0; n < links.size(); ++n) {
    y.emplace_back(links[n].out_features(), x[n].cols());
    links[n].apply(x[n], rank, caches[n], y.back());
  }
  return y;
}

inline MatrixX<double> apply(const DenseWeight<double>& weight, const MatrixX<double>& x) {
  MatrixX<double> y(weight.rows(), x.cols());
  weight.apply(x, y);
  return y;
}

template <class Link>
InputNorms norms_of(const std::vector<Link>& links, const std::vector<MatrixX<double>>& x) {
  InputNorms norms(static_cast<Index>(links.size()));
  for (std::size_t n = 0; n < links.size(); ++n) norms.observe(static_cast<Index>(n), x[n]);
  return norms;
}

/// W_n + s · gain · B_n · A at rank b.
template <class Link>
MatrixX<double> with_update(const Link& link, Index b, const MatrixX<double>& A, double gain) {
  return link.base.W + gain * link.adapter.inner.scale(b) * link.adapter.inner.B.leftCols(b) * A;
}

template <class Link>
MatrixX<double> A_of(const Link& link, Index b) {
  return link.adapter.inner.A.topRows(b);
}

TEST_CASE("oracle of ResLoRA: a block chain merged is exact to rounding for any inputs") {
  for (const Index reach : {-1, 0, 1, 2}) {
    const auto links = make_links<double, Shortcut::block>(4, reach);
    std::vector<MatrixX<double>> x;
    for (std::uint64_t n = 0; n < 4; ++n) x.push_back(noise<double>(6, 3, n + 1));
    for (Index b = 1; b <= law_rank; ++b) {
      const auto y = outputs(links, x, b);
      const std::vector<DenseWeight<double>> weights = merge_blocks(links, b);
      REQUIRE(weights.size() == 4);
      for (std::size_t n = 0; n < 4; ++n) CHECK(gap(apply(weights[n], x[n]), y[n]) < rounding<double>);
    }
  }
}

TEST_CASE("oracle of ResLoRA: where an input is c times the next one, merging an input chain by inputs finds c and is exact") {
  const auto links = make_links<double, Shortcut::input>(3);
  const double c[] = {0.5, 4};
  const MatrixX<double> last = noise<double>(6, 3, 1);
  const std::vector<MatrixX<double>> x{c[0] * c[1] * last, c[1] * last, last};
  const InputNorms norms = norms_of(links, x);
  CHECK(norms.ratio(0, 1) == c[0]);
  CHECK(norms.ratio(1, 2) == c[1]);
  for (Index b = 1; b <= law_rank; ++b) {
    const auto y = outputs(links, x, b);
    const auto weights = merge_bi(links, norms, b);
    for (std::size_t n = 0; n < 3; ++n) CHECK(gap(apply(weights[n], x[n]), y[n]) < rounding<double>);
  }
}

TEST_CASE("oracle of ResLoRA: where the inputs are multiples of each other, folding A of a middle chain is exact") {
  const auto links = make_links<double, Shortcut::middle>(3);
  const MatrixX<double> last = noise<double>(6, 3, 1);
  const std::vector<MatrixX<double>> x{2 * last, 0.25 * last, last};
  for (Index b = 1; b <= law_rank; ++b) {
    const auto y = outputs(links, x, b);
    const auto weights = merge_folded(links, norms_of(links, x), b);
    for (std::size_t n = 0; n < 3; ++n) CHECK(gap(apply(weights[n], x[n]), y[n]) < rounding<double>);
  }
}

TEST_CASE("oracle of ResLoRA: merging in every way leaves the links as they were bit for bit") {
  const auto check = [](auto links, const auto& merge) {
    const auto before = links;
    for (int time = 0; time < 2; ++time) merge(links);
    for (std::size_t n = 0; n < links.size(); ++n) {
      CHECK(same_bits(links[n].base.W, before[n].base.W));
      CHECK(same_bits(links[n].base.bias, before[n].base.bias));
      using Link = typename decltype(links)::value_type;
      CHECK(same_bits(values<Link>(links[n]), values<Link>(before[n])));
    }
  };
  const InputNorms norms(3);
  check(make_links<float, Shortcut::block>(3), [](const auto& links) { (void)merge_blocks(links, 3); });
  check(make_links<float, Shortcut::input>(3), [&](const auto& links) { (void)merge_bi(links, norms, 3); });
  check(make_links<float, Shortcut::input>(3), [](const auto& links) { (void)merge_bw(links, 3); });
  check(make_links<float, Shortcut::middle>(3), [&](const auto& links) { (void)merge_scalar(links, norms, 3); });
  check(make_links<float, Shortcut::middle>(3), [&](const auto& links) { (void)merge_folded(links, norms, 3); });
}

TEST_CASE("merging an input chain by weights takes the norms of the merged weights that made the inputs") {
  const auto links = make_links<double, Shortcut::input>(4);
  const auto weights = merge_bw(links, 3);
  std::vector<double> f;
  for (std::size_t n = 0; n < 4; ++n) {
    const double alpha = n < 2 ? 1 : f[n - 2] / f[n - 1];
    const MatrixX<double> expected = with_update(links[n], 3, A_of(links[n], 3), 1 + alpha);
    CHECK(gap(weights[n].W, expected) < rounding<double>);
    CHECK(same_bits(weights[n].bias, links[n].base.bias));
    f.push_back(expected.norm());
  }
}

TEST_CASE("merging a middle chain by a scalar adds the ratios of the norms of A x within reach") {
  for (const Index reach : {-1, 1}) {
    const auto links = make_links<double, Shortcut::middle>(4, reach);
    const Index b = 2;
    InputNorms norms(4);
    std::vector<double> f;
    for (std::size_t n = 0; n < 4; ++n) {
      const MatrixX<double> Ax = A_of(links[n], b) * noise<double>(6, 3, n + 1);
      norms.observe(static_cast<Index>(n), Ax);
      f.push_back(Ax.norm());
    }
    const auto weights = merge_scalar(links, norms, b);
    for (std::size_t n = 0; n < 4; ++n) {
      double alpha = 0;
      for (std::size_t q = reach < 0 || n == 0 ? 0 : n - 1; q < n; ++q) alpha += f[q] / f[n];
      CHECK(gap(weights[n].W, with_update(links[n], b, A_of(links[n], b), 1 + alpha)) < rounding<double>);
    }
  }
}

TEST_CASE("the first link of every chain merges exactly whatever was observed") {
  const MatrixX<double> x = noise<double>(6, 3, 1);
  InputNorms norms(1);
  norms.observe(0, x);
  const auto check = [&](const auto& links, const std::vector<DenseWeight<double>>& weights) {
    CHECK(gap(apply(weights[0], x), outputs(links, {x}, 3)[0]) < rounding<double>);
  };
  const auto input = make_links<double, Shortcut::input>(1);
  const auto middle = make_links<double, Shortcut::middle>(1);
  check(input, merge_bi(input, norms, 3));
  check(input, merge_bw(input, 3));
  check(middle, merge_scalar(middle, norms, 3));
  check(middle, merge_folded(middle, norms, 3));
}

TEST_CASE("norms are means over a sliding window of batches") {
  InputNorms norms(2, 3);
  CHECK(norms.mean(0) == 0);
  for (const float size : {100.0F, 1.0F, 2.0F, 6.0F}) norms.observe(0, MatrixX<float>::Constant(1, 4, size / 2));
  CHECK(norms.mean(0) == 3);
  CHECK(norms.mean(1) == 0);
  InputNorms papers(1);
  papers.observe(0, MatrixX<double>::Constant(1, 1, 1000));
  for (int batch = 0; batch < 100; ++batch) papers.observe(0, MatrixX<double>::Constant(1, 1, 2));
  CHECK(papers.mean(0) == 2);
}

TEST_CASE("a ratio with a norm of zero is one") {
  InputNorms norms(3);
  norms.observe(0, MatrixX<double>::Zero(2, 2));
  norms.observe(1, MatrixX<double>::Ones(2, 2));
  CHECK(norms.ratio(0, 1) == 1);
  CHECK(norms.ratio(1, 0) == 1);
  CHECK(norms.ratio(1, 2) == 1);
  CHECK(norms.ratio(1, 1) == 1);
}

TEST_CASE("a chain at no rank or with B = 0 merges to its weights bit for bit") {
  auto links = make_links<float, Shortcut::block>(3);
  const auto none = merge_blocks(links, RankSlice::none());
  for (std::size_t n = 0; n < 3; ++n) CHECK(same_bits(none[n].W, links[n].base.W));
  for (auto& link : links) link.adapter.inner.B.setZero();
  const auto fresh = merge_blocks(links, 3);
  for (std::size_t n = 0; n < 3; ++n) CHECK(same_bits(fresh[n].W, links[n].base.W));
}

TEST_CASE("links inside other things merge by a member") {
  const auto links = make_links<double, Shortcut::block>(3);
  struct Block {
    ResidualLink<double, Shortcut::block> q;
  };
  std::vector<Block> blocks;
  for (const auto& link : links) blocks.push_back({link});
  const auto weights = merge_blocks(
      blocks, 2, [](const Block& block) -> const auto& { return block.q; });
  const auto expected = merge_blocks(links, 2);
  for (std::size_t n = 0; n < 3; ++n) CHECK(same_bits(weights[n].W, expected[n].W));
}

template <class Links>
concept MergesBlocks = requires(const Links& links) { merge_blocks(links, 1); };
template <class Links>
concept MergesByWeights = requires(const Links& links) { merge_bw(links, 1); };

TEST_CASE("what merges one kind of chain does not compile for another") {
  using Input = std::vector<ResidualLink<float, Shortcut::input>>;
  using Block = std::vector<ResidualLink<float, Shortcut::block>>;
  STATIC_REQUIRE(MergesBlocks<Block>);
  STATIC_REQUIRE_FALSE(MergesBlocks<Input>);
  STATIC_REQUIRE(MergesByWeights<Input>);
  STATIC_REQUIRE_FALSE(MergesByWeights<Block>);
}

TEST_CASE("merging refuses ranks and norms that do not fit") {
  const auto links = make_links<float, Shortcut::input>(3);
  CHECK_THROWS_SAYING(ShapeError, merge_bi(links, InputNorms(2), 3), "norms", "expected 3", "got 2");
  CHECK_THROWS_SAYING(std::invalid_argument, merge_bw(links, 6), "rank", "max_rank = 5", "got 6");
  CHECK_THROWS_SAYING(std::invalid_argument, InputNorms(2, 0), "window", "1 or more", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, InputNorms(-1), "links", "0 or more", "got -1");
  InputNorms norms(2);
  CHECK_THROWS_SAYING(std::invalid_argument, norms.observe(2, MatrixX<float>::Ones(1, 1)), "link", "[0, 1]", "got 2");
  CHECK_THROWS_SAYING(std::invalid_argument, norms.mean(-1), "link", "[0, 1]", "got -1");
}

}  // namespace dylora::test
