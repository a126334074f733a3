#include "dylora/train/loss.hpp"

#include <cmath>
#include <vector>

#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

constexpr Index ignored = -100;

/// By the formula, in long double; the gradient too.
template <class S>
Loss<double> plain_cross_entropy(const MatrixX<S>& logits, const std::vector<Index>& targets, double weight = 1) {
  Loss<double> loss{0, MatrixX<double>::Zero(logits.rows(), logits.cols())};
  long double sum = 0, counted = 0;
  for (const Index target : targets) counted += target != ignored ? 1 : 0;
  for (Index i = 0; i < logits.cols(); ++i) {
    const Index target = targets[static_cast<std::size_t>(i)];
    if (target == ignored) continue;
    const VectorX<long double> z = logits.col(i).template cast<long double>();
    const VectorX<long double> p = (z.array() - z.maxCoeff()).exp() / (z.array() - z.maxCoeff()).exp().sum();
    sum -= std::log(p[target]);
    for (Index c = 0; c < logits.rows(); ++c) {
      loss.gradient(c, i) = static_cast<double>(static_cast<long double>(weight) * (p[c] - (c == target ? 1 : 0)) / counted);
    }
  }
  loss.value = static_cast<double>(sum / counted);
  return loss;
}

std::vector<Index> targets_for(Index classes, Index samples, bool with_ignored) {
  std::vector<Index> targets;
  for (Index i = 0; i < samples; ++i) targets.push_back(with_ignored && i % 3 == 1 ? ignored : (7 * i + 3) % classes);
  return targets;
}

}  // namespace

TEMPLATE_TEST_CASE("the squared error is the mean over all elements and its gradient the derivative", "", float, double) {
  using S = TestType;
  const MatrixX<S> y = noise<S>(5, 7, 1), target = noise<S>(5, 7, 2);
  const MatrixX<double> difference = in_double(y) - in_double(target);
  const auto loss = mse(y, target);
  CHECK(loss.value == Approx(difference.squaredNorm() / 35).epsilon(rounding<S>));
  CHECK(gap(in_double(loss.gradient), 2 * difference / 35) < rounding<S>);
  CHECK(mse(y, y).value == 0);
  CHECK(mse(y, y).gradient.isZero(0));
}

TEMPLATE_TEST_CASE("a weight scales the gradient of a loss and not its value", "", float, double) {
  using S = TestType;
  const MatrixX<S> y = noise<S>(5, 7, 1), target = noise<S>(5, 7, 2);
  MatrixX<S> gradient = all_nan<S>(5, 7);
  CHECK(mse<S>(y, target, gradient, 0.25) == mse(y, target).value);
  CHECK(gap(in_double(gradient), 0.25 * in_double(mse(y, target).gradient)) < rounding<S>);
  const auto targets = targets_for(5, 7, true);
  gradient = all_nan<S>(5, 7);
  CHECK(cross_entropy<S>(y, targets, gradient, {.weight = 0.25}) == cross_entropy<S>(y, targets).value);
  CHECK(gap(in_double(gradient), 0.25 * in_double(cross_entropy<S>(y, targets).gradient)) < rounding<S>);
}

TEMPLATE_TEST_CASE("the gradient of a loss may take the place of the output", "", float, double) {
  using S = TestType;
  for (const Index classes : {5, 64, 70}) {
    const MatrixX<S> y = noise<S>(classes, 7, 1), target = noise<S>(classes, 7, 2);
    const auto targets = targets_for(classes, 7, true);
    MatrixX<S> in_place = y;
    CHECK(mse<S>(in_place, target, in_place) == mse(y, target).value);
    CHECK(same_bits(in_place, mse(y, target).gradient));
    in_place = y;
    CHECK(cross_entropy<S>(in_place, targets, in_place) == cross_entropy<S>(y, targets).value);
    CHECK(same_bits(in_place, cross_entropy<S>(y, targets).gradient));
  }
}

TEMPLATE_TEST_CASE("the cross entropy is the mean negative log of the softmax at the targets", "", float, double) {
  using S = TestType;
  for (const Index classes : {1, 2, 63, 64, 65, 130}) {
    for (const bool with_ignored : {false, true}) {
      const MatrixX<S> logits = 8 * noise<S>(classes, 9, 1);
      const auto targets = targets_for(classes, 9, with_ignored);
      const auto loss = cross_entropy<S>(logits, targets);
      const auto plain = plain_cross_entropy(logits, targets);
      CHECK(loss.value == Approx(plain.value).epsilon(rounding<S>).margin(rounding<S>));
      CHECK(gap(in_double(loss.gradient), plain.gradient) < rounding<S>);
      for (Index i = 1; with_ignored && i < 9; i += 3) CHECK(loss.gradient.col(i).isZero(0));
    }
  }
}

