#include "dylora/methods/multilora.hpp"

#include "golden/golden.hpp"

using namespace dylora;

TEMPLATE_TEST_CASE("MultiLora computes what PyTorch does at every rank, nested and frozen, with either gain", "[golden]", float, double) {
  using S = TestType;
  using L = Linear<S, MultiLora<S>>;
  const golden::File file("multi.txt");
  const auto x = file.matrix<S>("x"), dy = file.matrix<S>("dy");
  for (const std::string kind : {"per_output", "scalar"}) {
    const L layer({file.matrix<S>(kind + "/weight"), file.matrix<S>(kind + "/bias")}, {file.matrix<S>(kind + "/multilora_A"),
                                                                                       file.matrix<S>(kind + "/multilora_B"),
                                                                                       file.matrix<S>(kind + "/multilora_gain"),
                                                                                       {.alpha = file.number("alpha")}});
    golden::check_at_every_rank(layer, file, kind, dy, x);
  }
}
