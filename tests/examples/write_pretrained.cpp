// Makes a folder with the tiny GPT-2 of the golden files: write_pretrained <golden folder> <folder>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>

namespace {

int digit(char c) { return c <= '9' ? c - '0' : c - 'a' + 10; }

void write_pretrained(const std::filesystem::path& golden, const std::filesystem::path& folder) {
  std::filesystem::create_directories(folder);
  const auto copy = [&](const char* from, const char* name) {
    std::filesystem::copy_file(golden / from / name, folder / name, std::filesystem::copy_options::overwrite_existing);
  };
  copy("gpt2", "config.json");
  copy("tokenizer", "vocab.json");
  copy("tokenizer", "merges.txt");
  std::ifstream hex(golden / "gpt2" / "model.safetensors.hex");
  std::ofstream model(folder / "model.safetensors", std::ios::binary);
  for (char high = 0, low = 0; hex >> high >> low;) model.put(static_cast<char>(16 * digit(high) + digit(low)));
  if (!hex.eof() || !model.flush()) throw std::runtime_error("cannot write " + folder.string());
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count != 3) throw std::runtime_error("expected the golden folder and the one to write");
    write_pretrained(arguments[1], arguments[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "write_pretrained: %s\n", error.what());
    return 1;
  }
}
