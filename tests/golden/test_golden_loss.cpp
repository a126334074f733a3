#include "golden/golden.hpp"

using namespace dylora;

TEMPLATE_TEST_CASE("mse computes what PyTorch does", "[golden]", float, double) {
  using S = TestType;
  const golden::File file("losses.txt");
  const auto loss = mse(file.matrix<S>("mse/y"), file.matrix<S>("mse/target"));
  golden::check_number<S>(loss.value, file, "mse/loss");
  golden::check(loss.gradient, file, "mse/gradient");
}

TEMPLATE_TEST_CASE("cross_entropy computes what PyTorch does, samples ignored or not", "[golden]", float, double) {
  using S = TestType;
  const golden::File file("losses.txt");
  for (const std::string name : {"all", "some_ignored", "class_ignored", "many_classes", "large_logits"}) {
    const std::string prefix = "cross_entropy/" + name;
    const auto targets = file.integers(prefix + "/targets");
    const auto ignored = static_cast<Index>(file.number(prefix + "/ignore_index"));
    const auto loss = cross_entropy(file.matrix<S>(prefix + "/logits"), targets, {.ignore_index = ignored});
    golden::check_number<S>(loss.value, file, prefix + "/loss");
    golden::check(loss.gradient, file, prefix + "/gradient");
  }
}
