#include "dylora/methods/pissa/init.hpp"
#include "dylora/methods/pissa/offset_low_rank.hpp"

#include <Eigen/SVD>
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "dylora/layers/linear.hpp"
#include "dylora/train/adamw.hpp"
#include "support/catch.hpp"
#include "support/threads.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

const std::pair<Index, Index> shapes[] = {{12, 9}, {7, 10}, {8, 8}};  // out, in

VectorX<double> spectrum(const MatrixX<double>& W) { return Eigen::JacobiSVD<MatrixX<double>>(W).singularValues(); }

template <class S>
MatrixX<double> exact(const S& m) {
  return m.template cast<double>();
}

/// s B_b A_b in double.
template <class S>
MatrixX<double> product(const LowRank<S>& adapter, Index b) {
  return static_cast<double>(adapter.scale(b)) * exact(adapter.B.leftCols(b)).lazyProduct(exact(adapter.A.topRows(b)));
}

template <class S, class Init>
void check_zero_start(const Init& init) {
  for (const auto& [out, in] : shapes) {
    const MatrixX<S> W = noise<S>(out, in, 1), x = noise<S>(in, 5, 2), dy = noise<S>(out, 5, 3);
    for (const ScaleRule rule : {alpha_over_rank, alpha_over_sqrt_rank, alpha_over_max_rank}) {
      Linear<S, OffsetLowRank<S>> layer(W, init(W, LowRankOptions{.max_rank = 4, .alpha = 3, .scale = rule}));
      const FrozenLinear<S> frozen{DenseWeight<S>(W)};
      CHECK(layer.max_rank() == 4);
      CHECK(same_bits(layer.base.W, W));
      typename Linear<S, OffsetLowRank<S>>::Cache cache;
      typename FrozenLinear<S>::Cache frozen_cache;
      auto gradients = zeros_like(layer);
      auto nothing = zeros_like(frozen);
      const MatrixX<S> y = frozen.forward(x, RankSlice::none(), frozen_cache), dx = frozen.backward(dy, frozen_cache, nothing);
      for (Index b = 1; b <= 4; ++b) {
        CHECK(same_bits(layer.forward(x, b, cache), y));
        CHECK(same_bits(layer.backward(dy, cache, gradients), dx));
        CHECK(same_bits(layer.merged(b).W, W));
        CHECK(layer.adapter.delta(b).isZero(0));
      }
      AdamW optimizer(layer, {.lr = 0.01});
      optimizer.step(layer, gradients);
      for (Index b = 1; b <= 4; ++b) CHECK_FALSE(same_bits(layer.forward(x, b), y));
    }
  }
}

template <class S, class Init>
void check_unchanged_output(const Init& residual) {
  for (const auto& [out, in] : shapes) {
    const MatrixX<S> W = noise<S>(out, in, 1), x = noise<S>(in, 5, 2);
    for (const double alpha : {1.0, 4.0, 16.0}) {
      auto [weight, adapter] = residual(W, LowRankOptions{.max_rank = 4, .alpha = alpha});
      CHECK(gap(exact(weight) + product(adapter, 4), exact(W)) < rounding<S>);
      const Linear<S> layer(std::move(weight), std::move(adapter));
      CHECK(gap(in_double(layer.forward(x, 4)), in_double<S>(W * x)) < rounding<S>);
    }
  }
}

}  // namespace

TEMPLATE_TEST_CASE("oracle of PiSSA: residual and adapter together are the weight and give its output", "", float, double) {
  using S = TestType;
  check_unchanged_output<S>([](const MatrixX<S>& W, const LowRankOptions& options) { return pissa_split<S>(W, options); });
}

TEMPLATE_TEST_CASE("oracle of PiSSA: the residual keeps exactly the tail of the spectrum and the adapter has the rest", "", float, double) {
  using S = TestType;
  for (const auto& [out, in] : shapes) {
    const MatrixX<S> W = noise<S>(out, in, 1);
    const VectorX<double> sigma = spectrum(in_double(W));
    const Index full = sigma.size();
    for (const Index r : {Index{1}, Index{3}, full}) {
      const auto [weight, adapter] = pissa_split<S>(W, {.max_rank = r, .alpha = 5});
      VectorX<double> tail = VectorX<double>::Zero(full), head = tail;
      tail.head(full - r) = sigma.tail(full - r);
      head.head(r) = sigma.head(r);
      CHECK((spectrum(in_double(weight)) - tail).cwiseAbs().maxCoeff() < rounding<S> * sigma[0]);
      CHECK((spectrum(product(adapter, r)) - head).cwiseAbs().maxCoeff() < rounding<S> * sigma[0]);
    }
  }
}

