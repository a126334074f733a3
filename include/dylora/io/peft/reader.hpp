#ifndef DYLORA_IO_PEFT_READER_HPP
#define DYLORA_IO_PEFT_READER_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "dylora/adapters/factors.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/adapter_file.hpp"
#include "dylora/io/bytes/checksum.hpp"
#include "dylora/io/bytes/json.hpp"
#include "dylora/io/bytes/mapped_file.hpp"
#include "dylora/io/bytes/tensor.hpp"
#include "dylora/io/peft/config.hpp"
#include "dylora/io/peft/kinds.hpp"
#include "dylora/io/peft/pattern.hpp"
#include "dylora/io/peft/scale.hpp"
#include "dylora/io/peft/tensors.hpp"
#include "dylora/io/safetensors/safetensors.hpp"

namespace dylora {

namespace detail {

/// A rank_pattern or an alpha_pattern, ready to be asked.
template <class Value>
class PeftPatterns {
 public:
  PeftPatterns(const std::vector<std::pair<std::string, Value>>& pattern, std::string what) : what_(std::move(what)) {
    for (const auto& [key, value] : pattern) entries_.push_back({key, PeftPattern(key), value});
  }

  /// The value of the first key that matches. Throws FormatError if one before it cannot be asked.
  Value find(const std::string& module, Value otherwise) const {
    for (const auto& [key, pattern, value] : entries_) {
      if (key == module) return value;
      if (!pattern.unsupported().empty())
        throw FormatError(what_ + ": key " + in_quotes(key) + ": expected a simple regular expression, got one with " +
                          pattern.unsupported() + "; whether it is for module " + in_quotes(module) + " cannot be said");
      if (pattern.matches(module)) return value;
    }
    return otherwise;
  }

 private:
  struct Entry {
    std::string key;
    PeftPattern pattern;
    Value value;
  };
  std::string what_;
  std::vector<Entry> entries_;
};

}  // namespace detail

/// The folder of an adapter, read without a model: its two files, checked but for what only the model can say. Keeps the weights mapped;
/// each module's factors are read when they are taken.
///
///     PeftFolder file("adapter");
///     const auto found = file.take<float>("h.0.attn.c_attn", 768, 2304);  // found->factors: Δ = scale · B · A
class PeftFolder {
 public:
  /// Throws FileError or FormatError.
  explicit PeftFolder(const std::filesystem::path& folder)
      : config_(read_config(folder)),
        weights_(find_weights(folder)),
        tensors_(sort_peft_tensors(weights_.tensors(), weights_.name())),
        ranks_(config_.rank_pattern, (folder / config_name).string() + ": rank_pattern"),
        alphas_(config_.alpha_pattern, (folder / config_name).string() + ": alpha_pattern"),
        notes_(config_.notes) {
    if (!tensors_.adapter.empty()) note("the names of its tensors have the adapter's name in them: " + in_quotes(tensors_.adapter));
    require_one_save();
    read_rank_0();
  }

  /// The path of the weights, as messages begin with it.
  const std::string& name() const { return weights_.name(); }
  const PeftConfig& config() const { return config_; }
  const SafetensorsFile& weights() const { return weights_; }
  const PeftTensors& tensors() const { return tensors_; }

  /// The same for a linear layer.
  template <std::floating_point S>
  std::optional<PeftAdapter<S>> take(const std::string& module, Index in, Index out) {
    return take<S>(module, PeftShape{.channels = in, .out = out});
  }

