#ifndef DYLORA_IO_PEFT_WRITER_HPP
#define DYLORA_IO_PEFT_WRITER_HPP

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/adapter_file.hpp"
#include "dylora/io/bytes/atomic_file.hpp"
#include "dylora/io/bytes/checksum.hpp"
#include "dylora/io/bytes/json.hpp"
#include "dylora/io/bytes/tensor.hpp"
#include "dylora/io/load_report.hpp"
#include "dylora/io/peft/config.hpp"
#include "dylora/io/peft/kinds.hpp"
#include "dylora/io/peft/pattern.hpp"
#include "dylora/io/peft/scale.hpp"
#include "dylora/io/peft/tensors.hpp"
#include "dylora/io/safetensors/safetensors.hpp"

namespace dylora::detail {

/// One module as its files will have it.
struct PeftModule {
  AdapterScale adapter;
  bool dora = false;
  std::vector<OwnedTensor> tensors = {};  // none at rank 0
};

/// `baked`: B takes the scale along. Throws NonFiniteError for what is not finite.
template <std::floating_point S>
PeftModule peft_module(const std::string& path, const PeftShape& shape, PeftAdapter<S> values, bool baked) {
  auto& [A, B, scale] = values.factors;
  const Index rank = A.rows();
  if (rank == 0) return {{path}};
  if (baked) B *= static_cast<S>(std::exchange(scale, 1));
  const std::string subject = "save_peft: module " + in_quotes(path);
  if (!A.allFinite() || !B.allFinite()) throw NonFiniteError(subject + ": expected finite factors, got others");
  if (!values.magnitude.allFinite()) throw NonFiniteError(subject + ": expected a finite magnitude, got another");
  PeftModule module{{path, rank, lora_alpha_giving(scale, rank), scale},
                    shape.dora,
                    {{peft_tensor_name(path, 'A', shape.kind), shape.A(rank), std::move(A)},
                     {peft_tensor_name(path, 'B', shape.kind), shape.B(rank), RowMatrix<S>(B)}}};
  if (shape.dora) module.tensors.push_back({peft_magnitude_name(path), {shape.out}, RowMatrix<S>(values.magnitude)});
  return module;
}

/// The value that most modules have, the smallest of those if there are several, and the other modules' own by their paths. Throws
/// std::invalid_argument for a path that is too long for a pattern.
template <class Value, class Pattern>
Value most_common(const std::vector<PeftModule>& modules, Value AdapterScale::*value, Pattern& others) {
  std::map<Value, Index> counts;
  for (const PeftModule& module : modules) ++counts[module.adapter.*value];
  const auto most = std::max_element(counts.begin(), counts.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  for (const PeftModule& module : modules) {
    if (module.adapter.*value == most->first) continue;
    others.emplace_back(PeftPattern::exactly(module.adapter.name), module.adapter.*value);
    if (const std::size_t size = others.back().first.size(); size > PeftPattern::longest_key)
      throw std::invalid_argument("save_peft: module " + in_quotes(module.adapter.name) +
                                  ": expected a path that gives a pattern of at most " + std::to_string(PeftPattern::longest_key) +
                                  " bytes, got one of " + std::to_string(size));
  }
  return most->first;
}

/// Fills in what follows from the modules, of which there must be one. Throws std::invalid_argument for DoRA in some of them only.
inline void describe_modules(const std::vector<PeftModule>& modules, PeftConfig& config) {
  config.use_dora = modules.front().dora;
  for (const PeftModule& module : modules) {
    if (module.dora != config.use_dora)
      throw std::invalid_argument("save_peft: module " + in_quotes(module.adapter.name) +
                                  ": use_dora: expected DoRA in all modules or in none, as PEFT has it, got a layer " +
                                  (module.dora ? "with a magnitude after one without" : "without a magnitude after one with it"));
    config.target_modules.push_back(module.adapter.name);
  }
  config.r = most_common(modules, &AdapterScale::rank, config.rank_pattern);
  config.lora_alpha = most_common(modules, &AdapterScale::alpha, config.alpha_pattern);
}

/// Puts both files into the folder, which is made if it is not there. `report` is of all modules, those at rank 0 too. Throws
/// std::invalid_argument for more than a reader takes, and FileError; what was there is as it was.
///
/// Both files are complete on the disk before either takes its name, the config first. Should the process stop between the two, the new
/// config lies beside the old weights, which have the checksum of theirs: where the configs differ in what matters, the pair is refused,
/// and where they do not, it is the old adapter. Old weights of another writer have no checksum.
inline void write_peft(const std::filesystem::path& folder, const PeftConfig& config, const std::vector<PeftModule>& modules,
                       const std::vector<AdapterScale>& report) {
  const std::string config_text = peft_config_text(config);
  std::vector<TensorView> tensors;
  for (const PeftModule& module : modules) {
    for (const OwnedTensor& tensor : module.tensors) tensors.push_back(tensor.view());
  }
  nlohmann::json without = nlohmann::json::array();
  for (const AdapterScale& module : report) {
    if (module.rank == 0) without.push_back(module.name);
  }
  std::map<std::string, std::string> metadata;
  metadata["dylora.config"] = hexadecimal(peft_config_checksum(config));
  const std::string without_text = without.dump();
  if (!without.empty()) metadata[rank_0_key] = without_text;
  if (const std::size_t size = std::max(config_text.size(), without_text.size()); size > largest_json_config)
    throw std::invalid_argument("save_peft: expected modules whose names and patterns take at most " + std::to_string(largest_json_config) +
                                " bytes, got " + std::to_string(size));

  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw FileError(folder.string() + ": cannot make the folder: " + error.message());
  const std::filesystem::path weights_path = folder / "adapter_model.safetensors", config_path = folder / "adapter_config.json";
  for (const auto& path : {weights_path, config_path}) {
    if (std::filesystem::is_directory(path, error)) throw FileError(path.string() + ": cannot write: there is a folder of that name");
  }
  AtomicFile weights_file(weights_path);  // first to be opened and last to be committed: whoever has it has the folder
  AtomicFile config_file(config_path);
  write_safetensors(weights_file, std::move(tensors), std::move(metadata));
  config_file.write(config_text);
  weights_file.sync();
  config_file.sync();
  config_file.commit();
  weights_file.commit();
}

}  // namespace dylora::detail

#endif
