#include "golden/golden.hpp"

using namespace dylora;

TEMPLATE_TEST_CASE("Linear computes what PyTorch does at every rank, nested and frozen", "[golden]", float, double) {
  using S = TestType;
  const golden::File file("linear.txt");
  const auto x = file.matrix<S>("x"), dy = file.matrix<S>("dy");
  const std::pair<std::string, ScaleRule> rules[] = {
      {"alpha_over_rank", alpha_over_rank}, {"alpha_over_sqrt_rank", alpha_over_sqrt_rank}, {"alpha_over_max_rank", alpha_over_max_rank}};
  for (const auto& [name, rule] : rules) {
    const Linear<S> layer({file.matrix<S>("weight"), file.matrix<S>("bias")},
                          {file.matrix<S>("lora_A"), file.matrix<S>("lora_B"), {.alpha = file.number("alpha"), .scale = rule}});
    typename Linear<S>::Cache cache;
    auto gradients = zeros_like(layer);
    for (Index rank = 1; rank <= layer.max_rank(); ++rank) {
      const std::string at_rank = name + '/' + std::to_string(rank);
      for (const auto& [mode, slice] : {std::pair("/nested/", RankSlice(rank)), std::pair("/frozen/", RankSlice(rank, rank - 1))}) {
        set_zero(layer, gradients);
        golden::check(layer.forward(x, slice, cache), file, at_rank + "/y");
        golden::check(layer.backward(dy, cache, gradients), file, at_rank + "/dx");
        golden::check_gradients(layer, gradients, file, at_rank + mode);
      }
    }
  }
}
