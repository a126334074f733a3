#ifndef DYLORA_IO_PEFT_CONFIG_HPP
#define DYLORA_IO_PEFT_CONFIG_HPP

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/bytes/checksum.hpp"
#include "dylora/io/bytes/file_kind.hpp"
#include "dylora/io/bytes/json.hpp"

/// adapter_config.json, which says at which ranks and scales PEFT uses the tensors beside it.
namespace dylora {

/// What this library reads and writes of it. The patterns are keys of PeftPattern, of which the first that matches a module counts; a
/// module that none matches has r and lora_alpha.
struct PeftConfig {
  Index r = 8;              ///< this and the next are PEFT's defaults, which count where a file says nothing
  double lora_alpha = 8;    ///< of any sign; the scale is lora_alpha / r,
  bool use_rslora = false;  ///< or with this lora_alpha / √r
  bool use_dora = false;    ///< whether every module has a magnitude
  std::vector<std::pair<std::string, Index>> rank_pattern = {};
  std::vector<std::pair<std::string, double>> alpha_pattern = {};
  std::vector<std::string> target_modules = {};  ///< none if the file has an expression instead
  bool fan_in_fan_out = false;                   ///< the base has its weights as in × out; A and B do not depend on it
  std::string base_model_name_or_path = {};      ///< "" for null
  std::string task_type = {};                    ///< "" for null
  std::vector<std::string> notes = {};           ///< from reading: what was assumed or not understood

  bool operator==(const PeftConfig&) const = default;
};

namespace detail {

/// The fields of one file, and the messages about them.
class PeftFields {
 public:
  using json = nlohmann::json;

  /// What does not change what a trained adapter computes.
  static constexpr auto harmless = std::to_array<std::string_view>(
      {"auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
       "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version",
       "qalora_group_size", "revision", "runtime_config"});

  /// What changes it in ways that this library does not know, unless it is null, false or empty.
  static constexpr auto unsupported = std::to_array<std::string_view>(
      {"alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "modules_to_save", "monteclora_config",
       "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config"});

  PeftFields(std::string_view text, const std::string& name) : text_(text), name_(name) {
    try {
      fields_ = parse_json(text, name, largest_json_config);
    } catch (const FormatError& error) {
      const std::string_view kind = likely_kind(std::as_bytes(std::span(text)));
      if (kind.empty() || text.starts_with('{')) throw;
      throw FormatError(std::string(error.what()) + "; it looks like " + std::string(kind));
    }
    if (!fields_.is_object()) fail("expected a JSON object, got " + shown(fields_));
  }

  /// The field, or null if it is not there.
  const json& operator[](std::string_view field) {
    known_.push_back(field);
    static const json null;
    const auto found = fields_.find(field);
    return found == fields_.end() ? null : *found;
  }

  bool boolean(std::string_view field) {
    const json& value = (*this)[field];
    if (!value.is_null() && !value.is_boolean()) expected("true or false", field, value);
    return value.is_boolean() && value.get<bool>();
  }

  std::string text(std::string_view field) {
    const json& value = (*this)[field];
    if (!value.is_null() && !value.is_string()) expected("a string or null", field, value);
    return value.is_string() ? value.get<std::string>() : "";
  }

  Index rank(std::string_view what, const json& value) const {
    constexpr std::uint64_t largest = std::uint64_t{1} << 48;
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() < 1 || value.get<std::uint64_t>() > largest)
      expected("a rank, an integer ≥ 1", what, value);
    return value.get<Index>();
  }

  double alpha(std::string_view what, const json& value) const {
    if (!value.is_number() || value.get<double>() == 0) expected("a number other than 0", what, value);
    return value.get<double>();
  }

  /// The keys and values of an object, in the order of the text: f(what, value) reads a value.
  template <class F>
  auto pattern(const char* field, F&& f) {
    using Value = std::invoke_result_t<F, std::string, const json&>;
    const json& values = (*this)[field];
    if (!values.is_null() && !values.is_object()) expected("an object or null", field, values);
    std::vector<std::pair<std::string, Value>> result;
    if (!values.is_object() || values.empty()) return result;
    std::vector<std::string> keys;  // in their order, which `values` has lost
    std::string member;
    const json again = json::parse(text_, [&](int depth, json::parse_event_t event, json& key) {
      if (event == json::parse_event_t::key && depth == 1) member = key.get<std::string>();
      if (event == json::parse_event_t::key && depth == 2 && member == field) keys.push_back(key.get<std::string>());
      return true;
    });
    for (std::string& key : keys) {
      Value value = f(std::string(field) + ": key " + in_quotes(key), again[field][key]);
      result.emplace_back(std::move(key), value);
    }
    return result;
  }

  /// Refuses what changes the meaning of the tensors, and notes what is not known.
  void check_others(std::vector<std::string>& notes) const {
    const auto among = [](const auto& names, std::string_view name) { return std::find(names.begin(), names.end(), name) != names.end(); };
    for (const auto& [field, value] : fields_.items()) {
      const bool off = value.is_null() || value == false || value == "" || (value.is_structured() && value.empty());
      if (off || among(known_, field) || among(harmless, field)) continue;
      if (among(unsupported, field) || field.starts_with("use_")) expected("null, false or nothing: it is not supported", field, value);
      notes.push_back("adapter_config.json: " + in_quotes(field) + " is not known, and ignored: " + shown(value));
    }
  }

  [[noreturn]] void expected(const std::string& what, std::string_view field, const json& value) const {
    fail(std::string(field) + ": expected " + what + ", got " + shown(value));
  }

  [[noreturn]] void fail(const std::string& what) const { throw FormatError(name_ + ": " + what); }