  /// The module's adapter, at rank 0 if the file says that it has none; or nothing, if it does not say.
  /// Throws FormatError if it does not fit the shape, the config or S.
  template <std::floating_point S>
  std::optional<PeftAdapter<S>> take(const std::string& module, const PeftShape& shape) {
    if (rank_0_.contains(module)) {
      taken_.insert(module);
      return PeftAdapter<S>{{{RowMatrix<S>(0, shape.in()), MatrixX<S>(shape.out, 0), 1}}};
    }
    const auto found = tensors_.modules.find(module);
    if (found == tensors_.modules.end()) return std::nullopt;
    taken_.insert(module);
    const std::string subject = "module " + in_quotes(module) + ": ";
    const Index rank = ranks_.find(module, config_.r);
    require_kind(subject, found->second, shape, rank);
    const auto& [A, B, magnitude, kind] = found->second;
    const double alpha = alphas_.find(module, config_.lora_alpha);
    const bool linear = kind == PeftKind::linear;
    const std::string from_config = ", the rank from adapter_config.json";
    RowMatrix<S> rows_of_A = matrix<S>(*A, shape.A(rank), (linear ? "rank × in_features" : "A of " + described(kind)) + from_config);
    MatrixX<S> rows_of_B = matrix<S>(*B, shape.B(rank), (linear ? "out_features × rank" : "B of " + described(kind)) + from_config);
    PeftAdapter<S> result{{{std::move(rows_of_A), std::move(rows_of_B), 1}, alpha}};
    require_groups_apart(*A, result.factors.A, shape);
    if (shape.dora) result.magnitude = matrix<S>(*magnitude, {shape.out}, "out_features");
    result.factors.scale = detail::peft_scale(std::abs(alpha), rank, config_.use_rslora);
    const S scale = static_cast<S>(result.factors.scale);
    if (!(scale > 0) || !std::isfinite(scale))
      fail(subject + "expected a scale that its type of numbers holds, got " + std::to_string(result.factors.scale));
    if (alpha < 0) {
      result.factors.B = -result.factors.B;
      note("the lora_alpha of module " + in_quotes(module) + " is negative: its sign is now in B");
    }
    return result;
  }

  /// What nobody has taken, by name.
  std::vector<std::string> unmatched() const {
    std::vector<std::string> names = tensors_.others;
    for (const auto& [module, factors] : tensors_.modules) {
      if (taken_.contains(module)) continue;
      for (const TensorView* tensor : {factors.A, factors.B, factors.magnitude})
        if (tensor != nullptr) names.push_back(tensor->name);
    }
    for (const std::string& module : rank_0_)
      if (!taken_.contains(module)) names.push_back(std::string(detail::rank_0_key) + ": " + module);
    std::sort(names.begin(), names.end());
    return names;
  }

  /// What was assumed, ignored or changed on the way.
  const std::vector<std::string>& notes() const { return notes_; }

  [[noreturn]] void fail(const std::string& what) const { throw FormatError(name() + ": " + what); }

 private:
  static constexpr const char* config_name = "adapter_config.json";
  static constexpr const char* weights_name = "adapter_model.safetensors";

  static PeftConfig read_config(const std::filesystem::path& folder) {
    const std::filesystem::path path = folder / config_name;
    std::error_code error;
    if (!std::filesystem::exists(path, error)) {
      std::vector<std::string> inside;
      for (std::filesystem::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
        std::error_code ignored;
        if (std::filesystem::exists(entry->path() / config_name, ignored)) inside.push_back(entry->path().filename().string());
      }
      std::sort(inside.begin(), inside.end());
      throw FileError(path.string() + ": cannot read: expected it in the folder of an adapter, for the scale, and there is none" +
                      (inside.empty() ? "" : "; but there is one in the folder " + in_quotes(inside.front()) + " in it"));
    }
    const MappedFile file(path);
    return parse_peft_config(file.text(), file.name());
  }

  static std::filesystem::path find_weights(const std::filesystem::path& folder) {
    std::error_code error;
    if (!std::filesystem::exists(folder / weights_name, error) && std::filesystem::exists(folder / "adapter_model.bin", error))
      throw FileError((folder / weights_name).string() +
                      ": cannot read: there is only adapter_model.bin, a Python pickle, which could run any program; let PEFT save the "
                      "adapter again, as safetensors");
    return folder / weights_name;
  }

