#include "dylora/io/peft/peft.hpp"

#include <Eigen/SVD>
#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "dylora/io/safetensors/safetensors.hpp"
#include "dylora/layers/attention/attention.hpp"
#include "dylora/ranks/order.hpp"
#include "io/peft_model.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

constexpr std::array rules{alpha_over_rank, alpha_over_sqrt_rank, alpha_over_max_rank};
const SavePeftOptions in_transformer{.prefix = "transformer"};
const LoadPeftOptions from_transformer{.prefix = "transformer"};

LowRankOptions options_of(ScaleRule rule) { return {.max_rank = peft_rank, .alpha = peft_alpha, .scale = rule}; }

std::string both_files(const std::filesystem::path& folder) {
  return contents_of(folder / "adapter_config.json") + contents_of(folder / "adapter_model.safetensors");
}

/// The outputs of a model that has just been loaded, each layer with all that it has, against those of the original with a rank for each
/// adapter.
template <class S>
bool computes_the_same(const PeftModel<S>& loaded, const PeftModel<S>& original, const std::vector<Index>& ranks) {
  const MatrixX<S> x = noise<S>(peft_in, 4, 9);
  std::vector<MatrixX<S>> expected;
  std::size_t i = 0;
  for_each_layer(original, [&](std::string_view, const auto& layer) {
    const bool adapted = PortableAdapter<std::remove_cvref_t<decltype(layer.adapter)>>;
    expected.push_back(layer.forward(x, slice(adapted ? std::min(ranks.at(i++), layer.max_rank()) : 0)));
  });
  i = 0;
  bool same = true;
  for_each_layer(loaded, [&](std::string_view, const auto& layer) {
    same = same && equal_bits<S>(layer.forward(x, slice(layer.max_rank())), expected[i++]);
  });
  return same;
}

/// Ranks for the seven adapters of the model.
std::vector<Index> everywhere(Index rank) { return std::vector<Index>(7, rank); }

}  // namespace

TEMPLATE_TEST_CASE("an adapter that was saved at a rank and loaded computes the same bits", "", float, double) {
  using S = TestType;
  const TemporaryFolder folder;
  for (const ScaleRule rule : rules) {
    const PeftModel<S> model(options_of(rule));
    for (Index rank = 1; rank <= peft_rank; ++rank) {
      INFO("rank " << rank);
      const auto saved = save_peft(folder.path(), model, rank, in_transformer);
      PeftModel<S> loaded(options_of(rule), 3);
      REQUIRE_FALSE(computes_the_same(loaded, model, everywhere(peft_rank)));
      const LoadReport report = load_peft(folder.path(), loaded, from_transformer);
      CHECK(computes_the_same(loaded, model, everywhere(rank)));
      CHECK(report.adapters == saved);
      CHECK(report.missing_modules.empty());
      CHECK(report.unmatched_tensors.empty());
      CHECK(report.notes.empty());
    }
  }
}

TEMPLATE_TEST_CASE("adapters that were saved at a rank each and loaded compute the same bits", "", float, double) {
  using S = TestType;
  const TemporaryFolder folder;
  const std::vector<std::vector<Index>> cases{{1, 2, 3, 4, 5, 3, 2}, {0, 5, 0, 5, 0, 0, 1}, {5, 0, 0, 0, 0, 0, 0}, {2, 2, 2, 2, 2, 2, 0}};
  for (const ScaleRule rule : rules) {
    const PeftModel<S> model(options_of(rule));
    for (std::vector<Index> ranks : cases) {
      std::swap(ranks[5], ranks[2]);
      ranks[2] = std::min<Index>(ranks[2], 3);  // the two that have three components
      ranks[5] = std::min<Index>(ranks[5], 3);
      const auto saved = save_peft(folder.path(), model, ranks, in_transformer);
      PeftModel<S> loaded(options_of(rule), 3);
      CHECK(load_peft(folder.path(), loaded, from_transformer).adapters == saved);
      CHECK(computes_the_same(loaded, model, ranks));
      for (std::size_t i = 0; i < ranks.size(); ++i) CHECK((saved[i].rank == 0) == (ranks[i] == 0));
    }
  }
}