TEMPLATE_TEST_CASE("oracle of PiSSA: each component is a singular direction at its size shared equally by both factors", "", float,
                   double) {
  using S = TestType;
  for (const auto& [out, in] : shapes) {
    const MatrixX<S> W = noise<S>(out, in, 1);
    const VectorX<double> sigma = spectrum(in_double(W));
    const auto adapter = pissa_init<S>(W, {.max_rank = 4, .alpha = 6, .scale = alpha_over_sqrt_rank}).current;
    const double s = 6 / std::sqrt(4.0);
    const MatrixX<double> A = exact(adapter.A), B = exact(adapter.B);
    const MatrixX<double> expected = (sigma.head(4) / s).asDiagonal();
    CHECK(gap(A.lazyProduct(A.transpose()), expected) < rounding<S>);
    CHECK(gap(B.transpose().lazyProduct(B), expected) < rounding<S>);
    // W a = σ b and Wᵀ b = σ a, but for rounding.
    CHECK(gap(exact(W).lazyProduct(A.transpose()), B * sigma.head(4).asDiagonal()) < rounding<S>);
    for (Index c = 0; c < 4; ++c) {
      Index largest;
      B.col(c).cwiseAbs().maxCoeff(&largest);
      CHECK(B(largest, c) > 0);
    }
  }
}

TEMPLATE_TEST_CASE("oracle of PiSSA: the nested form is the base bit for bit at every rank and learns from the first step", "", float,
                   double) {
  using S = TestType;
  check_zero_start<S>([](const MatrixX<S>& W, const LowRankOptions& options) { return pissa_init<S>(W, options); });
}

TEST_CASE("oracle of PiSSA: the residual is right at one rank alone and lacks a principal component below") {
  const MatrixX<double> W = noise<double>(12, 9, 1);
  const VectorX<double> sigma = spectrum(W);
  const auto [weight, adapter] = pissa_split<double>(W, {.max_rank = 4, .alpha = 4, .scale = alpha_over_max_rank});
  for (Index b = 1; b < 4; ++b) {
    const VectorX<double> missing = spectrum(W - weight - adapter.delta(b));
    for (Index c = 0; c < 4 - b; ++c) CHECK(std::abs(missing[c] - sigma[b + c]) < 1e-12);
  }
  const auto rescaled = pissa_split<double>(W, {.max_rank = 4, .alpha = 4});
  CHECK(std::abs(spectrum(rescaled.weight + rescaled.adapter.delta(1))[0] - 4 * sigma[0]) < 1e-12);
}

TEMPLATE_TEST_CASE("a PiSSA start of fewer components is a prefix under a scale that is the same for both", "", float, double) {
  using S = TestType;
  const ScaleRule constant = [](double alpha, Index, Index) { return alpha; };
  const MatrixX<S> W = noise<S>(12, 9, 1);
  const auto whole = pissa_init<S>(W, {.max_rank = 5, .alpha = 2, .scale = constant});
  const auto part = pissa_init<S>(W, {.max_rank = 3, .alpha = 2, .scale = constant});
  CHECK(same_bits(MatrixX<S>(whole.current.A.topRows(3)), MatrixX<S>(part.current.A)));
  CHECK(same_bits(MatrixX<S>(whole.current.B.leftCols(3)), part.current.B));
}

TEMPLATE_TEST_CASE("oracle of OLoRA: residual and adapter together are the weight and give its output", "", float, double) {
  using S = TestType;
  check_unchanged_output<S>([](const MatrixX<S>& W, const LowRankOptions& options) { return olora_split<S>(W, options); });
}

