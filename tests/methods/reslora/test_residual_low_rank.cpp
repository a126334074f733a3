#include "dylora/methods/reslora/link.hpp"
#include "dylora/methods/reslora/residual_low_rank.hpp"
#include "dylora/methods/reslora/shortcut.hpp"

#include "methods/reslora/residual_under_test.hpp"
#include "support/law.hpp"
#include "support/throws.hpp"

namespace dylora::test {

using AdaptersUnderTest = EachShortcut<ResidualLowRank>::UnderTest;

}  // namespace dylora::test

#include "laws/adapter_laws.hpp"

namespace dylora::test {

/// The first link of a chain with these factors.
template <class S, Shortcut shortcut>
void check_first_link(double alpha) {
  const MatrixX<S> x = noise<S>(9, 5, 1), dy = noise<S>(7, 5, 2);
  LowRank<S> lora = make_adapter<LowRank<S>>(9, 7, law_rank, 10);
  randomize<LowRank<S>>(lora, 3);
  const ResidualLowRank<S, shortcut> first(lora, -1, 0);
  lora.options.alpha = alpha;
  for (const RankSlice rank : law_slices()) {
    const auto got = run(first, x, dy, rank);
    const auto expected = run(lora, x, dy, rank);
    CHECK(same_bits(got.y, expected.y));
    CHECK(same_bits(got.dx, expected.dx));
    CHECK(same_bits(values<LowRank<S>>(got.gradients.inner), values<LowRank<S>>(expected.gradients)));
  }
}

TEMPLATE_TEST_CASE("oracle of ResLoRA: the first link of an input chain is LoRA with its scale doubled bit for bit", "", float, double) {
  check_first_link<TestType, Shortcut::input>(2 * law_alpha);
}

TEMPLATE_TEST_CASE("the first link of a block or middle chain is LoRA bit for bit", "", float, double) {
  check_first_link<TestType, Shortcut::block>(law_alpha);
  check_first_link<TestType, Shortcut::middle>(law_alpha);
}

TEST_CASE("a residual adapter refuses a reach or position that cannot be") {
  Rng rng(1);
  using A = ResidualLowRank<float, Shortcut::block>;
  CHECK_THROWS_SAYING(std::invalid_argument, A(4, 4, {.adapter = {.max_rank = 2}, .reach = -2}, rng), "reach", "-1", "got -2");
  CHECK_THROWS_SAYING(std::invalid_argument, A(4, 4, {.adapter = {.max_rank = 2}, .position = -1}, rng), "position", "0", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, A(4, 4, {.adapter = {.max_rank = 5}}, rng), "max_rank", "[0, 4]", "got 5");
}

TEST_CASE("a residual adapter's factors that were made to disagree after construction are refused") {
  auto adapter = make_adapter<ResidualLowRank<float, Shortcut::input>>(6, 4, 3, 1);
  adapter.inner.B = MatrixX<float>::Ones(4, 2);
  MatrixX<float> y(4, 2);
  ResidualLowRank<float, Shortcut::input>::Cache cache;
  CHECK_THROWS_SAYING(ShapeError, adapter.add_forward(noise<float>(6, 2, 1), 3, cache, y), "columns of B", "expected 3", "got 2");
}

TEST_CASE("a link by itself is no plain product, so it can be neither merged nor exported") {
  STATIC_REQUIRE_FALSE(MergeableAdapter<ResidualLowRank<float, Shortcut::input>>);
  STATIC_REQUIRE_FALSE(PortableAdapter<ResidualLowRank<float, Shortcut::block>>);
  STATIC_REQUIRE_FALSE(is_mergeable<ResidualLink<float, Shortcut::block>>);
  STATIC_REQUIRE(FactoredAdapter<ResidualLowRank<float, Shortcut::middle>>);
}

}  // namespace dylora::test
