#include <cmath>
#include <vector>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/ranks/scale.hpp"
#include "dylora/train/sgd.hpp"
#include "support/catch.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

/// A layer without a base, whose fresh adapter has this rule.
Linear<double> fresh_layer(Index in, Index out, Index max_rank, ScaleRule scale) {
  Rng rng(1);
  return Linear<double>(MatrixX<double>(MatrixX<double>::Zero(out, in)), {.max_rank = max_rank, .alpha = 3, .scale = scale}, rng);
}

/// How far one step of gradient descent moves the output of a fresh adapter of this rank.
double moved(Index rank, ScaleRule scale) {
  Linear<double> layer = fresh_layer(512, 256, rank, scale);
  const MatrixX<double> x = noise<double>(512, 1, 2), dy = noise<double>(256, 1, 3);
  Linear<double>::Cache cache;
  auto gradients = zeros_like(layer);
  (void)layer.forward(x, rank, cache);
  (void)layer.backward(dy, cache, gradients);
  Sgd<Linear<double>>(layer, {.lr = 1}).step(layer, gradients);
  return layer.forward(x, rank).norm() / dy.norm();
}

}  // namespace

TEST_CASE("oracle of rsLoRA: the scale is alpha over the root of the active rank") {
  Linear<double> layer = fresh_layer(9, 7, 5, alpha_over_sqrt_rank);
  layer.base.W = noise<double>(7, 9, 1);
  randomize<Linear<double>>(layer, 2);
  const MatrixX<double> x = noise<double>(9, 6, 3);
  for (Index b = 1; b <= 5; ++b) {
    const MatrixX<double> change = 3 / std::sqrt(double(b)) * layer.adapter.B.leftCols(b) * layer.adapter.A.topRows(b);
    CHECK(gap(layer.forward(x, b), (layer.base.W + change) * x) < rounding<double>);
    CHECK(gap(layer.merged(b).W, layer.base.W + change) < rounding<double>);
    CHECK(layer.adapter.factors(b).scale == 3 / std::sqrt(double(b)));
  }
}

TEST_CASE("oracle of rsLoRA: the jump of the scale between neighbouring ranks is the root of LoRA's") {
  for (Index b = 1; b < 64; ++b) {
    const double jump = alpha_over_sqrt_rank(3, b, 64) / alpha_over_sqrt_rank(3, b + 1, 64);
    CHECK(jump == Approx(std::sqrt(double(b + 1) / double(b))).epsilon(1e-15));
    CHECK(jump * jump == Approx(alpha_over_rank(3, b, 64) / alpha_over_rank(3, b + 1, 64)).epsilon(1e-15));
  }
}

TEST_CASE("oracle of rsLoRA: what a step learns does not fade as the rank grows") {
  // From B = 0 a step moves y by −s² ‖A x‖² dy, and ‖A x‖² grows with the rank: s² · rank is to stay.
  const double reference = moved(16, alpha_over_sqrt_rank);
  for (const Index rank : {32, 64, 128, 256}) {
    CHECK(moved(rank, alpha_over_sqrt_rank) == Approx(reference).epsilon(0.35));
    const double faded = moved(16, alpha_over_rank) / moved(rank, alpha_over_rank), expected = double(rank) / 16;
    CHECK(faded == Approx(expected).epsilon(0.35));
  }
}

}  // namespace dylora::test
