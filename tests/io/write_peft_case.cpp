#include <algorithm>
#include <array>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/adapters/adapter.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/bytes/atomic_file.hpp"
#include "dylora/io/peft/peft.hpp"
#include "dylora/io/safetensors/safetensors.hpp"
#include "io/peft_kinds_model.hpp"
#include "io/peft_model.hpp"

/// Writes adapters into the folder that the command line names, and beside each what it has to compute, for read_peft.py to check:
///
///     write_peft_case FOLDER
///     FOLDER/<case>/adapter_config.json, adapter_model.safetensors      as save_peft writes them
///     FOLDER/<case>/expected.safetensors                                "<module>.base" and "<module>.merged", for each layer
///     FOLDER/patterns.json                                              [[key, path, whether PeftPattern matches], …]
namespace dylora::test {

namespace {

/// Each layer's base weight and what it is merged with its adapter at the rank that is its turn.
template <class S>
void save_expected(const std::filesystem::path& path, const PeftModel<S>& model, const std::vector<Index>& ranks) {
  std::vector<std::pair<std::string, RowMatrix<S>>> matrices;
  std::size_t i = 0;
  for_each_layer(model, [&](std::string_view name, const auto& layer) {
    const bool adapted = PortableAdapter<std::remove_cvref_t<decltype(layer.adapter)>>;
    const std::string module = "transformer." + std::string(name);
    matrices.emplace_back(module + ".base", layer.base.dense());
    matrices.emplace_back(module + ".merged", layer.merged(slice(adapted ? std::min(ranks.at(i++), layer.max_rank()) : 0)).dense());
  });
  std::vector<TensorView> views;
  for (const auto& [name, matrix] : matrices) views.push_back(tensor_view(name, matrix));
  save_safetensors(path, views);
}

template <class S>
void write_cases(const std::filesystem::path& folder, const std::string& scalar) {
  const std::vector<std::pair<std::string, ScaleRule>> rules{
      {"alpha_over_rank", alpha_over_rank}, {"alpha_over_sqrt_rank", alpha_over_sqrt_rank}, {"alpha_over_max_rank", alpha_over_max_rank}};
  std::vector<std::pair<std::string, std::vector<Index>>> cases{{"mixed", {1, 0, 3, 4, 5, 0, 2}}, {"first", {2, 0, 0, 0, 0, 0, 0}}};
  const PeftModel<S> any;
  for (Index rank = 1; rank <= peft_rank; ++rank) {
    std::vector<Index> ranks;
    for_each_portable_adapter(any, [&](const auto& adapter) { ranks.push_back(std::min(rank, adapter.max_rank())); });
    cases.emplace_back("rank_" + std::to_string(rank), ranks);
  }
  for (const auto& [rule_name, rule] : rules) {
    const PeftModel<S> model({.max_rank = peft_rank, .alpha = 3.7, .scale = rule});
    for (const auto& [case_name, ranks] : cases) {
      for (const bool baked : {false, true}) {
        const auto inner = folder / (scalar + "_" + rule_name + "_" + case_name + (baked ? "_baked" : ""));
        save_peft(inner, model, ranks, {.prefix = "transformer", .baked = baked, .base_model_name_or_path = "test"});
        save_expected(inner / "expected.safetensors", model, ranks);
      }
    }
  }
}

/// Of a part by itself: its frozen weight, and what it is merged at a rank.
template <class Part>
std::pair<MatrixX<typename Part::Scalar>, MatrixX<typename Part::Scalar>> base_and_merged(const Part& part, RankSlice rank) {
  if constexpr (EmbeddingLayer<Part>) {
    return {part.base, part.merged(rank)};
  } else if constexpr (ConvolutionModule<Part>) {
    return {part.weight().dense(), part.merged(rank).weight().dense()};
  } else {
    return {part.base.dense(), part.merged(rank).dense()};
  }
}

/// A model of other modules than linear layers at every rank.
template <class Model>
void write_kinds(const std::filesystem::path& folder, const std::string& name) {
  using S = typename Model::Scalar;
  const Model model({.max_rank = peft_rank, .alpha = 3.7});
  for (Index rank = 1; rank <= peft_rank; ++rank) {
    const auto inner = folder / (name + "_rank_" + std::to_string(rank));
    save_peft(inner, model, rank, {.prefix = "model"});
    std::vector<std::pair<std::string, RowMatrix<S>>> matrices;
    for_each_module(model, [&](std::string_view module, const auto& part) {
      const auto [base, merged] = base_and_merged(part, rank);
      matrices.emplace_back("model." + std::string(module) + ".base", base);
      matrices.emplace_back("model." + std::string(module) + ".merged", merged);
    });
    std::vector<TensorView> views;
    for (const auto& [of, matrix] : matrices) views.push_back(tensor_view(of, matrix));
    save_safetensors(inner / "expected.safetensors", views);
  }
}

void write_patterns(const std::filesystem::path& path) {
  const std::array paths{"fc",
                         "h.0.fc",
                         "h.1.fc",
                         "h.10.fc",
                         "decoder.h.0.fc",
                         "h.0.attn.q_proj",
                         "h.0.attn_q_proj",
                         "h.0xattn",
                         "v_proj",
                         "a",
                         "aab",
                         "a.b",
                         "abab",
                         "x-y",
                         "x.aa",
                         "h.0.fc.x",
                         "",
                         "a.",
                         "a b",
                         "h.é",
                         "h..fc"};
  const std::array keys{"fc",
                        R"(h\.0\.fc)",
                        "h.0.fc",
                        R"(^h\.0\.fc)",
                        R"(^h\.\d+\.fc$)",
                        R"(h\.\d*\.fc)",
                        R"(h\.[0-9]\..*)",
                        R"(h\.[^1]+\.fc)",
                        R"([\w.]+)",
                        "(q|v)_proj",
                        "(?:q|k)_proj|fc",
                        "^v|^a",
                        "a*b?",
                        "(a|b)+",
                        "(ab)*",
                        "(a+)+b",
                        "(a*)*b",
                        "(|a)+",
                        "()",
                        "",
                        ".*",
                        ".+b",
                        "a+?b??",
                        R"(x\-y)",
                        R"([x\-]+y)",
                        R"([a-cx-]+.)",
                        R"(\D\S\W?)",
                        R"(\w\s\w)",
                        "$|a",
                        "a$|b",
                        "(^a|b)+",
                        "a|",
                        "é",
                        "é+",
                        "è",
                        R"(h\..$)",
                        R"(h\.\w)",
                        R"(h\.[^a-z])",
                        "[.]fc",
                        "]|}",
                        R"(\w)",
                        R"(.\..)"};
  nlohmann::json verdicts = nlohmann::json::array();
  for (const char* key : keys) {
    for (const char* module : paths) verdicts.push_back({key, module, PeftPattern(key).matches(module)});
  }
  for (const char* module : paths) {
    const std::string key = PeftPattern::exactly(module);
    for (const char* other : paths) verdicts.push_back({key, other, PeftPattern(key).matches(other)});
  }
  AtomicFile file(path);
  file.write(verdicts.dump());
  file.commit();
}

}  // namespace

}  // namespace dylora::test

int main(int count, char** arguments) try {
  if (count != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", arguments[0]);
    return 2;
  }
  const std::filesystem::path folder = arguments[1];
  std::filesystem::create_directories(folder);
  dylora::test::write_cases<float>(folder, "float");
  dylora::test::write_cases<double>(folder, "double");
  dylora::test::write_kinds<dylora::test::KindsModel<float>>(folder, "float_kinds");
  dylora::test::write_kinds<dylora::test::KindsModel<double>>(folder, "double_kinds");
  dylora::test::write_kinds<dylora::test::DoraModel<float>>(folder, "float_dora");
  dylora::test::write_kinds<dylora::test::DoraModel<double>>(folder, "double_dora");
  dylora::test::write_patterns(folder / "patterns.json");
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
