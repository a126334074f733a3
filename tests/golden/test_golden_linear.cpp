#include "golden/golden.hpp"

using namespace dylora;

TEMPLATE_TEST_CASE("Linear computes what PyTorch does at every rank, nested and frozen", "[golden]", float, double) {
  using S = TestType;
  const golden::File file("linear.txt");
  const auto x = file.matrix<S>("x"), dy = file.matrix<S>("dy");
  for (const auto& [name, rule] : golden::scale_rules()) {
    const Linear<S> layer({file.matrix<S>("weight"), file.matrix<S>("bias")},
                          {file.matrix<S>("lora_A"), file.matrix<S>("lora_B"), {.alpha = file.number("alpha"), .scale = rule}});
    golden::check_at_every_rank(layer, file, name, dy, x);
  }
}