  void require_one_save() const {
    const auto found = weights_.metadata().find("dylora.config");
    if (found != weights_.metadata().end() && found->second != hexadecimal(peft_config_checksum(config_)))
      fail(
          "__metadata__: dylora.config: expected weights and an adapter_config.json of one save, got others: either a save was cut short, "
          "or r, lora_alpha, use_rslora or a pattern was edited; load it from a whole copy, or save it again");
  }

  void read_rank_0() {
    const auto found = weights_.metadata().find(detail::rank_0_key);
    if (found == weights_.metadata().end()) return;
    const std::string what = name() + ": __metadata__: " + detail::rank_0_key;
    const nlohmann::json modules = parse_json(found->second, what, largest_json_config);
    const bool list = modules.is_array() && std::all_of(modules.begin(), modules.end(), [](const auto& m) { return m.is_string(); });
    if (!list) throw FormatError(what + ": expected a list of strings, got something else");
    for (const auto& module : modules) {
      const auto path = module.get<std::string>();
      if (tensors_.modules.contains(path)) throw FormatError(what + ": expected modules without tensors, got " + in_quotes(path));
      rank_0_.insert(path);
    }
  }

  /// Throws unless the tensors are those of such a layer, all of them, with a magnitude if it is DoRA's and none else.
  void require_kind(const std::string& subject, const PeftFactors& found, const PeftShape& shape, Index rank) const {
    const auto& [A, B, magnitude, kind] = found;
    if (config_.use_dora != shape.dora)
      fail(subject + "use_dora: expected " +
           (shape.dora ? "true, for a layer with a magnitude (DoRA)" : "false, for a layer without a magnitude") + ", got " +
           (config_.use_dora ? "true" : "false") + " in adapter_config.json");
    if (magnitude != nullptr && !shape.dora)
      fail("tensor " + in_quotes(magnitude->name) + ": expected none without use_dora, got a magnitude of DoRA");
    if (A == nullptr || B == nullptr)
      fail(subject + "expected a lora_A and a lora_B, got " +
           (A != nullptr   ? "only the first"
            : B != nullptr ? "only the second"
                           : "neither"));
    if (shape.dora && magnitude == nullptr) fail(subject + "expected a lora_magnitude_vector beside the factors under use_dora, got none");
    if (kind != shape.kind) fail(subject + "expected the factors of " + described(shape.kind) + ", got those of " + described(kind));
    if (rank % shape.groups != 0)
      fail(subject + "expected a rank that its " + std::to_string(shape.groups) + " groups divide, got " + std::to_string(rank));
  }

  /// PEFT's A reads the channels of all groups, that of a grouped convolution here only those of its own.
  template <std::floating_point S>
  void require_groups_apart(const TensorView& tensor, const RowMatrix<S>& A, const PeftShape& shape) const {
    const Index rows = A.rows() / shape.groups, cols = A.cols() / shape.groups;
    for (Index i = 0; i < A.rows(); ++i) {
      const Index own = i / rows * cols;
      if (!A.row(i).head(own).isZero(0) || !A.row(i).tail(A.cols() - own - cols).isZero(0))
        fail("tensor " + in_quotes(tensor.name) + ": expected rows that read the channels of one of " + std::to_string(shape.groups) +
             " groups, and are 0 elsewhere, got another in row " + std::to_string(i));
    }
  }

  /// The tensor as a matrix whose rows are along its first dimension.
  template <std::floating_point S>
  RowMatrix<S> matrix(const TensorView& tensor, const std::vector<Index>& shape, const std::string& what) const {
    if (tensor.shape != shape)
      fail("tensor " + in_quotes(tensor.name) + ": expected " + describe_shape(shape) + " (" + what + "), got " +
           describe_shape(tensor.shape));
    return finite_matrix_of<S>(tensor, name());
  }

  void note(const std::string& text) { notes_.push_back(text); }

  PeftConfig config_;
  SafetensorsFile weights_;
  PeftTensors tensors_;
  detail::PeftPatterns<Index> ranks_;
  detail::PeftPatterns<double> alphas_;
  std::set<std::string> rank_0_, taken_;
  std::vector<std::string> notes_;
};

}  // namespace dylora

#endif
