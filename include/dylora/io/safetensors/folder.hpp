#ifndef DYLORA_IO_SAFETENSORS_FOLDER_HPP
#define DYLORA_IO_SAFETENSORS_FOLDER_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/io/bytes/json.hpp"
#include "dylora/io/bytes/mapped_file.hpp"
#include "dylora/io/bytes/tensor.hpp"
#include "dylora/io/safetensors/safetensors.hpp"

namespace dylora {

/// The name of the file that holds each tensor, from the text of a model.safetensors.index.json. A file name there is a name in the same
/// folder and nothing else. Throws FormatError beginning with `name`.
inline std::map<std::string, std::string> parse_safetensors_index(std::string_view text, const std::string& name) {
  const nlohmann::json index = parse_json(text, name, largest_json_index);
  const auto found = index.find("weight_map");
  if (found == index.end() || !found->is_object() || found->empty()) {
    throw FormatError(name + ": expected an object with a weight_map that is not empty, got none");
  }
  std::map<std::string, std::string> files;
  for (const auto& [tensor, value] : found->items()) {
    const std::string file = value.is_string() ? value.get<std::string>() : std::string();
    const bool plain = std::all_of(file.begin(), file.end(), [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
    });
    if (!plain || file.empty() || file.front() == '.') {
      throw FormatError(name + ": weight_map: tensor " + in_quotes(tensor) + ": expected the name of a file beside this one, got " +
                        (value.is_string() ? in_quotes(file) : value.type_name()));
    }
    files[tensor] = file;
  }
  return files;
}

/// The tensors of a model, mapped from the folder in which it was downloaded: model.safetensors, or the shards that
/// model.safetensors.index.json names.
///
///     const SafetensorsFolder model("gpt2");
///     const TensorView* embedding = model.find("wte.weight");
class SafetensorsFolder {
 public:
  /// Throws FileError for a file that cannot be read and FormatError for one that is malformed, for an index that names more than 1000
  /// shards or a tensor which its shard does not hold, and for a tensor that is in two shards or in a shard but not in the index.
  explicit SafetensorsFolder(const std::filesystem::path& folder) : name_(folder.string()) {
    const std::filesystem::path single = folder / "model.safetensors", index = folder / "model.safetensors.index.json";
    if (may_exist(single)) {
      add(single);
      return;
    }
    if (!may_exist(index)) {
      throw FileError(name_ + ": cannot read: expected model.safetensors or model.safetensors.index.json in this folder, found neither");
    }
    const MappedFile text(index);
    const auto shards = parse_safetensors_index(text.text(), text.name());
    std::map<std::string, std::size_t> opened;  // their places in files_
    for (const auto& [tensor, file] : shards) opened.emplace(file, 0);
    if (opened.size() > most_shards) {
      throw FormatError(text.name() + ": expected at most 1000 shards, got " + std::to_string(opened.size()));
    }
    for (auto& [file, place] : opened) {
      place = files_.size();
      add(folder / file);
    }
    for (const auto& [tensor, place] : places_) {
      const auto found = shards.find(tensor);
      if (found == shards.end()) throw FormatError(file_of(place) + ": tensor " + in_quotes(tensor) + ": expected in the index, got none");
    }
    for (const auto& [tensor, file] : shards) {
      const auto found = places_.find(tensor);
      if (found == places_.end() || found->second.first != opened.at(file)) {
        throw FormatError(text.name() + ": weight_map: tensor " + in_quotes(tensor) + ": expected in " + file + ", which does not hold it");
      }
    }
  }

  /// The path of the folder, as messages begin with it.
  const std::string& name() const { return name_; }
  const std::vector<SafetensorsFile>& files() const { return files_; }

  /// The tensor of that name, or null.
  const TensorView* find(std::string_view tensor) const {
    const auto found = places_.find(tensor);
    return found == places_.end() ? nullptr : &files_[found->second.first].tensors()[found->second.second];
  }

  /// The bytes of all tensors.
  std::uintmax_t bytes() const {
    std::uintmax_t sum = 0;
    for (const SafetensorsFile& file : files_) {
      for (const TensorView& tensor : file.tensors()) sum += tensor.bytes.size();
    }
    return sum;
  }

 private:
  using Place = std::pair<std::size_t, std::size_t>;  // file, tensor
  static constexpr std::size_t most_shards = 1000;

  /// Whether to open it, if only to learn why it cannot be read.
  static bool may_exist(const std::filesystem::path& path) {
    std::error_code error;
    return std::filesystem::status(path, error).type() != std::filesystem::file_type::not_found;
  }

  void add(const std::filesystem::path& path) {
    files_.emplace_back(path);
    const std::vector<TensorView>& tensors = files_.back().tensors();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const auto [place, is_new] = places_.emplace(tensors[i].name, Place(files_.size() - 1, i));
      if (!is_new) {
        throw FormatError(files_.back().name() + ": tensor " + in_quotes(tensors[i].name) + ": expected once in the model, got it in " +
                          file_of(place->second) + " too");
      }
    }
  }

  const std::string& file_of(Place place) const { return files_[place.first].name(); }

  std::string name_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, Place, std::less<>> places_;
};

}  // namespace dylora

#endif
