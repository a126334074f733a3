// Writes good files for each fuzz target to begin with: seeds <folder> makes <folder>/<target>/...

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/io/checkpoint/checkpoint.hpp"
#include "dylora/io/gguf/adapter.hpp"
#include "dylora/io/peft/peft.hpp"
#include "dylora/io/safetensors/safetensors.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/train/adamw.hpp"

namespace {

using namespace dylora;

void put(const std::filesystem::path& path, std::string_view text) {
  std::ofstream file(path, std::ios::binary);
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path.string());
}

void write_seeds(const std::filesystem::path& folder) {
  for (const char* target : {"safetensors", "gguf", "peft_config", "checkpoint", "tokenizer"}) {
    std::filesystem::create_directories(folder / target);
  }
  Rng rng(1);
  Linear<float> layer(random_uniform<float>(2, 3, 1, rng), {.max_rank = 2}, rng);
  save_peft(folder / "peft", layer, 2, {.prefix = "h.0.attn.c_attn"});
  std::filesystem::rename(folder / "peft" / "adapter_model.safetensors", folder / "safetensors" / "adapter");
  std::filesystem::rename(folder / "peft" / "adapter_config.json", folder / "peft_config" / "config");
  put(folder / "peft_config" / "patterns",
      R"({"peft_type":"LORA","r":2,"lora_alpha":4.5,"target_modules":["q"],"rank_pattern":{"^h\\.0\\.q":1},"alpha_pattern":{"l.[0-9]+.(a|b)$":2}})");
  save_gguf(folder / "gguf" / "adapter", layer, 2, {.architecture = "gpt2", .name = [](std::string_view) { return "blk.0.attn_qkv"; }});
  AdamW optimizer(layer);
  put(folder / "checkpoint" / "state", checkpoint_bytes(3, [&](auto& archive) {
        archive.parameters("model", layer.adapter);
        archive("optimizer", optimizer);
        archive("rng", rng);
      }));
  using namespace std::string_view_literals;
  put(folder / "tokenizer" / "text", "\0It's 12 caf\xc3\xa9s,  baab \n\t"sv);
  put(folder / "tokenizer" / "vocabulary", "\1{\"a\":0,\"b\":1,\"ab\":2}"sv);
  put(folder / "tokenizer" / "merges", "\2#version: 0.2\na b\nab a\n\0abab baba"sv);
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count != 2) throw std::runtime_error("expected a folder");
    write_seeds(arguments[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "seeds: %s\n", error.what());
    return 1;
  }
}
