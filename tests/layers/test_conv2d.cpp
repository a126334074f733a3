#include "dylora/layers/conv2d.hpp"
#include "dylora/testing/gradient_check.hpp"

#include <string>
#include <utility>
#include <vector>

#include "dylora/adapters/dropout.hpp"
#include "dylora/adapters/stacked.hpp"
#include "dylora/train/adamw.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/threads.hpp"
#include "support/throws.hpp"

namespace dylora::test {

/// Every option at work, in small images: a bias or none, padding, stride and dilation that differ by side, groups, a 1 × 1 kernel.
template <class S, class P>
struct MakeLayer<Conv2d<S, P>> {
  static constexpr int variants = 4;
  static constexpr Index samples = 2;

  static UnfoldOptions geometry(int variant) {
    if (variant == 0) return {.channels = 2, .image = {2, 4}, .kernel = {2, 3}, .padding = {1, 0}};
    if (variant == 1) return {.channels = 1, .image = {7, 5}, .kernel = {3, 2}, .stride = {2, 1}, .padding = {2, 0}, .dilation = {2, 3}};
    if (variant == 2) return {.channels = 4, .image = {3, 3}, .kernel = {2, 2}, .stride = {2, 2}, .padding = {1, 1}};
    return {.channels = 6, .image = {2, 2}};
  }

  static Conv2d<S, P> make(int variant, Index max_rank) {
    const Unfold unfold(geometry(variant));
    const Index count = variant == 2 ? 2 : 1, patch = unfold.patch_size(unfold.options().channels / count);
    std::vector<P> groups;
    for (Index group = 0; group < count; ++group)
      groups.push_back(MakeLayer<P>::make(patch, 5, variant % 2 == 0, max_rank, 10 + 10 * static_cast<std::uint64_t>(group)));
    return {unfold, std::move(groups)};
  }
};

template <class S, class P>
VectorX<S> frozen_values(const Conv2d<S, P>& conv) {
  std::vector<VectorX<S>> parts;
  for (const P& group : conv.groups) parts.push_back(frozen_values(group));
  return joined<S>(parts);
}

template <class S>
using Plain = Conv2d<S>;
template <class S>
using OfView = Conv2d<S, Linear<S, LowRank<S>, WeightView<S, RowMatrix<S>>>>;
template <class S>
using Frozen = Conv2d<S, FrozenLinear<S>>;

using LayersUnderTest = InFloatAndDouble<Plain, OfView, Frozen>;

}  // namespace dylora::test

#include "laws/layer_laws.hpp"

