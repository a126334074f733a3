#include "dylora/ranks/permute.hpp"

#include <stdexcept>
#include <vector>

#include "dylora/layers/linear.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

Linear<double> layer_of_4() {
  Rng rng(1);
  Linear<double> layer(noise<double>(7, 9, 1), {.max_rank = 4}, rng);
  randomize<Linear<double>>(layer, 2);
  return layer;
}

}  // namespace

TEST_CASE("a permutation and its inverse leave every component where it was, and all parameters go together") {
  Linear<double> layer = layer_of_4();
  const Linear<double> before = layer;
  permute_components(layer, {{2, 0, 3, 1}});
  for (Index i = 0; i < 4; ++i) {
    const Index from = std::vector<Index>{2, 0, 3, 1}[static_cast<std::size_t>(i)];
    CHECK(layer.adapter.A.row(i) == before.adapter.A.row(from));
    CHECK(layer.adapter.B.col(i) == before.adapter.B.col(from));
  }
  permute_components(layer, {{1, 3, 0, 2}});
  CHECK(same_bits(values<Linear<double>>(layer), values<Linear<double>>(before)));
}

TEST_CASE("what is no permutation of each adapter's components is refused and nothing has changed") {
  Linear<double> layer = layer_of_4();
  const VectorX<double> before = values<Linear<double>>(layer);
  const auto permute = [&](std::vector<std::vector<Index>> orders) { permute_components(layer, orders); };
  CHECK_THROWS_SAYING(std::invalid_argument, permute({}), "permute_components", "each of 1 adapters", "got 0");
  for (const std::vector<Index>& wrong : {std::vector<Index>{0, 1, 2}, {0, 1, 2, 2}, {0, 1, 2, 4}, {-1, 0, 1, 2}, {0, 1, 2, 3, 3}})
    CHECK_THROWS_SAYING(std::invalid_argument, permute({wrong}), "permute_components", "each of its 4 components once");
  CHECK(same_bits(values<Linear<double>>(layer), before));
}

}  // namespace dylora::test