TEST_CASE("the gradients of the losses are their differences") {
  const MatrixX<double> target = noise<double>(6, 4, 2);
  const auto targets = targets_for(6, 4, true);
  const auto check = [](auto&& loss) {
    MatrixX<double> y = 3 * noise<double>(6, 4, 1);
    const MatrixX<double> gradient = loss(y).gradient;
    MatrixX<double> differences(6, 4);
    for (Index i = 0; i < y.size(); ++i) {
      const double kept = y.data()[i], h = 1e-5;
      y.data()[i] = kept + h;
      const double above = loss(y).value;
      y.data()[i] = kept - h;
      differences.data()[i] = (above - loss(y).value) / (2 * h);
      y.data()[i] = kept;
    }
    CHECK(gap(gradient, differences) < 1e-8);
  };
  check([&](const MatrixX<double>& y) { return mse(y, target); });
  check([&](const MatrixX<double>& y) { return cross_entropy<double>(y, targets); });
}

TEMPLATE_TEST_CASE("huge logits overflow nothing and shifting them changes nothing", "", float, double) {
  using S = TestType;
  MatrixX<S> logits(3, 1);
  logits << S(3e4), S(-3e4), S(0);
  const std::vector<Index> right{0}, wrong{1};
  CHECK(cross_entropy<S>(logits, right).value == 0);
  CHECK(cross_entropy<S>(logits, wrong).value == 6e4);
  CHECK(cross_entropy<S>(logits, wrong).gradient.allFinite());
  logits << S(1), S(2), S(3);
  const MatrixX<S> shifted = logits.array() + S(512);
  CHECK(cross_entropy<S>(shifted, wrong).value == Approx(cross_entropy<S>(logits, wrong).value).epsilon(rounding<S>));
  CHECK(same_bits(cross_entropy<S>(shifted, wrong).gradient, cross_entropy<S>(logits, wrong).gradient));
}

TEMPLATE_TEST_CASE("a sample's gradient does not depend on the batch it is in", "", float, double) {
  using S = TestType;
  const MatrixX<S> logits = noise<S>(70, 16, 1);
  const auto targets = targets_for(70, 16, false);
  const auto batch = cross_entropy<S>(logits, targets);
  for (const Index i : {0, 5, 15}) {
    // 16 samples divide the gradient by a power of two: exactly.
    const auto alone = cross_entropy<S>(logits.col(i).eval(), std::span(targets).subspan(static_cast<std::size_t>(i), 1));
    CHECK(same_bits(MatrixX<S>(16 * batch.gradient.col(i)), alone.gradient));
  }
}

TEST_CASE("the index to ignore can be chosen") {
  const MatrixX<double> logits = noise<double>(5, 3, 1);
  const std::vector<Index> targets{1, 4, 2}, marked{1, ignored, 2};
  CHECK(cross_entropy<double>(logits, targets, {.ignore_index = 4}).value == cross_entropy<double>(logits, marked).value);
}

TEST_CASE("losses refuse what does not fit and say what was expected and what came") {
  const MatrixX<float> y = noise<float>(5, 7, 1);
  MatrixX<float> tall(6, 7), wide(5, 8), gradient(5, 7);
  CHECK_THROWS_SAYING(ShapeError, mse(y, noise<float>(6, 7, 1)), "mse: rows of target", "expected 5", "got 6");
  CHECK_THROWS_SAYING(ShapeError, mse(y, noise<float>(5, 8, 1)), "mse: samples in target", "expected 7", "got 8");
  CHECK_THROWS_SAYING(ShapeError, mse<float>(y, y, tall), "mse: rows of gradient", "expected 5", "got 6");
  CHECK_THROWS_SAYING(ShapeError, mse<float>(y, y, wide), "mse: samples in gradient", "expected 7", "got 8");
  CHECK_THROWS_SAYING(ShapeError, mse(MatrixX<float>(5, 0), MatrixX<float>(5, 0)), "mse: y", "empty batch");
  CHECK_THROWS_SAYING(ShapeError, mse(MatrixX<float>(0, 3), MatrixX<float>(0, 3)), "mse: y");

  const auto targets = targets_for(5, 7, false);
  const auto with = [&](Index target) {
    auto changed = targets;
    changed[3] = target;
    return changed;
  };
  CHECK_THROWS_SAYING(ShapeError, cross_entropy<float>(y, targets_for(5, 6, false)), "cross_entropy: number of targets", "expected 7",
                      "got 6");
  CHECK_THROWS_SAYING(ShapeError, cross_entropy<float>(y, targets, tall), "cross_entropy: rows of gradient", "expected 5", "got 6");
  CHECK_THROWS_SAYING(ShapeError, cross_entropy<float>(y, targets, wide), "cross_entropy: samples in gradient", "expected 7", "got 8");
  CHECK_THROWS_SAYING(ShapeError, cross_entropy<float>(MatrixX<float>(5, 0), {}), "cross_entropy: logits", "empty batch");
  CHECK_THROWS_SAYING(std::invalid_argument, cross_entropy<float>(y, with(5)), "target of sample 3", "[0, 4]", "-100", "got 5");
  CHECK_THROWS_SAYING(std::invalid_argument, cross_entropy<float>(y, with(-1)), "target of sample 3", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, cross_entropy<float>(y, with(ignored), {.ignore_index = -7}), "target of sample 3", "-7",
                      "got -100");
  CHECK_THROWS_SAYING(std::invalid_argument, cross_entropy<float>(y, std::vector<Index>(7, ignored)), "at least one target",
                      "only the ignore index");
}

}  // namespace dylora::test
