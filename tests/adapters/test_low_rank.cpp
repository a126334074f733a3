#include "dylora/adapters/low_rank.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dylora/ranks/truncate.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

using AdaptersUnderTest = InFloatAndDouble<LowRank>;

}  // namespace dylora::test

#include "laws/adapter_laws.hpp"

namespace dylora::test {

namespace {

template <class S>
LowRank<S> trained(LowRankOptions options) {
  return {RowMatrix<S>(noise<S>(options.max_rank, 9, 1)), noise<S>(7, options.max_rank, 2), options};
}

double cubed(double alpha, Index rank, Index max_rank) { return alpha * static_cast<double>(rank * rank * rank + max_rank); }

}  // namespace

TEMPLATE_TEST_CASE("the output of a low-rank adapter is alpha over b times B A x", "", float, double) {
  using S = TestType;
  const LowRank<S> adapter = trained<S>({.max_rank = 5, .alpha = 3});
  const MatrixX<S> x = noise<S>(9, 4, 3);
  for (Index b = 1; b <= 5; ++b) {
    MatrixX<double> expected = MatrixX<double>::Zero(7, 4);
    for (Index o = 0; o < 7; ++o) {
      for (Index s = 0; s < 4; ++s) {
        for (Index r = 0; r < b; ++r) {
          double h = 0;
          for (Index i = 0; i < 9; ++i) h += double(adapter.A(r, i)) * double(x(i, s));
          expected(o, s) += 3.0 / static_cast<double>(b) * double(adapter.B(o, r)) * h;
        }
      }
    }
    CHECK(gap(in_double(run(adapter, x, noise<S>(7, 4, 4), b).y), expected) < rounding<S>);
    CHECK(adapter.scale(b) == static_cast<S>(3.0 / static_cast<double>(b)));
  }
}

TEMPLATE_TEST_CASE("a low-rank adapter is linear in alpha under every scale rule", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(9, 4, 3), dy = noise<S>(7, 4, 4);
  for (const ScaleRule rule : {alpha_over_rank, alpha_over_sqrt_rank, alpha_over_max_rank, cubed}) {
    for (Index b = 1; b <= 5; ++b) {
      const auto one = run(trained<S>({.max_rank = 5, .alpha = 1.5, .scale = rule}), x, dy, b);
      const auto four = run(trained<S>({.max_rank = 5, .alpha = 6, .scale = rule}), x, dy, b);
      CHECK(same_bits(four.y, MatrixX<S>(4 * one.y)));
      CHECK(same_bits(four.dx, MatrixX<S>(4 * one.dx)));
      CHECK(same_bits(values<LowRank<S>>(four.gradients), VectorX<S>(4 * values<LowRank<S>>(one.gradients))));
    }
  }
}

TEMPLATE_TEST_CASE("a low-rank adapter that was cut keeps its scales under every rule", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(9, 4, 3), dy = noise<S>(7, 4, 4);
  for (const ScaleRule rule : {alpha_over_rank, alpha_over_sqrt_rank, alpha_over_max_rank, cubed}) {
    const LowRank<S> whole = trained<S>({.max_rank = 5, .alpha = 3, .scale = rule});
    for (Index components = 1; components <= 5; ++components) {
      LowRank<S> cut = whole;
      truncate(cut, components);
      CHECK(cut.max_rank() == 5);
      CHECK(cut.components() == components);
      for (Index b = 1; b <= 5; ++b) {
        const Index used = std::min(b, components);
        const auto got = run(cut, x, dy, b), expected = run(whole, x, dy, used);
        CHECK(same_bits(got.y, expected.y));
        CHECK(same_bits(got.dx, expected.dx));
        CHECK(same_bits(values<LowRank<S>>(got.gradients), component_values<LowRank<S>>(expected.gradients, 0, components)));
        CHECK(same_bits(cut.delta(b), whole.delta(used)));
      }
    }
  }
}

TEST_CASE("factors of more components than the largest rank are refused") {
  LowRank<float> adapter = trained<float>({.max_rank = 3});
  adapter.options.max_rank = 2;
  LowRank<float>::Cache cache;
  MatrixX<float> y = MatrixX<float>::Zero(7, 4);
  CHECK_THROWS_SAYING(std::invalid_argument, adapter.add_forward(noise<float>(9, 4, 3), 2, cache, y), "LowRank: components", "max_rank",
                      "[0, 2]", "got 3");
  CHECK_THROWS_SAYING(std::invalid_argument, adapter.delta(2), "LowRank: components", "[0, 2]", "got 3");
  CHECK(y.isZero(0));
}

TEST_CASE("an adapter cut to nothing refuses a cache from before") {
  const LowRank<float> whole = trained<float>({.max_rank = 3});
  LowRank<float> cut = whole;
  truncate(cut, 0);
  const MatrixX<float> x = noise<float>(9, 4, 3), dy = noise<float>(7, 4, 4);
  LowRank<float>::Cache cache;
  MatrixX<float> y = MatrixX<float>::Zero(7, 4), dx = MatrixX<float>::Zero(9, 4);
  whole.add_forward(x, 3, cache, y);
  auto gradients = zeros_like(cut);
  CHECK_THROWS_AS(cut.add_backward(x, dy, cache, gradients, dx), std::invalid_argument);
  CHECK(dx.isZero(0));
}

TEST_CASE("a user's scale rule sees alpha and the rank and the largest rank") {
  const LowRank<double> adapter = trained<double>({.max_rank = 5, .alpha = 2, .scale = cubed});
  CHECK(adapter.scale(1) == 12);
  CHECK(adapter.scale(3) == 64);
}

TEST_CASE("at the largest rank DyLoRA is LoRA with the same alpha") {
  const LowRank<double> dynamic = trained<double>({.max_rank = 5, .alpha = 3});
  const LowRank<double> lora = trained<double>({.max_rank = 5, .alpha = 3, .scale = alpha_over_max_rank});
  const MatrixX<double> x = noise<double>(9, 4, 3), dy = noise<double>(7, 4, 4);
  CHECK(run(dynamic, x, dy, 5) == run(lora, x, dy, 5));
  CHECK_FALSE(run(dynamic, x, dy, 4) == run(lora, x, dy, 4));
}

TEMPLATE_TEST_CASE("a fresh adapter has A uniform within one over the root of in and B zero", "", float, double) {
  using S = TestType;
  Rng rng(5);
  const LowRank<S> adapter(400, 50, {.max_rank = 40}, rng);
  const double bound = 1 / std::sqrt(400.0);
  const MatrixX<double> A = in_double<S>(adapter.A);
  CHECK(A.maxCoeff() <= bound);
  CHECK(A.minCoeff() >= -bound);
  // 16000 draws: the mean of |A| / bound is 1/2 with a deviation of 0.0023, that of A / bound 0 with 0.0046.
  CHECK(std::abs(A.cwiseAbs().mean() / bound - 0.5) < 0.01);
  CHECK(std::abs(A.mean() / bound) < 0.02);
  CHECK(A.cwiseAbs().maxCoeff() > 0.999 * bound);
  CHECK(adapter.B.isZero(0));
  CHECK(adapter.B.rows() == 50);
  CHECK(adapter.B.cols() == 40);
}

TEST_CASE("the same seed makes the same adapter and another seed another") {
  Rng one(5), same(5), other(6);
  const LowRank<float> a(20, 10, {}, one), b(20, 10, {}, same), c(20, 10, {}, other);
  CHECK(same_bits(MatrixX<float>(a.A), MatrixX<float>(b.A)));
  CHECK_FALSE(same_bits(MatrixX<float>(a.A), MatrixX<float>(c.A)));
}

TEST_CASE("a component is contiguous in both factors so that a truncation is a prefix of the buffers") {
  const LowRank<float> adapter = trained<float>({.max_rank = 5});
  CHECK(&adapter.A(3, 0) == adapter.A.data() + 3 * 9);
  CHECK(&adapter.B(0, 3) == adapter.B.data() + 3 * 7);
}

TEST_CASE("an adapter of largest rank 0 is no adapter and takes any rank") {
  Rng rng(1);
  const LowRank<float> none(9, 7, {.max_rank = 0}, rng);
  const auto result = run(none, noise<float>(9, 4, 3), noise<float>(7, 4, 4), 3);
  CHECK(result.y.isZero(0));
  CHECK(result.dx.isZero(0));
  CHECK(parameter_count(none) == 0);
  CHECK(none.delta(3).isZero(0));
  CHECK(none.delta(3).rows() == 7);
}

TEST_CASE("an adapter takes its largest rank from trained factors") {
  const LowRank<float> adapter(RowMatrix<float>(noise<float>(3, 9, 1)), noise<float>(7, 3, 2), {.max_rank = 8});
  CHECK(adapter.max_rank() == 3);
  CHECK(adapter.options.max_rank == 3);
  CHECK_THROWS_SAYING(ShapeError, LowRank<float>(RowMatrix<float>(noise<float>(3, 9, 1)), noise<float>(7, 4, 2), {}), "LowRank", "rank",
                      "expected 3", "got 4");
}

TEST_CASE("an adapter refuses ranks that its weight cannot have and an alpha that is no positive number") {
  Rng rng(1);
  using L = LowRank<float>;
  CHECK_THROWS_SAYING(std::invalid_argument, L(9, 7, {.max_rank = 8}, rng), "LowRank: max_rank", "[0, 7]", "got 8");
  CHECK_THROWS_SAYING(std::invalid_argument, L(5, 7, {.max_rank = 6}, rng), "LowRank: max_rank", "[0, 5]", "got 6");
  CHECK_THROWS_SAYING(std::invalid_argument, L(9, 7, {.max_rank = -1}, rng), "LowRank: max_rank", "[0, 7]", "got -1");
  for (const double alpha : {0.0, -1.0, nan<double>, std::numeric_limits<double>::infinity()}) {
    CHECK_THROWS_SAYING(std::invalid_argument, L(9, 7, {.max_rank = 2, .alpha = alpha}, rng), "LowRank: alpha", "finite number > 0", "got");
    CHECK_THROWS_SAYING(std::invalid_argument, L(RowMatrix<float>(noise<float>(3, 9, 1)), noise<float>(7, 3, 2), {.alpha = alpha}),
                        "LowRank: alpha");
  }
  CHECK(L(9, 7, {.max_rank = 7}, rng).max_rank() == 7);
}

}  // namespace dylora::test
