#ifndef DYLORA_EXAMPLES_INSPECT_CONTENTS_HPP
#define DYLORA_EXAMPLES_INSPECT_CONTENTS_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "dylora/adapters/factors.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/bytes/mapped_file.hpp"
#include "dylora/io/checkpoint/file.hpp"
#include "dylora/io/gguf/adapter_reader.hpp"
#include "dylora/io/gguf/gguf.hpp"
#include "dylora/io/safetensors/folder.hpp"
#include "dylora/io/safetensors/safetensors.hpp"
#include "dylora/ranks/scale.hpp"
#include "inspect/peft_adapter.hpp"
#include "inspect/spectrum.hpp"

/// What a file or folder holds, read by the library's own readers: what they refuse is refused here.
namespace inspect {

struct Entry {
  std::string key, value;

  bool operator==(const Entry&) const = default;
};

struct Tensor {
  std::string name;
  std::string_view type;
  std::vector<Index> shape;
  std::size_t bytes;
};

/// One low-rank pair.
struct Module {
  std::string name;
  Index in_features, out_features, rank;
  double scale;
  std::string scale_source;  ///< what the scale was made of
  Spectrum spectrum;
};

struct Contents {
  std::string kind;
  std::optional<Index> step = {};  ///< of a checkpoint
  std::vector<Entry> metadata = {};
  std::vector<Tensor> tensors = {};
  std::vector<Module> modules = {};
  std::vector<std::string> notes = {};
};

/// Throws FormatError, beginning with `file`, for factors without features and for those whose product has no finite norm.
inline Module make_module(std::string name, const dylora::LowRankFactors<double>& factors, std::string scale_source, dylora::ScaleRule rule,
                          const std::string& file) {
  const auto fail = [&](const char* what) { throw dylora::FormatError(file + ": module " + dylora::in_quotes(name) + ": " + what); };
  const Index in = factors.A.cols(), out = factors.B.rows(), rank = factors.A.rows();
  if (in == 0 || out == 0) fail("expected a layer with features, got one without");
  Spectrum spectrum = spectrum_of(factors, rule);
  const auto finite = [](const std::vector<double>& values) {
    return std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); });
  };
  if (!finite(spectrum.given) || !finite(spectrum.best)) fail("expected factors whose product has a finite norm, got larger ones");
  return {std::move(name), in, out, rank, factors.scale, std::move(scale_source), std::move(spectrum)};
}

inline void add_safetensors(const dylora::SafetensorsContents& file, Contents& contents) {
  for (const auto& [key, value] : file.metadata) {
    const Entry entry{key, value};  // which shards repeat
    if (std::find(contents.metadata.begin(), contents.metadata.end(), entry) == contents.metadata.end()) contents.metadata.push_back(entry);
  }
  for (const auto& tensor : file.tensors)
    contents.tensors.push_back({tensor.name, info(tensor.dtype).name, tensor.shape, tensor.bytes.size()});
}

/// A model's weights, the factors of an adapter without its config, or a checkpoint of this library.
inline Contents read_safetensors(const dylora::MappedFile& file, dylora::ScaleRule rule) {
  using namespace dylora;
  Contents contents{.kind = "safetensors file"};
  const SafetensorsContents read = parse_safetensors(file.bytes(), file.name());
  add_safetensors(read, contents);
  const auto program = read.metadata.find("dylora");
  if (program != read.metadata.end() && program->second.starts_with("checkpoint")) {
    contents.step = checkpoint_step(file.bytes(), file.name());
    contents.kind = "checkpoint of a training run";
    return contents;
  }
  for (const auto& [module, pair] : sort_peft_tensors(read.tensors, file.name()).modules) {
    const std::string subject = file.name() + ": module " + in_quotes(module) + ": ";
    const auto fail = [&](const std::string& what) { throw FormatError(subject + what); };
    if (pair.A == nullptr || pair.B == nullptr) fail("expected a lora_A and a lora_B, got one of them");
    if (pair.magnitude != nullptr) fail("expected the factors of a plain LoRA, got a magnitude of DoRA, which is not supported");
    if (pair.A->shape[0] != pair.B->shape[1]) {
      fail("expected factors of one rank, got A as " + describe_shape(pair.A->shape) + " and B as " + describe_shape(pair.B->shape));
    }
    if (!all_finite(*pair.A) || !all_finite(*pair.B)) fail("expected finite values, got a NaN or an infinity");
    const LowRankFactors<double> factors{matrix_of<double>(*pair.A, file.name()), matrix_of<double>(*pair.B, file.name()), 1};
    contents.modules.push_back(make_module(module, factors, "unknown", rule, file.name()));
  }
  if (!contents.modules.empty()) {
    contents.kind = "safetensors file with the factors of an adapter";
    contents.notes.push_back("the scale is in adapter_config.json, and not in this file: shown as if it were 1; give the folder with both");
  }
  return contents;
}

/// A downloaded model.
inline Contents read_model_folder(const std::filesystem::path& path) {
  const dylora::SafetensorsFolder folder(path);
  Contents contents{.kind = "model in " + std::to_string(folder.files().size()) + " safetensors file" +
                            (folder.files().size() == 1 ? "" : "s")};
  for (const dylora::SafetensorsFile& file : folder.files()) add_safetensors({file.metadata(), file.tensors(), {}}, contents);
  return contents;
}