TEMPLATE_TEST_CASE("oracle of OLoRA: B has orthonormal columns and A is the upper trapezoid of the QR decomposition", "", float, double) {
  using S = TestType;
  for (const auto& [out, in] : shapes) {
    const MatrixX<S> W = noise<S>(out, in, 1);
    const auto adapter = olora_init<S>(W, {.max_rank = 5, .alpha = 5}).current;
    const MatrixX<double> Q = exact(adapter.B), R = exact(adapter.A);
    CHECK(gap(Q.transpose().lazyProduct(Q), MatrixX<double>::Identity(5, 5)) < rounding<S>);
    for (Index c = 0; c < 5; ++c) {
      CHECK(R.row(c).head(c).isZero(0));
      CHECK(R(c, c) > 0);
    }
    // The decomposition of all of W by Gram and Schmidt, whose signs are these.
    MatrixX<double> rest = in_double(W), expected_Q(out, 5), expected_R = MatrixX<double>::Zero(5, in);
    for (Index c = 0; c < 5; ++c) {
      expected_Q.col(c) = rest.col(c).normalized();
      expected_R.row(c).tail(in - c) = (expected_Q.col(c).transpose() * rest).tail(in - c);
      rest -= (expected_Q.col(c) * (expected_Q.col(c).transpose() * rest)).eval();
    }
    CHECK(gap(Q, expected_Q) < rounding<S>);
    CHECK(gap(R, expected_R) < rounding<S>);
  }
}

TEMPLATE_TEST_CASE("oracle of OLoRA: at a scale of one the first columns of the residual are zero", "", float, double) {
  using S = TestType;
  for (const auto& [out, in] : shapes) {
    const MatrixX<S> W = noise<S>(out, in, 1);
    const auto residual = olora_split<S>(W, {.max_rank = 4, .alpha = 4});
    CHECK(in_double<S>(residual.weight.leftCols(4)).cwiseAbs().maxCoeff() < rounding<S>);
    CHECK(in_double<S>(residual.weight.rightCols(in - 4)).cwiseAbs().minCoeff() > 0);
    CHECK(spectrum(in_double(residual.weight))[std::min(in, out) - 4] < rounding<S> * spectrum(in_double(W))[0]);
  }
}

TEMPLATE_TEST_CASE("oracle of OLoRA: the nested form is the base bit for bit at every rank and learns from the first step", "", float,
                   double) {
  using S = TestType;
  check_zero_start<S>([](const MatrixX<S>& W, const LowRankOptions& options) { return olora_init<S>(W, options); });
}

TEMPLATE_TEST_CASE("an OLoRA start of fewer components is a prefix", "", float, double) {
  using S = TestType;
  const MatrixX<S> W = noise<S>(12, 9, 1);
  const auto whole = olora_init<S>(W, {.max_rank = 9}), part = olora_init<S>(W, {.max_rank = 3});
  CHECK(gap(exact(whole.current.A.topRows(3)), exact(part.current.A)) < rounding<S>);
  CHECK(gap(exact(whole.current.B.leftCols(3)), exact(part.current.B)) < rounding<S>);
}

TEST_CASE("weights without an inverse have factors too") {
  MatrixX<double> W = noise<double>(6, 5, 1);
  W.col(2) = W.col(0);
  W.col(3).setZero();
  for (const MatrixX<double>& singular : {W, MatrixX<double>(MatrixX<double>::Zero(6, 5))}) {
    for (const SplitWeight<double>& residual :
         {pissa_split<double>(singular, {.max_rank = 5}), olora_split<double>(singular, {.max_rank = 5})}) {
      CHECK(residual.adapter.A.allFinite());
      CHECK(residual.adapter.B.allFinite());
      CHECK((residual.weight + product(residual.adapter, 5) - singular).cwiseAbs().maxCoeff() < 1e-14);
    }
  }
}

TEST_CASE("a start of no component leaves the weight whole") {
  const MatrixX<float> W = noise<float>(6, 5, 1);
  for (const SplitWeight<float>& residual : {pissa_split<float>(W, {.max_rank = 0}), olora_split<float>(W, {.max_rank = 0})}) {
    CHECK(same_bits(residual.weight, W));
    CHECK(residual.adapter.max_rank() == 0);
    CHECK(residual.adapter.in_features() == 5);
    CHECK(residual.adapter.out_features() == 6);
  }
  CHECK(pissa_init<float>(W, {.max_rank = 0}).max_rank() == 0);
  CHECK(olora_init<float>(W, {.max_rank = 0}).max_rank() == 0);
}