TEMPLATE_TEST_CASE("a baked adapter has the scale in B, and no other", "", float, double) {
  using S = TestType;
  const TemporaryFolder folder;
  for (const ScaleRule rule : rules) {
    const PeftModel<S> model(options_of(rule));
    for (Index rank = 1; rank <= peft_rank; ++rank) {
      PeftModel<S> baked = model;
      for_each_portable_adapter(baked, [&](auto& adapter) {
        auto factors = adapter.factors(std::min(rank, adapter.max_rank()));
        factors.B *= static_cast<S>(factors.scale);
        factors.scale = 1;
        adapter.set_factors(factors);
      });
      for (const AdapterScale& saved : save_peft(folder.path(), model, rank, {.prefix = "transformer", .baked = true})) {
        CHECK(saved.scale == 1);
        CHECK(saved.alpha == static_cast<double>(saved.rank));
      }
      PeftModel<S> loaded(options_of(rule), 3);
      load_peft(folder.path(), loaded, from_transformer);
      CHECK(computes_the_same(loaded, baked, everywhere(rank)));
      CHECK(gap(in_double(layer_outputs(loaded, peft_rank)), in_double(layer_outputs(model, rank))) < rounding<S>);
    }
  }
}

TEMPLATE_TEST_CASE("files that were loaded and saved again are the same files", "", float, double) {
  using S = TestType;
  const TemporaryFolder folder;
  for (const ScaleRule rule : rules) {
    for (const bool baked : {false, true}) {
      for (const std::vector<Index>& ranks : {std::vector<Index>{1, 2, 3, 4, 5, 3, 2}, {0, 5, 0, 5, 0, 0, 1}, everywhere(3)}) {
        const SavePeftOptions options{.prefix = "transformer", .baked = baked};
        save_peft(folder / "first", PeftModel<S>(options_of(rule)), ranks, options);
        PeftModel<S> loaded(options_of(rule), 3);
        load_peft(folder / "first", loaded, from_transformer);
        std::vector<Index> all;
        for_each_portable_adapter(loaded, [&](const auto& adapter) { all.push_back(adapter.components()); });
        save_peft(folder / "second", loaded, all, in_transformer);
        CHECK(both_files(folder / "first") == both_files(folder / "second"));
        save_peft(folder / "second", loaded, *std::max_element(all.begin(), all.end()), in_transformer);
        CHECK(both_files(folder / "first") == both_files(folder / "second"));
      }
    }
  }
}

TEST_CASE("the scale that PEFT computes from a file is the adapter's, or a neighbour of it where no lora_alpha gives that") {
  const TemporaryFolder folder;
  Rng rng(5);
  long exact = 0, cases = 0;
  for (const ScaleRule rule : rules) {
    for (int i = 0; i < 20; ++i) {
      const double alpha = i % 2 == 0 ? (1 + i) / 10.0 : 0.1 + 64 * rng.uniform();
      for (const Index rank : {1, 3, 7, 11}) {
        Linear<double> layer(MatrixX<double>(noise<double>(11, 12, 1)), {.max_rank = 11, .alpha = alpha, .scale = rule}, rng);
        const double scale = rule(alpha, rank, 11);
        save_peft(folder.path(), layer, rank, {.prefix = "fc"});
        const PeftConfig config = parse_peft_config(contents_of(folder / "adapter_config.json"), "");
        const double peft = config.lora_alpha / static_cast<double>(config.r);
        CHECK(std::abs(peft - scale) <= 2 * (std::nextafter(scale, HUGE_VAL) - scale));
        if (rule == alpha_over_rank) CHECK(peft == scale);
        if (rule == alpha_over_rank && i % 2 == 0) CHECK(config.lora_alpha == alpha);
        exact += peft == scale;
        ++cases;
        const LoadReport report = load_peft(folder.path(), layer, {.prefix = "fc"});
        CHECK(report.adapters[0].scale == layer.adapter.factors(rank).scale);
        CHECK(std::abs(report.adapters[0].scale - peft) <= 2 * (std::nextafter(peft, HUGE_VAL) - peft));
      }
    }
  }
  CHECK(10 * exact > 9 * cases);
}