inline Contents read_peft_folder(const std::filesystem::path& path, dylora::ScaleRule rule) {
  PeftAdapter adapter(path);
  const dylora::PeftConfig& config = adapter.config();
  Contents contents{.kind = "PEFT adapter"};
  add_safetensors({adapter.weights().metadata(), adapter.weights().tensors(), {}}, contents);
  contents.metadata.insert(contents.metadata.end(), {{"adapter_config.json: r", std::to_string(config.r)},
                                                     {"adapter_config.json: lora_alpha", number(config.lora_alpha)},
                                                     {"adapter_config.json: use_rslora", config.use_rslora ? "true" : "false"},
                                                     {"adapter_config.json: fan_in_fan_out", config.fan_in_fan_out ? "true" : "false"},
                                                     {"adapter_config.json: base_model_name_or_path", config.base_model_name_or_path},
                                                     {"adapter_config.json: task_type", config.task_type}});
  for (const auto& [name, shape] : adapter.modules()) {
    const auto taken = adapter.take(name);
    contents.modules.push_back(make_module(name, taken.factors, adapter.scale_source(taken), rule, adapter.weights().name()));
  }
  contents.notes = adapter.notes();
  return contents;
}

/// A value of a GGUF file's metadata, an array as no more than its type and length.
inline std::string gguf_text(const dylora::GgufValue& value) {
  return std::visit(
      [](const auto& v) -> std::string {
        using T = std::remove_cvref_t<decltype(v)>;
        if constexpr (std::is_same_v<T, std::string>) {
          return v;
        } else if constexpr (std::is_same_v<T, bool>) {
          return v ? "true" : "false";
        } else if constexpr (std::is_floating_point_v<T>) {
          return number(static_cast<double>(v));
        } else if constexpr (std::is_arithmetic_v<T>) {
          return std::to_string(v);
        } else {
          return std::visit(
              [](const auto& array) -> std::string {
                if constexpr (std::is_same_v<std::remove_cvref_t<decltype(array)>, std::monostate>)
                  return "an array of arrays";
                else
                  return "an array of " + std::to_string(array.size());
              },
              v);
        }
      },
      value);
}

/// A model, or an adapter as llama.cpp has them.
inline Contents read_gguf(const dylora::MappedFile& file, dylora::ScaleRule rule) {
  using namespace dylora;
  Contents contents{.kind = "GGUF file"};
  const GgufContents read = parse_gguf(file.bytes(), file.name());
  for (const auto& [key, value] : read.metadata) contents.metadata.push_back({key, gguf_text(value)});
  for (const auto& tensor : read.tensors) contents.tensors.push_back({tensor.name, tensor.type->name, tensor.shape, tensor.bytes.size()});

  constexpr std::string_view a = ".weight.lora_a", b = ".weight.lora_b";
  const bool adapter = std::any_of(read.tensors.begin(), read.tensors.end(), [&](const GgufTensor& tensor) {
    return std::string_view(tensor.name).ends_with(a) || std::string_view(tensor.name).ends_with(b);
  });
  if (!adapter) return contents;
  contents.kind = "GGUF adapter";
  const auto* architecture = read.find_as<std::string>("general.architecture");
  GgufAdapter factors(read, file.name(), {.architecture = architecture == nullptr ? "" : *architecture});
  const auto extent = [](const GgufTensor* tensor, std::size_t from_behind) -> Index {  // ggml leaves out leading extents of 1
    if (tensor == nullptr) return 1;
    return tensor->shape.size() < from_behind ? 1 : tensor->shape[tensor->shape.size() - from_behind];
  };
  for (const GgufTensor& tensor : read.tensors) {
    const std::string_view name = tensor.name;
    if (!name.ends_with(a) && !name.ends_with(b)) continue;
    const std::string module(name.substr(0, name.size() - a.size()));
    const Index in = extent(read.find_tensor(module + std::string(a)), 1), out = extent(read.find_tensor(module + std::string(b)), 2);
    const auto taken = factors.take<double>(module, in, out);
    if (!taken) continue;  // with its other half
    const double alpha = static_cast<double>(factors.alpha());
    const std::string source =
        alpha == 0 ? "no adapter.lora.alpha" : "adapter.lora.alpha " + number(alpha) + " / rank " + std::to_string(taken->A.rows());
    contents.modules.push_back(make_module(module, *taken, source, rule, file.name()));
  }
  contents.notes = factors.notes();
  return contents;
}

/// Throws FileError or FormatError, beginning with the path, for what none of the readers takes.
inline Contents read_contents(const std::filesystem::path& path, dylora::ScaleRule rule) {
  if (std::filesystem::is_directory(path)) {
    const bool model =
        std::filesystem::exists(path / "model.safetensors") || std::filesystem::exists(path / "model.safetensors.index.json");
    return model ? read_model_folder(path) : read_peft_folder(path, rule);
  }
  const dylora::MappedFile file(path);
  const std::string_view text = file.text();
  return text.starts_with("GGUF") ? read_gguf(file, rule) : read_safetensors(file, rule);
}

}  // namespace inspect

#endif