TEST_CASE("weights that cannot be decomposed are refused") {
  MatrixX<float> W = noise<float>(6, 5, 1);
  const auto refused = [&](const auto& init, const std::string& name) {
    CHECK_THROWS_SAYING(std::invalid_argument, init(W, LowRankOptions{.max_rank = 6}), name + ": max_rank", "[0, 5]", "got 6");
    CHECK_THROWS_SAYING(std::invalid_argument, init(W, LowRankOptions{.max_rank = -1}), name + ": max_rank", "[0, 5]", "got -1");
    CHECK_THROWS_SAYING(std::invalid_argument, init(W, LowRankOptions{.max_rank = 2, .alpha = 0}), "LowRank: alpha", "finite number > 0");
    for (const float bad : {nan<float>, std::numeric_limits<float>::infinity()}) {
      MatrixX<float> broken = W;
      broken(3, 2) = bad;
      CHECK_THROWS_SAYING(NonFiniteError, init(broken, LowRankOptions{.max_rank = 2}), name + ": W", "finite");
    }
  };
  refused([](const auto& weight, const auto& options) { return pissa_init<float>(weight, options); }, "pissa_init");
  refused([](const auto& weight, const auto& options) { return pissa_split<float>(weight, options); }, "pissa_split");
  refused([](const auto& weight, const auto& options) { return olora_init<float>(weight, options); }, "olora_init");
  refused([](const auto& weight, const auto& options) { return olora_split<float>(weight, options); }, "olora_split");
}

TEST_CASE("a start has the same bits for any number of threads") {
  const MatrixX<double> W = noise<double>(670, 670, 4);  // large enough for Eigen's own threads to change those of PiSSA
  const auto same = [&](auto init) {
    const OffsetLowRank<double> expected = init();
    for_each_threading([&] { return std::optional(init()); },
                       [&](const std::optional<OffsetLowRank<double>>& got, const std::string& where) {
                         INFO(where);
                         CHECK(same_bits(got->current.A, expected.current.A));
                         CHECK(same_bits(got->current.B, expected.current.B));
                       });
  };
  same([&] { return pissa_init<double>(W, {.max_rank = 670}); });
  same([&] { return olora_init<double>(W, {.max_rank = 670}); });
}

TEST_CASE("what is thrown where Eigen is serial is thrown again") {
  int calls = 0;
  const auto fails = [&](Index) {
    ++calls;
    throw std::runtime_error("the body");
  };
  CHECK_THROWS_SAYING(std::runtime_error, detail::for_each_decomposition(1, fails), "the body");
  CHECK(calls == 1);
}

TEMPLATE_TEST_CASE("a Gaussian start has the deviation that was asked for and by default that of PEFT", "", float, double) {
  using S = TestType;
  Rng rng(3);
  for (const double deviation : {0.0, 0.02, 0.125}) {
    const LowRank<S> adapter =
        deviation == 0.125 ? gaussian_init<S>(500, 40, {.max_rank = 8}, rng) : gaussian_init<S>(500, 40, {.max_rank = 8}, deviation, rng);
    CHECK(adapter.B.isZero(0));
    CHECK(adapter.B.rows() == 40);
    const MatrixX<double> A = exact(adapter.A);
    if (deviation == 0) {
      CHECK(A.isZero(0));
      continue;
    }
    // 4000 draws: the root mean square has a relative deviation of 0.011, the mean one of 0.016; of normal numbers 31.7 % are beyond one
    // deviation, give or take 0.7 %, and of uniform ones 42.3 %.
    CHECK(std::abs(std::sqrt(A.squaredNorm() / 4000) / deviation - 1) < 0.04);
    CHECK(std::abs(A.mean() / deviation) < 0.06);
    CHECK(std::abs(static_cast<double>((A.array().abs() > deviation).count()) / 4000 - 0.317) < 0.03);
  }
  CHECK_THROWS_SAYING(std::invalid_argument, gaussian_init<S>(5, 4, {.max_rank = 5}, rng), "gaussian_init: max_rank", "[0, 4]", "got 5");
  CHECK_THROWS_SAYING(std::invalid_argument, gaussian_init<S>(5, 4, {.max_rank = 2}, -1.0, rng), "deviation");
  CHECK(gaussian_init<S>(5, 4, {.max_rank = 0}, rng).max_rank() == 0);
}

}  // namespace dylora::test
