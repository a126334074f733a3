#include "dylora/methods/multilora.hpp"

#include "golden/golden.hpp"

using namespace dylora;

TEMPLATE_TEST_CASE("MultiLora computes what PyTorch does at every rank, nested and frozen, with either gain", "[golden]", float, double) {
  using S = TestType;
  using L = Linear<S, MultiLora<S>>;
  const golden::File file("multi.txt");
  const auto x = file.matrix<S>("x"), dy = file.matrix<S>("dy");
  for (const std::string kind : {"per_output/", "scalar/"}) {
    const L layer({file.matrix<S>(kind + "weight"), file.matrix<S>(kind + "bias")}, {file.matrix<S>(kind + "multilora_A"),
                                                                                     file.matrix<S>(kind + "multilora_B"),
                                                                                     file.matrix<S>(kind + "multilora_gain"),
                                                                                     {.alpha = file.number("alpha")}});
    typename L::Cache cache;
    auto gradients = zeros_like(layer);
    for (Index rank = 1; rank <= layer.max_rank(); ++rank) {
      const std::string at_rank = kind + std::to_string(rank);
      for (const auto& [mode, slice] : {std::pair("/nested/", RankSlice(rank)), std::pair("/frozen/", RankSlice(rank, rank - 1))}) {
        set_zero(layer, gradients);
        golden::check(layer.forward(x, slice, cache), file, at_rank + "/y");
        golden::check(layer.backward(dy, cache, gradients), file, at_rank + "/dx");
        golden::check_gradients(layer, gradients, file, at_rank + mode);
      }
    }
  }
}
