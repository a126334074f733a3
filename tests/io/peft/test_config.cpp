#include "dylora/io/peft/config.hpp"

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

/// The config of a file with these fields after the two that it needs.
PeftConfig parsed(const std::string& fields) {
  return parse_peft_config(R"({"peft_type": "LORA", "target_modules": ["fc"])" + (fields.empty() ? "" : ", " + fields) + "}", "dir/c.json");
}

}  // namespace

TEST_CASE("a PEFT config is written as the smallest file that every reader takes") {
  const PeftConfig config{.r = 4, .lora_alpha = 16, .target_modules = {"h.1.fc", "h.0.fc"}};
  CHECK(peft_config_text(config) == R"({
  "alpha_pattern": {},
  "base_model_name_or_path": null,
  "bias": "none",
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "lora_alpha": 16,
  "lora_dropout": 0.0,
  "modules_to_save": null,
  "peft_type": "LORA",
  "r": 4,
  "rank_pattern": {},
  "target_modules": [
    "h.0.fc",
    "h.1.fc"
  ],
  "task_type": null,
  "use_dora": false,
  "use_rslora": false
}
)");
}

TEST_CASE("a PEFT config that was written is read as it was, its patterns in their order") {
  const PeftConfig config{.r = 3,
                          .lora_alpha = 0.1,
                          .rank_pattern = {{R"(^h\.9\.fc)", 2}, {R"(^h\.10\.fc)", 7}, {"a", 1}},
                          .alpha_pattern = {{"z", 1e-7}, {R"(^h\.0\.fc)", -3}, {"b", 1.5}, {"a", 1e300}},
                          .target_modules = {"h.0.fc", "h.1.fc"},
                          .fan_in_fan_out = true,
                          .base_model_name_or_path = "gpt2/\"é\\",
                          .task_type = "CAUSAL_LM"};
  CHECK(parse_peft_config(peft_config_text(config), "c.json") == config);
}

TEST_CASE("a PEFT config is not written with text that is not UTF-8") {
  CHECK_THROWS_SAYING(std::invalid_argument, peft_config_text({.target_modules = {"\xff"}}), "UTF-8");
  CHECK_THROWS_SAYING(std::invalid_argument, peft_config_text({.base_model_name_or_path = "\xc0\x80"}), "UTF-8");
}

TEST_CASE("what a PEFT config does not say has PEFT's default, and is noted where it decides about the scale") {
  const PeftConfig config = parsed("");
  CHECK(config.r == 8);
  CHECK(config.lora_alpha == 8);
  CHECK_FALSE(config.use_rslora);
  REQUIRE(config.notes.size() == 2);
  CHECK(config.notes[0] == "adapter_config.json: it does not say r, so that PEFT's default counts: 8");
  CHECK(config.notes[1] == "adapter_config.json: it does not say lora_alpha, so that PEFT's default counts: 8");
  CHECK(parsed(R"("r": 4, "lora_alpha": 2)").notes.empty());
}

TEST_CASE("a PEFT config says at which ranks and scales the tensors are used") {
  const PeftConfig config =
      parsed(R"("r": 4, "lora_alpha": 16.5, "use_rslora": true, "rank_pattern": {"z": 2, "a": 1}, "alpha_pattern": null,
      "bias": "none", "init_lora_weights": "gaussian", "task_type": "CAUSAL_LM", "base_model_name_or_path": "gpt2",
      "fan_in_fan_out": true)");
  CHECK(config.r == 4);
  CHECK(config.lora_alpha == 16.5);
  CHECK(config.use_rslora);
  CHECK(config.rank_pattern == std::vector<std::pair<std::string, Index>>{{"z", 2}, {"a", 1}});
  CHECK(config.alpha_pattern.empty());
  CHECK(config.target_modules == std::vector<std::string>{"fc"});
  CHECK(config.fan_in_fan_out);
  CHECK(config.base_model_name_or_path == "gpt2");
  CHECK(config.task_type == "CAUSAL_LM");
  CHECK(config.notes.empty());
}

