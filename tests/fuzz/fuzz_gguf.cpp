#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/random.hpp"
#include "dylora/io/gguf/adapter.hpp"
#include "dylora/io/gguf/gguf.hpp"
#include "dylora/layers/linear.hpp"
#include "io/gguf/written.hpp"

using namespace dylora;
using test::written;

namespace {

void require(bool held) {
  if (!held) std::abort();
}

/// Reads every byte that a tensor claims, and every element of those whose type is a TensorView's.
void read_tensors(const GgufContents& contents, std::span<const std::byte> file) {
  const std::byte* end = file.data();
  for (const GgufTensor& tensor : contents.tensors) {
    require(tensor.name.size() <= 63 && tensor.shape.size() <= 4);
    require(tensor.bytes.data() >= end && tensor.bytes.data() + tensor.bytes.size() <= file.data() + file.size());
    end = tensor.bytes.data() + tensor.bytes.size();
    volatile std::uint8_t sum = 0;
    for (const std::byte byte : tensor.bytes) sum = static_cast<std::uint8_t>(sum + std::to_integer<std::uint8_t>(byte));
    const auto view = tensor.view();
    if (!view) continue;
    require(static_cast<std::size_t>(view->size()) * tensor.type->block_bytes == tensor.bytes.size());
    if (!view->is_floating_point()) continue;
    std::vector<double> elements(static_cast<std::size_t>(view->size()));
    copy_elements(*view, elements.data(), "file");
  }
}

/// The same contents come back from what the writer makes of them.
void write_and_read(const GgufContents& contents) {
  const std::string text = written(contents);
  const GgufContents again = parse_gguf(std::as_bytes(std::span(text)), "written");
  require(again.metadata.size() == contents.metadata.size() && again.tensors.size() == contents.tensors.size());
  for (std::size_t i = 0; i < contents.tensors.size(); ++i) {
    require(again.tensors[i].name == contents.tensors[i].name && again.tensors[i].shape == contents.tensors[i].shape);
    require(std::ranges::equal(again.tensors[i].bytes, contents.tensors[i].bytes));
  }
  require(written(again) == text);
}

void load(const GgufContents& contents) {
  static const Linear<float> original = [] {
    Rng rng(1);
    return Linear<float>(random_uniform<float>(4, 3, 1, rng), {.max_rank = 2}, rng);
  }();
  Linear<float> layer = original;
  const GgufOptions options{.architecture = "llama", .name = [](std::string_view) { return "blk.0.attn_q"; }, .heads = 2, .strict = false};
  try {
    const LoadReport report = load_gguf(contents, "file", layer, options);
    require(layer.adapter.A.allFinite() && layer.adapter.B.allFinite() && layer.adapter.options.alpha > 0);
    require(layer.adapter.A.cols() == 3 && layer.adapter.B.rows() == 4 && layer.adapter.A.rows() == layer.adapter.B.cols());
    require(report.adapters.size() + report.missing_modules.size() == 1);
  } catch (const FormatError&) {
    require(layer.adapter.A == original.adapter.A && layer.adapter.B == original.adapter.B);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> file = std::as_bytes(std::span(data, size));
  try {
    const GgufContents contents = parse_gguf(file, "file");
    read_tensors(contents, file);
    write_and_read(contents);
    load(contents);
  } catch (const FormatError& error) {
    require(std::string_view(error.what()).starts_with("file: "));
  }
  return 0;
}
