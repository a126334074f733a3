#include "dylora/layers/embedding.hpp"
#include "golden/golden.hpp"

using namespace dylora;

TEMPLATE_TEST_CASE("Embedding computes what PyTorch does at every rank, nested and frozen", "[golden]", float, double) {
  using S = TestType;
  const golden::File file("embedding.txt");
  const auto dy = file.matrix<S>("dy");
  const auto ids = file.integers("ids");
  const std::pair<std::string, ScaleRule> rules[] = {
      {"alpha_over_rank", alpha_over_rank}, {"alpha_over_sqrt_rank", alpha_over_sqrt_rank}, {"alpha_over_max_rank", alpha_over_max_rank}};
  for (const auto& [name, rule] : rules) {
    const Embedding<S> embedding(
        file.matrix<S>("weight").transpose(),
        {file.matrix<S>("lora_embedding_A"), file.matrix<S>("lora_embedding_B"), {.alpha = file.number("alpha"), .scale = rule}});
    typename Embedding<S>::Cache cache;
    auto gradients = zeros_like(embedding);
    for (Index rank = 1; rank <= embedding.max_rank(); ++rank) {
      const std::string at_rank = name + '/' + std::to_string(rank);
      for (const auto& [mode, slice] : {std::pair("/nested/", RankSlice(rank)), std::pair("/frozen/", RankSlice(rank, rank - 1))}) {
        set_zero(embedding, gradients);
        golden::check(embedding.forward(ids, slice, cache), file, at_rank + "/y");
        embedding.backward(dy, cache, gradients);
        golden::check_gradients(embedding, gradients, file, at_rank + mode);
      }
    }
  }
}
