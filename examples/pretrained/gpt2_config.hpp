#ifndef DYLORA_EXAMPLES_PRETRAINED_GPT2_CONFIG_HPP
#define DYLORA_EXAMPLES_PRETRAINED_GPT2_CONFIG_HPP

#include <cstdint>
#include <dylora/dylora.hpp>
#include <dylora/io/bytes/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "gpt/gpt.hpp"

namespace pretrained {

using dylora::Index;

struct Gpt2Config {
  gpt::Config model;
  Index inner = 0;  ///< width of the MLP
  double epsilon = 1e-5;
};

/// What a config.json says about a GPT-2. Throws dylora::FormatError, beginning with `name`, for a model of another kind, for a number that
/// is missing or out of range, and for what would make it compute something else.
inline Gpt2Config parse_gpt2_config(std::string_view text, const std::string& name) {
  const nlohmann::json json = dylora::parse_json(text, name);
  const auto shown = [](const nlohmann::json& got) -> std::string {
    if (got.is_null()) return "none";
    if (got.is_string()) return dylora::in_quotes(got.get_ref<const std::string&>());
    return got.is_structured() ? got.type_name() : got.dump();
  };
  const auto fail = [&](const std::string& key, const std::string& expected, const nlohmann::json& got) {
    throw dylora::FormatError(name + ": " + key + ": expected " + expected + ", got " + shown(got));
  };
  if (!json.is_object()) throw dylora::FormatError(name + ": expected a JSON object, got " + shown(json));
  const auto value = [&](const char* key) -> nlohmann::json { return json.contains(key) ? json[key] : nlohmann::json(); };
  const auto integer = [&](const char* key, Index largest) {
    const nlohmann::json found = value(key);
    if (!found.is_number_unsigned() || found.get<std::uint64_t>() < 1 || found.get<std::uint64_t>() > static_cast<std::uint64_t>(largest)) {
      fail(key, "an integer in [1, " + std::to_string(largest) + "]", found);
    }
    return found.get<Index>();
  };
  const auto demand = [&](const char* key, const nlohmann::json& only) {
    if (!value(key).is_null() && value(key) != only) fail(key, only.dump() + ", which is all that this model computes", value(key));
  };

  demand("model_type", "gpt2");
  demand("scale_attn_weights", true);
  demand("scale_attn_by_inverse_layer_idx", false);
  demand("add_cross_attention", false);
  const nlohmann::json activation = value("activation_function");
  if (activation != "gelu_pytorch_tanh") demand("activation_function", "gelu_new");

  Gpt2Config config;
  config.model = {.vocabulary = integer("vocab_size", 1 << 24),
                  .context = integer("n_positions", 1 << 20),
                  .width = integer("n_embd", 1 << 16),
                  .layers = integer("n_layer", 1 << 10),
                  .heads = integer("n_head", 1 << 10)};
  if (config.model.width % config.model.heads != 0) {
    fail("n_head", "a divisor of n_embd " + std::to_string(config.model.width), value("n_head"));
  }
  config.inner = value("n_inner").is_null() ? 4 * config.model.width : integer("n_inner", 1 << 20);
  if (const nlohmann::json tied = value("tie_word_embeddings"); !tied.is_null()) {
    if (!tied.is_boolean()) fail("tie_word_embeddings", "true or false", tied);
    config.model.tied = tied.get<bool>();
  }
  if (const nlohmann::json epsilon = value("layer_norm_epsilon"); !epsilon.is_null()) {
    if (!epsilon.is_number() || !(epsilon.get<double>() > 0 && epsilon.get<double>() < 1)) {
      fail("layer_norm_epsilon", "a number in (0, 1)", epsilon);
    }
    config.epsilon = epsilon.get<double>();
  }
  return config;
}

}  // namespace pretrained

#endif
