#include "dylora/layers/embedding.hpp"
#include "golden/golden.hpp"

using namespace dylora;

TEMPLATE_TEST_CASE("Embedding computes what PyTorch does at every rank, nested and frozen", "[golden]", float, double) {
  using S = TestType;
  const golden::File file("embedding.txt");
  const auto dy = file.matrix<S>("dy");
  const auto ids = file.integers("ids");
  for (const auto& [name, rule] : golden::scale_rules()) {
    const Embedding<S> embedding(
        file.matrix<S>("weight").transpose(),
        {file.matrix<S>("lora_embedding_A"), file.matrix<S>("lora_embedding_B"), {.alpha = file.number("alpha"), .scale = rule}});
    golden::check_at_every_rank(embedding, file, name, dy, ids);
  }
}