TEST_CASE("the names, shapes and types of the tensors are PEFT's") {
  const TemporaryFolder folder;
  save_peft(folder.path(), PeftModel<float>(), 2, in_transformer);
  const SafetensorsFile file(folder / "adapter_model.safetensors");
  std::map<std::string, std::vector<Index>> shapes;
  for (const TensorView& tensor : file.tensors()) {
    shapes[tensor.name] = tensor.shape;
    CHECK(tensor.dtype == DType::F32);
  }
  std::map<std::string, std::vector<Index>> expected;
  for (const auto& [module, rank] : std::map<std::string, Index>{{"h.0.attn.q_proj", 2},
                                                                 {"h.0.attn.c_attn", 4},
                                                                 {"h.0.mlp.c_fc", 2},
                                                                 {"h.1.attn.q_proj", 2},
                                                                 {"h.1.attn.c_attn", 4},
                                                                 {"h.1.mlp.c_fc", 2},
                                                                 {"head", 2}}) {
    expected["base_model.model.transformer." + module + ".lora_A.weight"] = {rank, peft_in};
    expected["base_model.model.transformer." + module + ".lora_B.weight"] = {peft_out, rank};
  }
  CHECK(shapes == expected);
  const auto checksum_of_config = [&] {
    return hexadecimal(peft_config_checksum(parse_peft_config(contents_of(folder / "adapter_config.json"), "")));
  };
  CHECK(file.metadata() == std::map<std::string, std::string>{{"format", "pt"}, {"dylora.config", checksum_of_config()}});

  save_peft(folder.path(), PeftModel<double>(), {1, 0, 1, 0, 1, 1, 1}, in_transformer);
  const SafetensorsFile in_double_file(folder / "adapter_model.safetensors");
  for (const TensorView& tensor : in_double_file.tensors()) CHECK(tensor.dtype == DType::F64);
  CHECK(in_double_file.metadata() ==
        std::map<std::string, std::string>{{"format", "pt"},
                                           {"dylora.config", checksum_of_config()},
                                           {"dylora.rank_0", R"(["transformer.h.0.attn.c_attn","transformer.h.1.attn.q_proj"])"}});
}

TEST_CASE("B is written row by row") {
  const TemporaryFolder folder;
  const Linear<float> layer(MatrixX<float>(MatrixX<float>::Zero(2, 3)),
                            LowRank<float>(RowMatrix<float>{{1, 2, 3}, {4, 5, 6}}, MatrixX<float>{{7, 8}, {9, 10}}, {.alpha = 6}));
  save_peft(folder.path(), layer, 2, {.prefix = "fc"});
  const SafetensorsFile file(folder / "adapter_model.safetensors");
  const auto elements = [&](const char* name) {
    const TensorView* tensor = file.find(name);
    REQUIRE(tensor != nullptr);
    std::vector<float> values(static_cast<std::size_t>(tensor->size()));
    copy_elements(*tensor, values.data(), "");
    return values;
  };
  CHECK(elements("base_model.model.fc.lora_A.weight") == std::vector<float>{1, 2, 3, 4, 5, 6});
  CHECK(elements("base_model.model.fc.lora_B.weight") == std::vector<float>{7, 8, 9, 10});
}

TEST_CASE("the config of an adapter with a rank for each module is this text") {
  const TemporaryFolder folder;
  save_peft(
      folder.path(), PeftModel<float>({.max_rank = 5, .alpha = 16}), {2, 0, 2, 4, 0, 2, 5},
      {.prefix = "transformer.", .fan_in_fan_out = true, .base_model_name_or_path = "openai-community/gpt2", .task_type = "CAUSAL_LM"});
  CHECK(contents_of(folder / "adapter_config.json") == R"({
  "alpha_pattern": {},
  "base_model_name_or_path": "openai-community/gpt2",
  "bias": "none",
  "fan_in_fan_out": true,
  "inference_mode": true,
  "init_lora_weights": true,
  "lora_alpha": 16,
  "lora_dropout": 0.0,
  "modules_to_save": null,
  "peft_type": "LORA",
  "r": 2,
  "rank_pattern": {
    "^transformer\\.h\\.1\\.attn\\.q_proj": 4,
    "^transformer\\.head": 5
  },
  "target_modules": [
    "transformer.h.0.attn.q_proj",
    "transformer.h.0.mlp.c_fc",
    "transformer.h.1.attn.q_proj",
    "transformer.h.1.mlp.c_fc",
    "transformer.head"
  ],
  "task_type": "CAUSAL_LM",
  "use_dora": false,
  "use_rslora": false
}
)");
}

}  // namespace dylora::test
