#include "dylora/train/sgd.hpp"

namespace dylora::test {

template <class T>
using Optimizer = Sgd<T>;

inline SgdOptions stateful_options() { return {.lr = 0.05, .momentum = 0.9, .weight_decay = 0.1}; }

}  // namespace dylora::test

#include "laws/optimizer_laws.hpp"

namespace dylora::test {

TEST_CASE("the first steps of Sgd are those computed by hand") {
  Toy<double> toy;
  toy.gate << 1, 2;
  Sgd optimizer(toy, {.lr = 0.5, .momentum = 0.5, .weight_decay = 0.25});
  auto gradients = zeros_like(toy);
  gradients.gate << 2, 0;
  optimizer.step(toy, gradients);
  CHECK(toy.gate[0] == 0.875 * 1 - 0.5 * 2);  // u = 2
  CHECK(toy.gate[1] == 0.875 * 2);
  gradients.gate << 1, -4;
  optimizer.step(toy, gradients);
  CHECK(toy.gate[0] == 0.875 * -0.125 - 0.5 * 2);  // u = 0.5 · 2 + 1
  CHECK(toy.gate[1] == 0.875 * 1.75 + 0.5 * 4);
  CHECK(optimizer.steps() == 2);
}

TEMPLATE_TEST_CASE("without momentum and decay Sgd subtracts the scaled gradient", "", float, double) {
  using S = TestType;
  Toy<S> toy;
  Sgd optimizer(toy, {.lr = 0.25});
  const auto gradients = toy_gradients(toy, {4, 2}, 1);
  const VectorX<S> expected = values<Toy<S>>(toy) - S(0.25) * values<Toy<S>>(gradients);
  optimizer.step(toy, gradients);
  CHECK(same_bits(values<Toy<S>>(toy), expected));
}

TEST_CASE("Sgd refuses options out of range and names them") {
  const Toy<double> toy;
  using O = Sgd<Toy<double>>;
  CHECK_THROWS_SAYING(std::invalid_argument, O(toy, {.lr = -1}), "Sgd: lr", "got -1");
  for (const double mu : {-0.1, 1.0, nan<double>})
    CHECK_THROWS_SAYING(std::invalid_argument, O(toy, {.momentum = mu}), "Sgd: momentum", "[0, 1)", "got");
  CHECK_THROWS_SAYING(std::invalid_argument, O(toy, {.weight_decay = -0.1}), "Sgd: weight_decay", "got -0.1");
  CHECK_THROWS_SAYING(std::invalid_argument, O(toy, {.max_norm = -1}), "Sgd: max_norm", "got -1");
}

}  // namespace dylora::test
