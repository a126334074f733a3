#include "dylora/methods/lora_plus.hpp"

#include <limits>
#include <stdexcept>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/core/parameters.hpp"
#include "dylora/layers/embedding.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/loss.hpp"
#include "dylora/train/sgd.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"
#include "train/named_parameters.hpp"

namespace dylora::test {

namespace {

/// One step of a Linear whose B is 0 on a regression: the changes of A and B.
template <template <class> class Optimizer, class Options>
std::pair<RowMatrix<double>, MatrixX<double>> first_step(Options options) {
  Rng rng(1);
  Linear<double> layer(MatrixX<double>(noise<double>(6, 8, 1)), {.max_rank = 4, .alpha = 8}, rng);
  const RowMatrix<double> A = layer.adapter.A;
  typename Linear<double>::Cache cache;
  auto gradients = zeros_like(layer);
  const auto loss = mse(layer.forward(noise<double>(8, 20, 2), 3, cache), noise<double>(6, 20, 3));
  layer.backward(loss.gradient, cache, gradients);
  Optimizer<Linear<double>> optimizer(layer, options);
  optimizer.step(layer, gradients);
  return {layer.adapter.A - A, layer.adapter.B};
}

}  // namespace

TEST_CASE("oracle of LoRA+: from B = 0 a step of Sgd moves B by ratio times as much and A not at all") {
  const auto [dA, dB] = first_step<Sgd>(SgdOptions{.lr = 0.25});
  const auto [plus_dA, plus_dB] = first_step<Sgd>(SgdOptions{.lr = 0.25, .groups = lora_plus(16)});
  CHECK(dA.isZero(0));
  CHECK(plus_dA.isZero(0));
  CHECK(dB.leftCols(3).cwiseAbs().minCoeff() > 0);
  CHECK(same_bits(plus_dB, MatrixX<double>(16 * dB)));
}

TEST_CASE("oracle of LoRA+: from B = 0 a step of AdamW moves B by ratio times as much and A not at all") {
  const auto [dA, dB] = first_step<AdamW>(AdamWOptions{.lr = 1e-3});
  const auto [plus_dA, plus_dB] = first_step<AdamW>(AdamWOptions{.lr = 1e-3, .groups = lora_plus(16)});
  CHECK(dA.isZero(0));
  CHECK(plus_dA.isZero(0));
  CHECK(dB.leftCols(3).cwiseAbs().minCoeff() > 0);
  CHECK(same_bits(plus_dB, MatrixX<double>(16 * dB)));
}

TEST_CASE("oracle of LoRA+: what is B is said by its factor and not by its name or shape") {
  const ParameterGroups groups = lora_plus(16, 0.5);
  const ParameterGroup faster{.lr_ratio = 16}, embedding{.lr_ratio = 0.5};
  CHECK(groups(Parameter{"lora_B", RankAxis::cols, Factor::B}) == faster);
  CHECK(groups(Parameter{"h.0.attn.c_attn.1.second", RankAxis::cols, Factor::B}) == faster);
  CHECK(groups(Parameter{"wte.lora_embedding_A", RankAxis::rows, Factor::A, true}) == embedding);
  CHECK(groups(Parameter{"wte.lora_embedding_B", RankAxis::cols, Factor::B, true}) == embedding);
  CHECK(groups(Parameter{"lora_A", RankAxis::rows, Factor::A}) == ParameterGroup{});
  for (const std::string_view other : {"h.0.lora_magnitude_vector", "lora_B.gain", "my_lora_B", "lora_B", "lora_embedding_B", "gain", ""})
    CHECK(groups(Parameter{other, RankAxis::cols}) == ParameterGroup{});
}

TEST_CASE("oracle of LoRA+: a ratio of 1 is the optimiser itself bit for bit") {
  const AdamWOptions adamw{.lr = 0.05, .weight_decay = 0.1, .max_norm = 0.5};
  AdamWOptions adamw_plus = adamw;
  adamw_plus.groups = lora_plus(1);
  CHECK(same_bits(values<Named<float>>(stepped<AdamW, float>(adamw, 5)), values<Named<float>>(stepped<AdamW, float>(adamw_plus, 5))));
  const SgdOptions sgd{.lr = 0.05, .momentum = 0.5, .weight_decay = 0.1, .max_norm = 0.5};
  SgdOptions sgd_plus = sgd;
  sgd_plus.groups = lora_plus(1);
  CHECK(same_bits(values<Named<float>>(stepped<Sgd, float>(sgd, 5)), values<Named<float>>(stepped<Sgd, float>(sgd_plus, 5))));
}

TEST_CASE("the factors of layers are told apart by what their parameters are") {
  const ParameterGroups groups = lora_plus(16, 0.5);
  const auto ratios = [&](const auto& layer) {
    std::vector<double> result;
    for_each_parameter([&](Parameter parameter, const auto&) { result.push_back(groups(parameter).lr_ratio); }, layer);
    return result;
  };
  Rng rng(1);
  CHECK(ratios(Linear<double>(MatrixX<double>(noise<double>(6, 8, 1)), {.max_rank = 4}, rng)) == std::vector<double>{1, 16});
  CHECK(ratios(Embedding<double>(noise<double>(6, 8, 1), {.max_rank = 4}, rng)) == std::vector<double>{0.5, 0.5});
}

TEST_CASE("ratios of LoRA+ that are no learning rates are refused") {
  for (const double ratio : {0.0, -1.0, std::numeric_limits<double>::infinity(), nan<double>}) {
    CHECK_THROWS_SAYING(std::invalid_argument, lora_plus(ratio), "lora_plus: ratio", "finite number > 0", "got");
    CHECK_THROWS_SAYING(std::invalid_argument, lora_plus(16, ratio), "lora_plus: embedding_ratio", "finite number > 0", "got");
  }
}

}  // namespace dylora::test
