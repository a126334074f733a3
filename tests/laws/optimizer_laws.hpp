#ifndef DYLORA_TESTS_LAWS_OPTIMIZER_LAWS_HPP
#define DYLORA_TESTS_LAWS_OPTIMIZER_LAWS_HPP

#include <limits>
#include <vector>

#include "dylora/core/parameters.hpp"
#include "dylora/train/optimizer.hpp"
#include "support/catch.hpp"
#include "support/law.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

/// What every optimiser obeys. The including file says before which: a template Optimizer<T>, and stateful_options() with a momentum, a
/// decay and whatever else could leave a trace.
namespace dylora::test {

/// The least that can be trained: two parameters with components and one without.
template <class S>
struct Toy {
  using Scalar = S;
  struct Gradients {
    Gradient<RowMatrix<S>> A;
    Gradient<MatrixX<S>> B;
    VectorX<S> gate;
  };

  RowMatrix<S> A = noise<S>(5, 3, 1);
  MatrixX<S> B = noise<S>(4, 5, 2);
  VectorX<S> gate = noise<S>(2, 1, 3);

  static void members(const auto& f, auto&... t) {
    f(Parameter{"toy_A", RankAxis::rows}, t.A...);
    f(Parameter{"toy_B", RankAxis::cols}, t.B...);
    f(Parameter{"gate"}, t.gate...);
  }
};

/// Gradients as a backward at this slice leaves them.
template <class S>
typename Toy<S>::Gradients toy_gradients(const Toy<S>& toy, RankSlice rank, std::uint64_t seed) {
  auto gradients = zeros_like(toy), random = zeros_like(toy);
  randomize<Toy<S>>(random, seed);
  gradients.A.middleRows(rank.trainable_from, rank.trainable()) = random.A.middleRows(rank.trainable_from, rank.trainable());
  gradients.B.middleCols(rank.trainable_from, rank.trainable()) = random.B.middleCols(rank.trainable_from, rank.trainable());
  gradients.gate = random.gate;
  gradients.A.components.insert(rank);
  gradients.B.components.insert(rank);
  return gradients;
}

/// Rows of A and columns of B in [begin, end), without the gate.
template <class S>
VectorX<S> components(const Toy<S>& toy, Index begin, Index end) {
  return component_values<Toy<S>>(toy, begin, end);
}

TEMPLATE_TEST_CASE("a component's course depends on the steps that trained it and on no other", "[laws]", float, double) {
  using S = TestType;
  LawCount::add_case();
  const auto course = [](std::vector<std::pair<RankSlice, std::uint64_t>> steps) {
    Toy<S> toy;
    Optimizer<Toy<S>> optimizer(toy, stateful_options());
    for (const auto& [rank, seed] : steps) optimizer.step(toy, toy_gradients(toy, rank, seed));
    return toy;
  };
  const Toy<S> fresh, all = course({{2, 1}, {{5, 4}, 2}, {2, 3}, {{4, 3}, 4}, {{5, 4}, 5}});
  const Toy<S> leading = course({{2, 1}, {2, 3}}), last = course({{{5, 4}, 2}, {{5, 4}, 5}}), fourth = course({{{4, 3}, 4}});
  CHECK(same_bits(components(all, 0, 2), components(leading, 0, 2)));
  CHECK(same_bits(components(all, 2, 3), components(fresh, 2, 3)));  // never drawn: no decay either
  CHECK(same_bits(components(all, 3, 4), components(fourth, 3, 4)));
  CHECK(same_bits(components(all, 4, 5), components(last, 4, 5)));
  CHECK_FALSE(same_bits(all.gate, leading.gate));  // what has no components takes every step
  CHECK((components(all, 0, 2).array() != components(fresh, 0, 2).array()).all());
}

TEMPLATE_TEST_CASE("a dense update moves what took no part through its momentum and decay", "[laws]", float, double) {
  using S = TestType;
  LawCount::add_case();
  auto options = stateful_options();
  options.update = Update::dense;
  Toy<S> toy;
  Optimizer<Toy<S>> optimizer(toy, options);
  optimizer.step(toy, toy_gradients(toy, 5, 1));
  const Toy<S> before = toy;
  optimizer.step(toy, toy_gradients(toy, 2, 2));
  CHECK((components(toy, 2, 5).array() != components(before, 2, 5).array()).all());

  // Without a first step at full rank there is only the decay.
  Toy<S> other;
  Optimizer<Toy<S>> decaying(other, options);
  decaying.step(other, toy_gradients(other, 2, 2));
  const VectorX<S> decayed = S(1 - options.lr * options.weight_decay) * components(Toy<S>(), 2, 5);
  CHECK(gap(in_double<S>(components(other, 2, 5)), in_double<S>(decayed)) < rounding<S>);
}

TEMPLATE_TEST_CASE("dense and active updates agree where everything takes part", "[laws]", float, double) {
  using S = TestType;
  LawCount::add_case();
  auto options = stateful_options();
  Toy<S> active, dense;
  Optimizer<Toy<S>> one(active, options);
  options.update = Update::dense;
  Optimizer<Toy<S>> other(dense, options);
  for (std::uint64_t seed = 1; seed < 6; ++seed) {
    one.step(active, toy_gradients(active, 5, seed));
    other.step(dense, toy_gradients(dense, 5, seed));
  }
  CHECK(gap(in_double<S>(values<Toy<S>>(active)), in_double<S>(values<Toy<S>>(dense))) < rounding<S>);
}

TEMPLATE_TEST_CASE("gradients are clipped to their global norm and smaller ones are not", "[laws]", float, double) {
  using S = TestType;
  LawCount::add_case();
  auto options = stateful_options();
  const auto steps_of = [&](double max_norm, auto&& length) {
    Toy<S> toy;
    options.max_norm = max_norm;
    Optimizer<Toy<S>> optimizer(toy, options);
    for (std::uint64_t seed = 1; seed < 4; ++seed) {
      auto gradients = toy_gradients(toy, 3, seed);
      const double factor = length(static_cast<double>(seed)) / norm(toy, gradients);
      for_each_entry<Toy<S>>(gradients, [&](Index, S& g) { g *= static_cast<S>(factor); });
      optimizer.step(toy, gradients);
    }
    return values<Toy<S>>(toy);
  };
  const auto growing = [](double seed) { return 8 * seed; };
  const auto short_enough = [](double) { return 0.5; };
  const VectorX<S> clipped = steps_of(0.5, growing), expected = steps_of(0, short_enough), unclipped = steps_of(0, growing);
  CHECK(gap(in_double<S>(clipped), in_double<S>(expected)) < 1e-6);  // as torch does, the divisor is the norm + 1e-6
  CHECK(gap(in_double<S>(unclipped), in_double<S>(expected)) > 1e-3);
  CHECK(same_bits(steps_of(24.5, growing), unclipped));
}

TEMPLATE_TEST_CASE("a gradient that is no number is refused by name and the step never was", "[laws]", float, double) {
  using S = TestType;
  auto options = stateful_options();
  options.max_norm = 1;
  for (const S bad : {nan<S>, std::numeric_limits<S>::infinity(), -std::numeric_limits<S>::infinity()}) {
    for (const char* name : {"toy_A", "toy_B", "gate"}) {
      LawCount::add_case();
      Toy<S> toy, undisturbed;
      Optimizer<Toy<S>> optimizer(toy, options), other(undisturbed, options);
      for (std::uint64_t seed = 1; seed < 5; ++seed) {
        if (seed == 3) {
          auto gradients = toy_gradients(toy, 4, 9);
          (name[4] == 'A' ? gradients.A(1, 1) : name[4] == 'B' ? gradients.B(1, 1) : gradients.gate(1)) = bad;
          const VectorX<S> before = values<Toy<S>>(toy);
          CHECK_THROWS_SAYING(NonFiniteError, optimizer.step(toy, gradients), "step 2", "gradient of " + std::string(name),
                              "expected finite", "NaN or an infinity", "as they were");
          CHECK(same_bits(values<Toy<S>>(toy), before));
          CHECK(optimizer.steps() == 2);
        }
        optimizer.step(toy, toy_gradients(toy, RankSlice(4), seed));
        other.step(undisturbed, toy_gradients(undisturbed, RankSlice(4), seed));
      }
      CHECK(same_bits(values<Toy<S>>(toy), values<Toy<S>>(undisturbed)));
      CHECK(optimizer.steps() == 4);
    }
  }
}

TEMPLATE_TEST_CASE("a learning rate can be set for every step and 0 stands still", "[laws]", float, double) {
  using S = TestType;
  LawCount::add_case();
  Toy<S> toy;
  Optimizer<Toy<S>> optimizer(toy, stateful_options());
  optimizer.set_learning_rate(0);
  CHECK(optimizer.options().lr == 0);
  optimizer.step(toy, toy_gradients(toy, 5, 1));
  CHECK(same_bits(values<Toy<S>>(toy), values<Toy<S>>(Toy<S>())));
  optimizer.set_learning_rate(0.5);
  optimizer.step(toy, toy_gradients(toy, 5, 1));
  CHECK_FALSE(same_bits(values<Toy<S>>(toy), values<Toy<S>>(Toy<S>())));
  CHECK_THROWS_SAYING(std::invalid_argument, optimizer.set_learning_rate(-1), "lr", "finite number ≥ 0", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, optimizer.set_learning_rate(nan<double>), "lr", "got");
  CHECK(optimizer.options().lr == 0.5);
}

TEMPLATE_TEST_CASE("gradients and moments of another shape are refused by name and nothing moves", "[laws]", float, double) {
  using S = TestType;
  LawCount::add_case();
  Toy<S> toy;
  Optimizer<Toy<S>> optimizer(toy);
  const VectorX<S> before = values<Toy<S>>(toy);
  CHECK_THROWS_SAYING(ShapeError, optimizer.step(toy, {}), "gradient of toy_A", "expected 5 × 3 with 5", "got 0 × 0 with 0");

  // The last of them is wrong: those before it must not have moved.
  auto gradients = toy_gradients(toy, 5, 1);
  gradients.gate.setOnes(gradients.gate.size() + 1);
  CHECK_THROWS_SAYING(ShapeError, optimizer.step(toy, gradients), "gradient of gate");
  // Nowhere to note which components were trained: an active_only step would train nothing.
  gradients = toy_gradients(toy, 5, 1);
  gradients.B.components = ComponentSet();
  CHECK_THROWS_SAYING(ShapeError, optimizer.step(toy, gradients), "gradient of toy_B", "with 0 rank components");
  CHECK(same_bits(values<Toy<S>>(toy), before));
  CHECK(optimizer.steps() == 0);

  Toy<S> wider = toy;
  wider.B.setOnes(wider.B.rows() + 1, wider.B.cols());
  CHECK_THROWS_SAYING(ShapeError, optimizer.step(wider, zeros_like(wider)), "moments of toy_B");
  CHECK(wider.B.isOnes(0));
}

}  // namespace dylora::test

#endif
