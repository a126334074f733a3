#include "dylora/train/adamw.hpp"

#include <cmath>

namespace dylora::test {

template <class T>
using Optimizer = AdamW<T>;

inline AdamWOptions stateful_options() { return {.lr = 0.05, .weight_decay = 0.1}; }

}  // namespace dylora::test

#include "laws/optimizer_laws.hpp"

namespace dylora::test {

namespace {

/// One value and its moments, by the formula, a step at a time.
struct Plain {
  double p, m = 0, v = 0;
  int t = 0;

  void step(double g, const AdamWOptions& o) {
    ++t;
    m = o.beta1 * m + (1 - o.beta1) * g;
    v = o.beta2 * v + (1 - o.beta2) * g * g;
    const double m_hat = m / (1 - std::pow(o.beta1, t)), v_hat = v / (1 - std::pow(o.beta2, t));
    p = (1 - o.lr * o.weight_decay) * p - o.lr * m_hat / (std::sqrt(v_hat) + o.eps);
  }
};

}  // namespace

TEST_CASE("the first steps of AdamW are those computed by hand") {
  Toy<double> toy;
  toy.gate << 1, 2;
  AdamW optimizer(toy, {.lr = 0.1, .beta1 = 0.5, .beta2 = 0.75, .eps = 0.25, .weight_decay = 0.5});
  auto gradients = zeros_like(toy);
  gradients.gate << 2, 0;
  optimizer.step(toy, gradients);
  // m = 1, v = 1, m̂ = 2, v̂ = 4: p = 0.95 · 1 − 0.1 · 2 / (2 + 0.25). The other has no gradient: 0.95 · 2.
  CHECK(toy.gate[0] == Approx(0.95 - 0.2 / 2.25).epsilon(1e-15));
  CHECK(toy.gate[1] == Approx(1.9).epsilon(1e-15));
  const double before = toy.gate[0];
  gradients.gate << -1, 0;
  optimizer.step(toy, gradients);
  // m = 0.5 − 0.5 = 0, v = 0.75 + 0.25 = 1: the decay alone.
  CHECK(toy.gate[0] == Approx(0.95 * before).epsilon(1e-15));
  CHECK(optimizer.steps() == 2);
}

TEMPLATE_TEST_CASE("AdamW follows its formula for many steps", "", float, double) {
  using S = TestType;
  const AdamWOptions options{.lr = 0.02, .beta1 = 0.8, .beta2 = 0.95, .eps = 1e-6, .weight_decay = 0.1};
  Toy<S> toy;
  AdamW optimizer(toy, options);
  Plain first{double(toy.A(0, 1))}, last{double(toy.B(3, 4))}, gate{double(toy.gate[1])};
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    const RankSlice rank = seed % 3 == 0 ? RankSlice{5} : RankSlice{2};
    const auto gradients = toy_gradients(toy, rank, seed);
    optimizer.step(toy, gradients);
    first.step(double(gradients.A(0, 1)), options);
    gate.step(double(gradients.gate[1]), options);
    if (rank.active == 5) last.step(double(gradients.B(3, 4)), options);
  }
  CHECK(double(toy.A(0, 1)) == Approx(first.p).epsilon(8 * rounding<S>));
  CHECK(double(toy.B(3, 4)) == Approx(last.p).epsilon(8 * rounding<S>));
  CHECK(double(toy.gate[1]) == Approx(gate.p).epsilon(8 * rounding<S>));
}

TEST_CASE("a component first drawn at step 100 makes a first step") {
  Toy<double> toy;
  AdamW optimizer(toy, {.lr = 0.01});
  for (std::uint64_t seed = 0; seed < 100; ++seed) optimizer.step(toy, toy_gradients(toy, 4, seed));
  const Toy<double> before = toy;
  optimizer.step(toy, toy_gradients(toy, 5, 100));
  // A first step of Adam is lr · sign(g), whatever the gradient.
  for (Index i = 0; i < 3; ++i) CHECK(std::abs(toy.A(4, i) - before.A(4, i)) == Approx(0.01).epsilon(1e-5));
  for (Index i = 0; i < 4; ++i) CHECK(std::abs(toy.B(i, 4) - before.B(i, 4)) == Approx(0.01).epsilon(1e-5));
  CHECK((toy.A.topRows(4) - before.A.topRows(4)).cwiseAbs().maxCoeff() < 0.0095);
}

TEST_CASE("a dense AdamW counts the steps of all components together") {
  Toy<double> toy;
  AdamW optimizer(toy, {.lr = 0.01, .update = Update::dense});
  for (std::uint64_t seed = 0; seed < 100; ++seed) optimizer.step(toy, toy_gradients(toy, 4, seed));
  const Toy<double> before = toy;
  auto gradients = toy_gradients(toy, 5, 100);
  optimizer.step(toy, gradients);
  // m = 0.1 g and v = 0.001 g² at step 101, hardly corrected any more.
  const double expected = 0.01 * (0.1 / (1 - std::pow(0.9, 101))) / std::sqrt(0.001 / (1 - std::pow(0.999, 101)));
  for (Index i = 0; i < 3; ++i) CHECK(std::abs(toy.A(4, i) - before.A(4, i)) == Approx(expected).epsilon(1e-5));
}

TEST_CASE("the decay of AdamW is decoupled from its gradients") {
  Toy<double> with, without;
  AdamW decaying(with, {.lr = 0.1, .weight_decay = 0.2}), plain(without, {.lr = 0.1});
  const Toy<double> before;
  decaying.step(with, toy_gradients(with, 5, 1));
  plain.step(without, toy_gradients(without, 5, 1));
  const VectorX<double> difference = values<Toy<double>>(without) - values<Toy<double>>(with),
                        expected = 0.02 * values<Toy<double>>(before);
  CHECK(gap(difference, expected) < 1e-13);
}

TEST_CASE("AdamW refuses options out of range and names them") {
  const Toy<double> toy;
  using O = AdamW<Toy<double>>;
  CHECK_THROWS_SAYING(std::invalid_argument, O(toy, {.lr = -1}), "AdamW: lr", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, O(toy, {.lr = std::numeric_limits<double>::infinity()}), "AdamW: lr", "got inf");
  for (const double beta : {-0.1, 1.0, nan<double>}) {
    CHECK_THROWS_SAYING(std::invalid_argument, O(toy, {.beta1 = beta}), "AdamW: beta1", "[0, 1)", "got");
    CHECK_THROWS_SAYING(std::invalid_argument, O(toy, {.beta2 = beta}), "AdamW: beta2", "[0, 1)", "got");
  }
  for (const double eps : {0.0, -1e-8, nan<double>})
    CHECK_THROWS_SAYING(std::invalid_argument, O(toy, {.eps = eps}), "AdamW: eps", "> 0", "got");
  CHECK_THROWS_SAYING(std::invalid_argument, O(toy, {.weight_decay = -0.1}), "AdamW: weight_decay", "got -0.1");
  CHECK_THROWS_SAYING(std::invalid_argument, O(toy, {.max_norm = -1}), "AdamW: max_norm", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, O(toy, {.max_norm = nan<double>}), "AdamW: max_norm", "got");
}

}  // namespace dylora::test