namespace dylora::test {

/// The convolution of x with W (out × in / groups · kernel), by its definition.
inline MatrixX<double> convolution(const UnfoldOptions& o, Index groups, const MatrixX<double>& W, const VectorX<double>& bias,
                                   const MatrixX<double>& x) {
  const Extent out = Unfold(o).output();
  const Index out_channels = W.rows(), from_each = o.channels / groups, to_each = out_channels / groups;
  MatrixX<double> y(out_channels * out.height * out.width, x.cols());
  for (Index n = 0; n < x.cols(); ++n) {
    for (Index k = 0; k < y.rows(); ++k) {
      const Index channel = k / (out.height * out.width), row = k / out.width % out.height, column = k % out.width;
      double sum = bias.size() > 0 ? bias(channel) : 0;
      for (Index c = 0; c < from_each; ++c) {
        for (Index i = 0; i < o.kernel.height; ++i) {
          for (Index j = 0; j < o.kernel.width; ++j) {
            const Index h = row * o.stride.height + i * o.dilation.height - o.padding.height;
            const Index w = column * o.stride.width + j * o.dilation.width - o.padding.width;
            if (h < 0 || h >= o.image.height || w < 0 || w >= o.image.width) continue;
            sum += W(channel, (c * o.kernel.height + i) * o.kernel.width + j) *
                   x(((channel / to_each * from_each + c) * o.image.height + h) * o.image.width + w, n);
          }
        }
      }
      y(k, n) = sum;
    }
  }
  return y;
}

/// W + ΔW of all groups.
template <class S>
MatrixX<double> whole_weight(const Conv2d<S>& conv, Index b) {
  const Index rows = conv.groups.front().out_features();
  MatrixX<double> W(conv.out_channels(), conv.groups.front().in_features());
  for (std::size_t i = 0; i < conv.groups.size(); ++i) {
    const auto& [base, adapter] = conv.groups[i];
    const MatrixX<double> B = in_double(adapter.B), A = adapter.A.template cast<double>();
    W.middleRows(static_cast<Index>(i) * rows, rows) =
        in_double(base.W) + law_alpha / static_cast<double>(b) * B.leftCols(b) * A.topRows(b);
  }
  return W;
}

TEMPLATE_TEST_CASE("oracle of LoRA convolution: at every rank it convolves with W plus alpha over b times B A", "", float, double) {
  using S = TestType;
  for (int variant = 0; variant < 4; ++variant) {
    const LayerCase<Conv2d<S>> c{variant, true, 1};
    for (Index b = 1; b <= law_rank; ++b) {
      const MatrixX<double> expected =
          convolution(c.subject.unfold.options(), static_cast<Index>(c.subject.groups.size()), whole_weight(c.subject, b),
                      in_double<S>(c.subject.merged(b).weight().bias), in_double(c.x));
      CHECK(gap(in_double(c.subject.forward(c.x, b)), expected) < rounding<S>);
    }
  }
}

TEST_CASE("oracle of LoRA convolution: its adapter is a convolution down to b channels and a 1 x 1 convolution up") {
  const LayerCase<Conv2d<double>> c{1, true, 3};
  const LowRank<double>& adapter = c.subject.groups[0].adapter;
  const Unfold unfold = c.subject.unfold;
  const Conv2d<double, FrozenLinear<double>> down(unfold, {FrozenLinear<double>(MatrixX<double>(adapter.A.topRows(3)))});
  const Conv2d<double, FrozenLinear<double>> up(MatrixX<double>(adapter.B.leftCols(3)), {.in_channels = 3, .image = unfold.output()});
  const MatrixX<double> low = up.forward(down.forward(c.x, RankSlice::none()), RankSlice::none());
  const MatrixX<double> change = c.subject.forward(c.x, 3) - c.subject.forward(c.x, RankSlice::none());
  CHECK(gap(change, law_alpha / 3 * low) < rounding<double>);
}

TEMPLATE_TEST_CASE("oracle of LoRA convolution: what merging adds can be taken away again", "", float, double) {
  using S = TestType;
  for (int variant = 0; variant < 4; ++variant) {
    const LayerCase<Conv2d<S>> c{variant, true, 3};
    const DenseWeight<S> base = c.subject.weight(), merged = c.subject.merged(3).weight(), again = c.subject.merged(3).merged(1).weight();
    CHECK(same_bits(merged.W, again.W));
    CHECK(gap(in_double(merged.W), whole_weight(c.subject, 3)) < rounding<S>);
    const MatrixX<double> delta = whole_weight(c.subject, 3) - in_double(base.W);
    CHECK(gap(in_double(merged.W) - delta, in_double(base.W)) < rounding<S>);
    CHECK(same_bits(c.subject.merged(RankSlice::none()).weight().W, base.W));
    CHECK(same_bits(MatrixX<S>(merged.bias), MatrixX<S>(base.bias)));
  }
}

/// Large enough that the positions of a run are several parts, and several threads take part.
template <class S>
Conv2d<S> large(Index groups) {
  Rng rng(1);
  const Index channels = 12 * groups;
  Conv2d<S> conv(DenseWeight<S>(noise<S>(10 * groups, 12 * 9, 2), noise<S>(10 * groups, 1, 3)),
                 {.in_channels = channels, .image = {41, 33}, .kernel = {3, 3}, .padding = {1, 1}, .groups = groups},
                 {.max_rank = 5, .alpha = law_alpha}, rng);
  randomize<Conv2d<S>>(conv, 4);
  return conv;
}

TEMPLATE_TEST_CASE("a batch that is computed in parts is what its samples are, with a gradient that is their sum", "", float, double) {
  using S = TestType;
  for (const Index groups : {1, 2}) {
    const Conv2d<S> conv = large<S>(groups);
    const MatrixX<S> x = noise<S>(conv.in_features(), 4, 1), dy = noise<S>(conv.out_features(), 4, 2);
    const auto batch = run(conv, x, dy, {5, 2});
    typename Conv2d<S>::Cache cache;
    (void)conv.forward(x, 5, cache);
    CHECK(cache.used >= 3 * static_cast<std::size_t>(groups));
    MatrixX<double> sum = MatrixX<double>::Zero(parameter_count(conv), 1);
    for (Index n = 0; n < 4; ++n) {
      const auto sample = run<Conv2d<S>>(conv, x.col(n), dy.col(n), {5, 2});
      CHECK(same_bits(sample.y, MatrixX<S>(batch.y.col(n))));
      CHECK(same_bits(sample.dx, MatrixX<S>(batch.dx.col(n))));
      sum += in_double<S>(values<Conv2d<S>>(sample.gradients));
    }
    CHECK(gap(in_double<S>(values<Conv2d<S>>(batch.gradients)), sum) < rounding<S>);
    const MatrixX<double> expected =
        convolution(conv.unfold.options(), groups, whole_weight(conv, 5), in_double<S>(conv.weight().bias), in_double<S>(x.col(3)));
    CHECK(gap(in_double<S>(batch.y.col(3)), expected) < rounding<S>);
  }
}

TEMPLATE_TEST_CASE("a run that is computed in parts has the same bits wherever it is in the batch", "", float, double) {
  using S = TestType;
  const Conv2d<S> conv = large<S>(2);
  const MatrixX<S> x = noise<S>(conv.in_features(), 5, 1), dy = noise<S>(conv.out_features(), 5, 2);
  const auto mixed = run(conv, x, dy, BatchRanks::per_sample({2, {5, 1}, {5, 1}, {5, 1}, RankSlice::none()}));
  auto gradients = zeros_like(conv);
  Index begin = 0;
  for (const auto& [count, rank] : {std::pair<Index, RankSlice>{1, 2}, {3, {5, 1}}, {1, RankSlice::none()}}) {
    typename Conv2d<S>::Cache cache;
    CHECK(same_bits(conv.forward(x.middleCols(begin, count), rank, cache), MatrixX<S>(mixed.y.middleCols(begin, count))));
    CHECK(same_bits(conv.backward(dy.middleCols(begin, count), cache, gradients), MatrixX<S>(mixed.dx.middleCols(begin, count))));
    begin += count;
  }
  CHECK(same_bits(values<Conv2d<S>>(mixed.gradients), values<Conv2d<S>>(gradients)));
}

TEMPLATE_TEST_CASE("a convolution has the same bits for any number of threads", "", float, double) {
  using S = TestType;
  for (const Index groups : {1, 2}) {
    const Conv2d<S> conv = large<S>(groups);
    const MatrixX<S> x = noise<S>(conv.in_features(), 3, 1), dy = noise<S>(conv.out_features(), 3, 2);
    const BatchRanks ranks = BatchRanks::per_sample({5, 5, {3, 1}});
    const auto expected = run(conv, x, dy, ranks);
    for_each_threading([&] { return run(conv, x, dy, ranks); },
                       [&](const Result<Conv2d<S>>& got, const std::string& where) {
                         INFO(where);
                         CHECK(got == expected);
                       });
  }
}

TEST_CASE("each group of a convolution is a convolution of its own channels") {
  using C = Conv2d<double>;
  const LayerCase<C> c{2, true, {3, 1}};
  const auto whole = c.run();
  UnfoldOptions half = c.subject.unfold.options();
  half.channels /= 2;
  for (const Index group : {0, 1}) {
    const C alone(Unfold(half), {c.subject.groups[static_cast<std::size_t>(group)]});
    const Index in = alone.in_features(), out = alone.out_features();
    const auto part = run<C>(alone, c.x.middleRows(group * in, in), c.dy.middleRows(group * out, out), c.rank);
    CHECK(same_bits(part.y, MatrixX<double>(whole.y.middleRows(group * out, out))));
    CHECK(same_bits(part.dx, MatrixX<double>(whole.dx.middleRows(group * in, in))));
    CHECK(same_bits(values<C>(part.gradients), values<Linear<double>>(whole.gradients.groups[static_cast<std::size_t>(group)])));
  }
}

TEST_CASE("a depthwise convolution has an adapter for each channel, and groups may have ranks of their own") {
  Rng rng(1);
  Conv2d<double> conv(noise<double>(6, 4, 1), {.in_channels = 6, .image = {3, 3}, .kernel = {2, 2}, .groups = 6}, {.max_rank = 1}, rng);
  randomize<Conv2d<double>>(conv, 2);
  CHECK(conv.groups.size() == 6);
  CHECK(adapter_ranks(conv).size() == 6);
  truncate_each(conv, {1, 0, 1, 0, 0, 1});
  CHECK(conv.max_rank() == 1);
  Rng check(3);
  const MatrixX<double> x = noise<double>(conv.in_features(), 2, 4);
  CHECK(check_gradients(conv, x, 1, check).error < 1e-6);
  CHECK(gap(conv.merged(1).forward(x, RankSlice::none()), conv.forward(x, 1)) < rounding<double>);
}

TEST_CASE("a convolution is made from PyTorch's weight, copied or where it is") {
  using View = WeightView<float, RowMatrix<float>>;
  const RowMatrix<float> weight = noise<float>(4, 2 * 9, 1);  // [4, 2, 3, 3]
  const VectorX<float> bias = noise<float>(4, 1, 2);
  const Conv2dOptions options{.in_channels = 4, .image = {5, 5}, .kernel = {3, 3}, .groups = 2};
  Rng rng(1), same(1);
  const Conv2d<float> copied(DenseWeight<float>(weight, bias), options, {.max_rank = 2}, rng);
  CHECK(same_bits(copied.weight().W, MatrixX<float>(weight)));
  CHECK(same_bits(MatrixX<float>(copied.weight().bias), MatrixX<float>(bias)));
  std::vector<Linear<float, LowRank<float>, View>> groups;
  for (const Index group : {0, 1}) {
    const View rows(weight.data() + group * 2 * weight.cols(), 2, weight.cols(), bias.data() + group * 2);
    groups.emplace_back(rows, LowRankOptions{.max_rank = 2}, same);
  }
  const Conv2d<float, Linear<float, LowRank<float>, View>> viewed(Unfold({.channels = 4, .image = {5, 5}, .kernel = {3, 3}}),
                                                                  std::move(groups));
  const MatrixX<float> x = noise<float>(100, 2, 3);
  CHECK(same_bits(copied.forward(x, 2), viewed.forward(x, 2)));
  CHECK(same_bits(viewed.weight().W, copied.weight().W));
  const Conv2d<float, FrozenLinear<float>> frozen(DenseWeight<float>(weight, bias), options);
  CHECK(same_bits(frozen.forward(x, RankSlice::none()), copied.forward(x, 2)));  // still B = 0
  CHECK(Conv2d<float>(weight, options, {.max_rank = 2}, rng).weight().bias.size() == 0);
  using ByRows = Linear<float, LowRank<float>, DenseWeight<float, RowMatrix<float>>>;
  CHECK(same_bits(Conv2d<float, ByRows>(weight, options, {.max_rank = 2}, rng).weight().W, MatrixX<float>(weight)));
}

TEST_CASE("a convolution is a layer whose projections are layers, named as PEFT names them") {
  using Names = std::vector<std::string>;
  CHECK(names(MakeLayer<Conv2d<float>>::make(0, 2)) == Names{"lora_A", "lora_B"});
  const auto grouped = MakeLayer<Conv2d<float>>::make(2, 2);
  CHECK(names(grouped) == Names{"0.lora_A", "0.lora_B", "1.lora_A", "1.lora_B"});
  Names layers;
  for_each_layer(grouped, [&](std::string_view name, const auto& layer) {
    layers.emplace_back(name);
    CHECK(layer.adapter.A.rows() == 2);
  });
  CHECK(layers == Names{"0", "1"});
}

TEST_CASE("as a projection a convolution sets or adds its gradient to the input, and takes any rank") {
  using C = Conv2d<double>;
  STATIC_REQUIRE(Projection<C>);
  for (int variant = 0; variant < 4; ++variant) {
    const LayerCase<C> c{variant, true, {3, 1}};
    const auto clean = c.run();
    C::Cache cache;
    MatrixX<double> y = all_nan<double>(c.dy.rows(), c.dy.cols()), set = all_nan<double>(c.x.rows(), c.x.cols());
    const MatrixX<double> before = noise<double>(c.x.rows(), c.x.cols(), 9);
    MatrixX<double> added = before;
    c.subject.apply(c.x, {3, 1}, cache, y);
    CHECK(same_bits(y, clean.y));
    auto gradients = zeros_like(c.subject), again = gradients;
    C::Workspace workspace;
    c.subject.set_backward(c.x, c.dy, cache, gradients, workspace, set);
    c.subject.add_backward(c.x, c.dy, cache, again, workspace, added);
    CHECK(same_bits(set, clean.dx));
    CHECK(gap(added, before + clean.dx) < rounding<double>);
    CHECK(same_bits(values<C>(gradients), values<C>(clean.gradients)));
    CHECK(same_bits(values<C>(again), values<C>(clean.gradients)));
    c.subject.apply(c.x, law_rank + 7, cache, y);
    CHECK(same_bits(y, c.subject.forward(c.x, law_rank)));
  }
}

TEST_CASE("a convolution learns a change of low rank") {
  Rng rng(1);
  const Conv2dOptions options{.in_channels = 2, .image = {6, 6}, .kernel = {3, 3}, .padding = {1, 1}};
  const MatrixX<double> W = noise<double>(6, 18, 1), change = noise<double>(6, 2, 2) * noise<double>(2, 18, 3);
  Conv2d<double> conv(W, options, {.max_rank = 4}, rng);
  const Conv2d<double, FrozenLinear<double>> target(MatrixX<double>(W + change), options);
  const MatrixX<double> x = noise<double>(72, 8, 4), wanted = target.forward(x, RankSlice::none());
  AdamW optimizer(conv, {.lr = 0.02});
  auto gradients = zeros_like(conv);
  Conv2d<double>::Cache cache;
  const auto error = [&] { return (conv.forward(x, 2) - wanted).squaredNorm(); };
  const double before = error();
  for (int step = 0; step < 300; ++step) {
    const MatrixX<double> y = conv.forward(x, 2, cache);
    set_zero(conv, gradients);
    (void)conv.backward((y - wanted) / 100, cache, gradients);
    optimizer.step(conv, gradients);
  }
  CHECK(error() < 1e-3 * before);
}

template <class P>
concept Convolvable = requires { typename Conv2d<typename P::Scalar, P>; };

TEST_CASE("a convolution takes no projection that draws a mask over patches") {
  STATIC_REQUIRE(Convolvable<Linear<float>>);
  STATIC_REQUIRE(Convolvable<Linear<float, Stacked<LowRank<float>>>>);
  STATIC_REQUIRE_FALSE(Convolvable<Linear<float, Dropout<LowRank<float>>>>);
  STATIC_REQUIRE_FALSE(Convolvable<Linear<float, Dropout<Stacked<LowRank<float>>>>>);
  STATIC_REQUIRE_FALSE(Convolvable<Linear<float, Stacked<Dropout<LowRank<float>>>>>);
}

TEST_CASE("a convolution refuses channels and groups that do not fit and says what was expected and what came") {
  Rng rng(1);
  using Invalid = std::invalid_argument;
  const auto make = [&](Index out, Index columns, Conv2dOptions options) {
    return Conv2d<float>(noise<float>(out, columns, 1), options, {.max_rank = 1}, rng);
  };
  CHECK_THROWS_SAYING(ShapeError, make(4, 17, {.in_channels = 2, .image = {5, 5}, .kernel = {3, 3}}), "Conv2d: in_features", "expected 18",
                      "got 17");
  CHECK_THROWS_SAYING(ShapeError, make(5, 9, {.in_channels = 2, .image = {5, 5}, .kernel = {3, 3}, .groups = 2}), "output channels",
                      "modulo", "expected 0", "got 1");
  CHECK_THROWS_SAYING(ShapeError, make(4, 9, {.in_channels = 3, .image = {5, 5}, .kernel = {3, 3}, .groups = 2}), "input channels",
                      "modulo", "expected 0", "got 1");
  CHECK_THROWS_SAYING(Invalid, make(4, 9, {.in_channels = 1, .image = {5, 5}, .kernel = {3, 3}, .groups = 0}), "groups", "got 0");
  CHECK_THROWS_SAYING(Invalid, make(4, 9, {.in_channels = 1, .image = {5, 5}, .kernel = {3, 3}, .groups = 5}), "groups", "[1, 4]", "got 5");
  CHECK_THROWS_SAYING(Invalid, make(4, 9, {.in_channels = 1, .image = {2, 5}, .kernel = {3, 3}}), "Unfold: height", "got 3");
  const auto linear = [](Index in, Index out) { return MakeLayer<Linear<float>>::make(in, out, false, 1, 1); };
  const Unfold unfold({.channels = 2, .image = {3, 3}});
  CHECK_THROWS_SAYING(ShapeError, Conv2d<float>(unfold, {linear(1, 2), linear(1, 3)}), "out_features of a group", "expected 2", "got 3");
  CHECK_THROWS_SAYING(Invalid, Conv2d<float>(unfold, {}), "Conv2d: groups", "[1, 2]", "got 0");
}

TEST_CASE("a convolution whose last group refuses its cache has added nothing") {
  using C = Conv2d<float>;
  C conv = large<float>(2);
  const MatrixX<float> x = noise<float>(conv.in_features(), 1, 1), dy = noise<float>(conv.out_features(), 1, 2);
  C::Cache cache;
  (void)conv.forward(x, 5, cache);
  truncate(conv.groups.back().adapter, 3);
  auto gradients = zeros_like(conv);
  const MatrixX<float> before = noise<float>(conv.in_features(), 1, 3);
  MatrixX<float> dx = before;
  C::Workspace workspace;
  CHECK_THROWS_AS(conv.set_backward(x, dy, cache, gradients, workspace, dx), std::invalid_argument);
  CHECK_THROWS_AS(conv.add_backward(x, dy, cache, gradients, workspace, dx), std::invalid_argument);
  CHECK_THROWS_AS(conv.backward(dy, cache, gradients, no_dx), std::invalid_argument);
  CHECK(values<C>(gradients).isZero(0));
  CHECK(same_bits(dx, before));
}

TEST_CASE("a backward refuses a cache that was filled before the geometry changed") {
  using C = Conv2d<float>;
  C conv = large<float>(1);
  const MatrixX<float> x = noise<float>(conv.in_features(), 1, 1);
  C::Cache cache;
  (void)conv.forward(x, 2, cache);
  conv.unfold = Unfold({.channels = 12, .image = {41 * 11, 33 * 3}, .kernel = {3, 3}, .stride = {3, 3}, .padding = {1, 1}});
  auto gradients = zeros_like(conv);
  CHECK_THROWS_SAYING(ShapeError, conv.backward(MatrixX<float>(conv.out_features(), 1), cache, gradients), "Conv2d::backward", "rows of x");
  const MatrixX<float> other = noise<float>(conv.in_features(), 1, 1);
  MatrixX<float> dx(conv.in_features(), 1);
  C::Workspace workspace;
  CHECK_THROWS_SAYING(ShapeError, conv.set_backward(other, MatrixX<float>(conv.out_features(), 1), cache, gradients, workspace, dx),
                      "parts", "expected", "got");
  CHECK(values<C>(gradients).isZero(0));
}

}  // namespace dylora::test