TEST_CASE("the order of a pattern's keys is that of the file, wherever else its name occurs") {
  const PeftConfig config = parsed(R"("auto_mapping": {"rank_pattern": {"no": 1}}, "rank_pattern": {"b": 1, "a": 2, "c": 3},
      "revision": [{"rank_pattern": {"no": 1}}], "alpha_pattern": {"b": 4, "a": 5})");
  CHECK(config.rank_pattern == std::vector<std::pair<std::string, Index>>{{"b", 1}, {"a", 2}, {"c", 3}});
  CHECK(config.alpha_pattern == std::vector<std::pair<std::string, double>>{{"b", 4}, {"a", 5}});
}

TEST_CASE("a PEFT config may have the fields of every version that leave the meaning of the tensors alone") {
  const PeftConfig config =
      parsed(R"("r": 4, "lora_alpha": 16, "alora_invocation_tokens": null, "arrow_config": null, "auto_mapping": {"a": 1},
      "corda_config": null, "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null, "inference_mode": true,
      "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null, "layers_to_transform": [0, 1],
      "loftq_config": {}, "lora_bias": false, "lora_dropout": 0.05, "lora_ga_config": null, "megatron_config": null,
      "megatron_core": "megatron.core", "modules_to_save": null, "monteclora_config": null, "peft_version": "0.21.2",
      "qalora_group_size": 16, "revision": "main", "runtime_config": {"ephemeral_gpu_offload": false}, "target_parameters": null,
      "task_type": null, "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false, "velora_config": null,
      "use_something_new": false, "something_new": null, "something_else": [])");
  CHECK(config.notes.empty());
  CHECK(parsed(R"("target_modules_": 1, "r": 1, "lora_alpha": 1)").notes ==
        std::vector<std::string>{"adapter_config.json: \"target_modules_\" is not known, and ignored: 1"});
  for (const char* init : {"true", "false", "null", R"("gaussian")", R"("eva")", R"("orthogonal")"}) {
    CHECK_NOTHROW(parsed(R"("init_lora_weights": )" + std::string(init)));
  }
  CHECK(parse_peft_config(R"({"peft_type": "LORA", "target_modules": "all-linear"})", "c.json").target_modules.empty());
  CHECK_NOTHROW(parse_peft_config(R"({"peft_type": "LORA"})", "c.json"));
}