 private:
  static std::string shown(const json& value) {
    if (value.is_structured()) return value.is_object() ? "an object" : "an array";
    return value.is_string() ? in_quotes(value.get_ref<const std::string&>()) : value.dump();
  }

  std::string_view text_;
  const std::string& name_;
  json fields_;
  std::vector<std::string_view> known_;
};

}  // namespace detail

/// Reads a config strictly. Throws FormatError beginning with `name`, the file it is from, for what is not a config of peft_type LORA,
/// for a scale of 0, and for everything that would make the tensors mean something else: biases, modules saved whole, initialisations that
/// changed the base. Fields that are not known are noted, but refused if their name begins with use_.
inline PeftConfig parse_peft_config(std::string_view text, const std::string& name) {
  using nlohmann::json;
  detail::PeftFields fields(text, name);
  if (const json& type = fields["peft_type"]; type != "LORA") fields.expected("\"LORA\"", "peft_type", type);
  if (const json& bias = fields["bias"]; !bias.is_null() && bias != "none")
    fields.expected("\"none\": trained biases are not supported", "bias", bias);
  if (const json& init = fields["init_lora_weights"]; init.is_string()) {
    constexpr std::array base_unchanged{"gaussian", "eva", "orthogonal"};
    if (std::find(base_unchanged.begin(), base_unchanged.end(), init) == base_unchanged.end())
      fields.expected("an initialisation that leaves the base weights as they are (convert the adapter to a plain LoRA when saving it)",
                      "init_lora_weights", init);
  } else if (!init.is_null() && !init.is_boolean()) {
    fields.expected("true, false or a string", "init_lora_weights", init);
  }

  PeftConfig config;
  const auto assumed = [&](const char* field) {
    config.notes.push_back(std::string("adapter_config.json: it does not say ") + field + ", so that PEFT's default counts: 8");
  };
  if (const json& r = fields["r"]; r.is_null()) {
    assumed("r");
  } else {
    config.r = fields.rank("r", r);
  }
  if (const json& alpha = fields["lora_alpha"]; alpha.is_null()) {
    assumed("lora_alpha");
  } else {
    config.lora_alpha = fields.alpha("lora_alpha", alpha);
  }
  config.use_rslora = fields.boolean("use_rslora");
  config.use_dora = fields.boolean("use_dora");
  config.rank_pattern =
      fields.pattern("rank_pattern", [&](const std::string& what, const json& value) { return fields.rank(what, value); });
  config.alpha_pattern =
      fields.pattern("alpha_pattern", [&](const std::string& what, const json& value) { return fields.alpha(what, value); });
  config.fan_in_fan_out = fields.boolean("fan_in_fan_out");
  config.base_model_name_or_path = fields.text("base_model_name_or_path");
  config.task_type = fields.text("task_type");
  const json& targets = fields["target_modules"];
  if (targets.is_array()) {
    for (const json& target : targets) {
      if (!target.is_string()) fields.expected("strings", "target_modules", target);
      config.target_modules.push_back(target.get<std::string>());
    }
  } else if (!targets.is_null() && !targets.is_string()) {
    fields.expected("a list of modules or an expression", "target_modules", targets);
  }
  fields.check_others(config.notes);
  return config;
}

/// The text of a config, as PEFT writes it: sorted keys, indented by two. Throws std::invalid_argument for text that is not UTF-8.
inline std::string peft_config_text(const PeftConfig& config) {
  using nlohmann::json;
  const auto number = [](auto value) -> json {
    constexpr double exact = 9007199254740992;  // 2^53
    const bool integral =
        std::trunc(static_cast<double>(value)) == static_cast<double>(value) && std::abs(static_cast<double>(value)) <= exact;
    return integral ? json(static_cast<std::int64_t>(value)) : json(value);
  };
  const auto text_or_null = [](const std::string& text) { return text.empty() ? json() : json(text); };
  const auto object = [&](const auto& pattern) {
    nlohmann::ordered_json result = nlohmann::ordered_json::object();
    for (const auto& [key, value] : pattern) result.push_back({key, nlohmann::ordered_json(number(value))});
    return result;
  };
  std::vector<std::string> targets = config.target_modules;
  std::sort(targets.begin(), targets.end());
  const nlohmann::ordered_json fields{{"alpha_pattern", object(config.alpha_pattern)},
                                      {"base_model_name_or_path", text_or_null(config.base_model_name_or_path)},
                                      {"bias", "none"},
                                      {"fan_in_fan_out", config.fan_in_fan_out},
                                      {"inference_mode", true},
                                      {"init_lora_weights", true},
                                      {"lora_alpha", number(config.lora_alpha)},
                                      {"lora_dropout", 0.0},
                                      {"modules_to_save", nullptr},
                                      {"peft_type", "LORA"},
                                      {"r", config.r},
                                      {"rank_pattern", object(config.rank_pattern)},
                                      {"target_modules", targets},
                                      {"task_type", text_or_null(config.task_type)},
                                      {"use_dora", config.use_dora},
                                      {"use_rslora", config.use_rslora}};
  try {
    return fields.dump(2) + '\n';
  } catch (const json::exception&) {
    throw std::invalid_argument("PEFT: names of modules and of the base model: expected UTF-8, got other bytes");
  }
}

/// Of what decides the function of the tensors: r, lora_alpha, use_rslora and both patterns. Equal for configs that are written differently
/// but say the same. The weights of one save have it in their metadata, so that those of another are known.
inline std::uint64_t peft_config_checksum(const PeftConfig& config) {
  const std::string numbers =
      nlohmann::json{config.r, config.lora_alpha, config.use_rslora, config.rank_pattern, config.alpha_pattern}.dump();
  return checksum(std::as_bytes(std::span(numbers)));
}

}  // namespace dylora

#endif
