#include "dylora/methods/reslora/residual_low_rank.hpp"
#include "dylora/methods/reslora/shortcut.hpp"
#include "dylora/methods/reslora/stack.hpp"

#include "methods/reslora/residual_under_test.hpp"
#include "support/law.hpp"
#include "support/throws.hpp"

namespace dylora::test {

using Stacks = EachShortcut<ResidualStack>;

/// Three links within reach of each other or not, two of them, and one alone.
template <class S, Shortcut shortcut>
struct MakeLayer<ResidualStack<S, shortcut>> {
  using Stack = ResidualStack<S, shortcut>;
  static constexpr int variants = 4;
  static constexpr Index samples = 4;

  static Stack make(int variant, Index max_rank) {
    const Index count = variant < 2 ? 3 : 4 - variant, reach = variant == 1 ? 1 : -1;
    std::vector<typename Stack::Link> links;
    for (Index n = 0; n < count; ++n) {
      const auto seed = static_cast<std::uint64_t>(10 * n);
      links.emplace_back(MakeWeight<DenseWeight<S>>::make(6, 6, variant == 1, seed),
                         make_adapter<ResidualLowRank<S, shortcut>>(6, 6, max_rank, seed + 2));
      links.back().adapter.reach = reach;
    }
    return Stack(std::move(links));
  }

  static Stack without_adapter(Stack stack) {
    truncate(stack, 0);
    return stack;
  }
};

template <class S, Shortcut shortcut>
VectorX<S> frozen_values(const ResidualStack<S, shortcut>& stack) {
  std::vector<VectorX<S>> parts;
  for (const auto& link : stack.links) parts.push_back(frozen_values(link));
  return joined<S>(parts);
}

using LayersUnderTest = Stacks::UnderTest;

}  // namespace dylora::test

#include "laws/layer_laws.hpp"

namespace dylora::test {

TEST_CASE("oracle of ResLoRA: a block stack merged at any rank is a plain stack of that function") {
  const auto stack = MakeLayer<Stacks::Block<double>>::make(1, law_rank);
  Stacks::Block<double> trained = stack;
  randomize<Stacks::Block<double>>(trained, 3);
  const MatrixX<double> x = noise<double>(6, 4, 1);
  for (Index b = 1; b <= law_rank; ++b) {
    const auto merged = trained.merged(b);
    CHECK(merged.max_rank() == 0);
    CHECK(gap(merged.forward(x, RankSlice::none()), trained.forward(x, b)) < rounding<double>);
  }
}

TEST_CASE("only a block stack has a merged form") {
  STATIC_REQUIRE(is_mergeable<Stacks::Block<float>>);
  STATIC_REQUIRE_FALSE(is_mergeable<Stacks::Input<float>>);
  STATIC_REQUIRE_FALSE(is_mergeable<Stacks::Middle<float>>);
}

TEST_CASE("a residual stack names its parameters by link and shows its layers") {
  auto stack = MakeLayer<Stacks::Middle<float>>::make(2, 3);
  CHECK(names(stack) == std::vector<std::string>{"links.0.lora_A", "links.0.lora_B", "links.1.lora_A", "links.1.lora_B"});
  std::vector<std::string> layers;
  for_each_layer(stack, [&](std::string_view name, auto&) { layers.emplace_back(name); });
  CHECK(layers == std::vector<std::string>{"links.0", "links.1"});
}

TEST_CASE("a residual stack is made from weights, with A drawn in order and B = 0") {
  Rng rng(1), same(1);
  const std::vector<DenseWeight<float>> W{noise<float>(6, 6, 1), noise<float>(6, 6, 2)};
  const Stacks::Block<float> stack(W, {.adapter = {.max_rank = 3}, .reach = 1}, rng);
  const LowRank<float> first(6, 6, {.max_rank = 3}, same), second(6, 6, {.max_rank = 3}, same);
  CHECK(same_bits(MatrixX<float>(stack.links[0].adapter.inner.A), MatrixX<float>(first.A)));
  CHECK(same_bits(MatrixX<float>(stack.links[1].adapter.inner.A), MatrixX<float>(second.A)));
  CHECK(stack.links[1].adapter.inner.B.isZero(0));
  CHECK(stack.links[1].adapter.position == 1);
  CHECK(stack.links[1].adapter.reach == 1);
}

TEST_CASE("a residual stack refuses links that do not fit each other") {
  Rng rng(1);
  const auto weights = [](std::initializer_list<std::pair<Index, Index>> shapes) {
    std::vector<DenseWeight<float>> W;
    for (const auto& [out, in] : shapes) W.emplace_back(noise<float>(out, in, 1));
    return W;
  };
  const ResidualOptions all{.adapter = {.max_rank = 2}}, none{.adapter = {.max_rank = 2}, .reach = 0};
  CHECK_THROWS_SAYING(std::invalid_argument, Stacks::Block<float>({}, all, rng), "ResidualStack", "at least one", "none");
  CHECK_THROWS_SAYING(ShapeError, Stacks::Block<float>(weights({{5, 4}, {4, 4}}), none, rng), "in_features", "expected 5", "got 4");
  CHECK_THROWS_SAYING(ShapeError, Stacks::Block<float>(weights({{5, 4}, {5, 5}}), all, rng), "in_features of a linked adapter");
  CHECK_THROWS_SAYING(ShapeError, Stacks::Middle<float>(weights({{4, 4}, {5, 4}}), all, rng), "out_features of a linked adapter");
  CHECK_THROWS_SAYING(ShapeError, Stacks::Input<float>(weights({{5, 4}, {5, 5}}), all, rng), "in_features of a linked adapter");
  const MatrixX<float> x = noise<float>(4, 3, 1);
  CHECK(Stacks::Input<float>(weights({{4, 4}, {5, 4}}), all, rng).forward(x, 2).rows() == 5);
  CHECK(Stacks::Middle<float>(weights({{5, 4}, {3, 5}}), none, rng).forward(x, 2).rows() == 3);
}

}  // namespace dylora::test
