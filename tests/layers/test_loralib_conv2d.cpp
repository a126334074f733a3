#include "dylora/layers/loralib_conv2d.hpp"

#include "dylora/layers/conv2d.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

template <class S>
LoralibConv2d<S> make_loralib(Index in, Index out, Index rank, LoralibConv2dOptions options) {
  const Index k = options.kernel;
  return {RowMatrix<S>(noise<S>(rank * k, in * k, 1)), noise<S>(out / options.groups * k, rank * k, 2), options};
}

TEMPLATE_TEST_CASE("oracle of LoRA convolution: loralib's layout is B A read row by row, with k rows to a unit of rank", "", float,
                   double) {
  using S = TestType;
  for (const Index k : {1, 2, 3}) {
    for (const Index groups : {1, 2}) {
      const Index in = 4, out = 6, rank = 3;
      const auto adapter = make_loralib<S>(in, out, rank, {.kernel = k, .groups = groups, .alpha = 2});
      CHECK(adapter.max_rank() == rank);
      CHECK(adapter.out_channels() == out);
      CHECK(adapter.patch_size() == in / groups * k * k);
      const MatrixX<double> A = in_double(noise<S>(rank * k, in * k, 1)), B = in_double(noise<S>(out / groups * k, rank * k, 2));
      for (Index b = 1; b <= rank; ++b) {
        const MatrixX<S> delta = adapter.delta(b);
        MatrixX<double> expected(delta.rows(), delta.cols());
        for (Index i = 0; i < expected.rows(); ++i) {
          for (Index j = 0; j < expected.cols(); ++j) {
            const Index flat = i * expected.cols() + j, row = flat / A.cols(), column = flat % A.cols();
            double sum = 0;
            for (Index c = 0; c < b * k; ++c) sum += B(row, c) * A(c, column);
            expected(i, j) = 2.0 / static_cast<double>(b) * sum;
          }
        }
        CHECK(gap(in_double(delta), expected) < rounding<S>);
        const MatrixX<S> W = noise<S>(out, delta.cols(), 3);
        const VectorX<S> bias = noise<S>(out, 1, 4);
        const DenseWeight<S> merged = adapter.merged({W, bias}, b);
        CHECK(same_bits(merged.W, MatrixX<S>(W + delta)));
        CHECK(same_bits(MatrixX<S>(merged.bias), MatrixX<S>(bias)));
      }
      CHECK(adapter.delta(RankSlice::none()).isZero(0));
    }
  }
}

TEMPLATE_TEST_CASE(
    "oracle of LoRA convolution: an adapter in loralib's layout goes on as one of low rank, at every rank under every scale rule", "",
    float, double) {
  using S = TestType;
  for (const ScaleRule rule : {alpha_over_rank, alpha_over_sqrt_rank, alpha_over_max_rank}) {
    for (const Index k : {1, 2, 3}) {
      const auto loralib = make_loralib<S>(2, 5, 3, {.kernel = k, .alpha = 2, .scale = rule});
      const LowRank<S> adapter = loralib.low_rank();
      CHECK(adapter.max_rank() == 3 * k * k);
      for (Index b = 1; b <= 3; ++b) CHECK(gap(in_double(adapter.delta(b * k * k)), in_double(loralib.delta(b))) < rounding<S>);
    }
  }
}

TEST_CASE("a convolution takes over an adapter in loralib's layout and trains it") {
  const auto loralib = make_loralib<double>(2, 5, 2, {.kernel = 3, .alpha = 2});
  const DenseWeight<double> base(noise<double>(5, 18, 5), noise<double>(5, 1, 6));
  const Unfold unfold({.channels = 2, .image = {4, 4}, .kernel = {3, 3}});
  const Conv2d<double> conv(unfold, {Linear<double>(base, loralib.low_rank())});
  const MatrixX<double> x = noise<double>(32, 2, 7);
  for (const Index b : {1, 2}) {
    const Conv2d<double, FrozenLinear<double>> merged(unfold, {FrozenLinear<double>(loralib.merged(base, b))});
    CHECK(gap(conv.forward(x, b * 9), merged.forward(x, RankSlice::none())) < rounding<double>);
  }
  Conv2d<double>::Cache cache;
  auto gradients = zeros_like(conv);
  const MatrixX<double> y = conv.forward(x, 18, cache);
  (void)conv.backward(y, cache, gradients);
  CHECK_FALSE(gradients.groups[0].adapter.A.isZero(0));
}

TEST_CASE("an adapter in loralib's layout of rank 0 adds nothing") {
  const auto adapter = make_loralib<float>(2, 4, 0, {.kernel = 3});
  CHECK(adapter.max_rank() == 0);
  CHECK(adapter.delta(RankSlice::none()).isZero(0));
  CHECK(adapter.delta(RankSlice::none()).rows() == 4);
  CHECK(adapter.low_rank().max_rank() == 0);
}

TEST_CASE("loralib's layout refuses what does not fit and says what was expected and what came") {
  const auto make = [](Index rows_of_A, Index cols_of_A, Index rows_of_B, Index cols_of_B, LoralibConv2dOptions options) {
    return LoralibConv2d<float>(RowMatrix<float>::Ones(rows_of_A, cols_of_A), MatrixX<float>::Ones(rows_of_B, cols_of_B), options);
  };
  CHECK_THROWS_SAYING(ShapeError, make(6, 12, 9, 5, {}), "columns of lora_B", "expected 6", "got 5");
  CHECK_THROWS_SAYING(ShapeError, make(5, 12, 9, 5, {}), "rows of lora_A modulo kernel", "expected 0", "got 2");
  CHECK_THROWS_SAYING(ShapeError, make(6, 10, 9, 6, {}), "columns of lora_A modulo kernel", "expected 0", "got 1");
  CHECK_THROWS_SAYING(ShapeError, make(6, 9, 9, 6, {.groups = 2}), "columns of lora_A modulo kernel * groups", "expected 0", "got 3");
  CHECK_THROWS_SAYING(ShapeError, make(6, 12, 10, 6, {}), "rows of lora_B modulo kernel", "expected 0", "got 1");
  CHECK_THROWS_SAYING(std::invalid_argument, make(6, 12, 9, 6, {.kernel = 0}), "LoralibConv2d: kernel", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, make(6, 12, 9, 6, {.groups = -1}), "LoralibConv2d: groups", "got -1");
  const auto adapter = make_loralib<float>(2, 4, 2, {.kernel = 3});
  CHECK_THROWS_SAYING(std::invalid_argument, adapter.delta(3), "LoralibConv2d::delta: rank", "[0, 2]", "got 3");
  CHECK_THROWS_SAYING(ShapeError, adapter.merged(noise<float>(5, 18, 1), 1), "rows of the weight", "expected 4", "got 5");
  CHECK_THROWS_SAYING(ShapeError, adapter.merged(noise<float>(4, 17, 1), 1), "columns of the weight", "expected 18", "got 17");
  CHECK_THROWS_SAYING(std::invalid_argument, make_loralib<float>(2, 4, 1, {.kernel = 3, .groups = 2}).low_rank(), "low_rank: groups",
                      "[1, 1]", "got 2");
}

}  // namespace dylora::test