TEST_CASE("a PEFT config with anything that would change the meaning of the tensors is refused by the name of it") {
  const std::pair<std::string, std::vector<std::string_view>> cases[] = {
      {R"("r": 0)", {"r: expected a rank", "got 0"}},
      {R"("r": -1)", {"r: expected a rank", "got -1"}},
      {R"("r": 8.0)", {"r: expected a rank", "got 8.0"}},
      {R"("r": "8")", {"r: expected a rank", "got \"8\""}},
      {R"("r": 18446744073709551615)", {"r: expected a rank"}},
      {R"("lora_alpha": 0)", {"lora_alpha: expected a number other than 0", "got 0"}},
      {R"("lora_alpha": -0.0)", {"lora_alpha", "got -0.0"}},
      {R"("lora_alpha": true)", {"lora_alpha", "got true"}},
      {R"("lora_alpha": 1e999)", {"too large"}},
      {R"("lora_alpha": NaN)", {"expected JSON"}},
      {R"("use_rslora": 1)", {"use_rslora: expected true or false", "got 1"}},
      {R"("rank_pattern": [])", {"rank_pattern: expected an object or null", "got an array"}},
      {R"("rank_pattern": {"a": 1, "b": 0})", {"rank_pattern: key \"b\"", "got 0"}},
      {R"("alpha_pattern": {"a": 0})", {"alpha_pattern: key \"a\"", "got 0"}},
      {R"("alpha_pattern": {"a": {}})", {"alpha_pattern: key \"a\"", "got an object"}},
      {R"("rank_pattern": {"a": 1, "a": 2})", {"\"a\"", "twice"}},
      {R"("bias": "all")", {"bias: expected \"none\"", "got \"all\""}},
      {R"("bias": "lora_only")", {"bias", "lora_only"}},
      {R"("init_lora_weights": "pissa")", {"init_lora_weights", "base weights", "got \"pissa\""}},
      {R"("init_lora_weights": "pissa_niter_16")", {"init_lora_weights", "pissa_niter_16"}},
      {R"("init_lora_weights": "olora")", {"init_lora_weights", "olora"}},
      {R"("init_lora_weights": "corda")", {"init_lora_weights", "corda"}},
      {R"("init_lora_weights": "loftq")", {"init_lora_weights", "loftq"}},
      {R"("init_lora_weights": 1)", {"init_lora_weights: expected true, false or a string", "got 1"}},
      {R"("modules_to_save": ["head"])", {"modules_to_save", "not supported"}},
      {R"("use_dora": 1)", {"use_dora: expected true or false", "got 1"}},
      {R"("lora_bias": true)", {"lora_bias", "not supported"}},
      {R"("layer_replication": [[0, 4]])", {"layer_replication", "not supported"}},
      {R"("use_qalora": true)", {"use_qalora", "not supported"}},
      {R"("use_bdlora": {"a": 1})", {"use_bdlora", "not supported"}},
      {R"("arrow_config": {"top_k": 3})", {"arrow_config", "not supported"}},
      {R"("alora_invocation_tokens": [1])", {"alora_invocation_tokens", "not supported"}},
      {R"("kasa_config": {"a": 1})", {"kasa_config", "not supported"}},
      {R"("velora_config": {"a": 1})", {"velora_config", "not supported"}},
      {R"("monteclora_config": {"a": 1})", {"monteclora_config", "not supported"}},
      {R"("target_parameters": ["w"])", {"target_parameters", "not supported"}},
      {R"("trainable_token_indices": [1])", {"trainable_token_indices", "not supported"}},
      {R"("use_tomorrows_lora": true)", {"use_tomorrows_lora", "not supported"}},
      {R"("fan_in_fan_out": "no")", {"fan_in_fan_out: expected true or false", "got \"no\""}},
      {R"("task_type": 1)", {"task_type: expected a string or null", "got 1"}},
      {R"("base_model_name_or_path": [])", {"base_model_name_or_path: expected a string or null", "got an array"}},
  };
  for (const auto& [fields, parts] : cases) {
    INFO(fields);
    std::string message;
    try {
      parsed(fields);
    } catch (const FormatError& error) {
      message = error.what();
    }
    CHECK(message.starts_with("dir/c.json: "));
    for (const std::string_view part : parts) {
      INFO(part);
      CHECK(message.find(part) != message.npos);
    }
  }
}

TEST_CASE("what is no PEFT config is refused, with a guess at what it is") {
  const auto parse = [](std::string_view text) { return parse_peft_config(text, "dir/c.json"); };
  CHECK_THROWS_SAYING(FormatError, parse("{}"), "dir/c.json: peft_type: expected \"LORA\", got null");
  CHECK_THROWS_SAYING(FormatError, parse(R"({"peft_type": "IA3"})"), "peft_type: expected \"LORA\", got \"IA3\"");
  CHECK_THROWS_SAYING(FormatError, parse(R"({"peft_type": "LORA", "target_modules": [1]})"), "target_modules: expected strings, got 1");
  CHECK_THROWS_SAYING(FormatError, parse(R"({"peft_type": "LORA", "target_modules": 1})"), "target_modules", "got 1");
  CHECK_THROWS_SAYING(FormatError, parse("[]"), "dir/c.json: expected a JSON object, got an array");
  CHECK_THROWS_SAYING(FormatError, parse(""), "dir/c.json", "expected JSON");
  CHECK_THROWS_SAYING(FormatError, parse(R"({"peft_type": "LORA")"), "expected JSON");
  CHECK_THROWS_SAYING(FormatError, parse("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "expected JSON",
                      "Git LFS pointer", "git lfs pull");
  CHECK_THROWS_SAYING(FormatError, parse("<html>404</html>"), "expected JSON", "a web page");
  CHECK_THROWS_SAYING(FormatError, parse(std::string(largest_json_config + 1, ' ')), "expected at most 1048576 bytes of JSON, got 1048577");
}

}  // namespace dylora::test
