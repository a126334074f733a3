#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/io/safetensors/safetensors.hpp"

namespace {

using namespace dylora;

void require(bool holds) {
  if (!holds) std::abort();
}

/// Every element converts, into the memory that its shape asks for.
void read(const TensorView& tensor) {
  if (!tensor.is_floating_point()) return;
  std::vector<float> values(static_cast<std::size_t>(tensor.size()));
  copy_elements(tensor, values.data(), "fuzz");
}

bool equal(const TensorView& a, const TensorView& b) {
  return a.name == b.name && a.dtype == b.dtype && a.shape == b.shape && std::ranges::equal(a.bytes, b.bytes);
}

}  // namespace

/// What is accepted has tensors that divide the data between them, can be found and read, and stays what it is when it is written again.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> bytes = std::as_bytes(std::span(data, size));
  SafetensorsContents contents;
  try {
    contents = parse_safetensors(bytes, "fuzz");
  } catch (const FormatError& error) {
    require(std::string_view(error.what()).starts_with("fuzz: "));
    return 0;
  }

  std::size_t in_tensors = 0;
  for (const TensorView& tensor : contents.tensors) in_tensors += tensor.bytes.size();
  const std::byte* next = bytes.data() + (bytes.size() - in_tensors);
  for (const TensorView& tensor : contents.tensors) {
    require(tensor.bytes.data() == next);
    require(bit_count(tensor.dtype, tensor.shape) == tensor.bytes.size() * 8);
    require(contents.find(tensor.name) == &tensor);
    next += tensor.bytes.size();
    read(tensor);
  }

  std::string again = safetensors_beginning(contents.tensors, contents.metadata);
  again.append(reinterpret_cast<const char*>(data) + (size - in_tensors), in_tensors);
  const SafetensorsContents second = parse_safetensors(std::as_bytes(std::span(again)), "again");
  require(second.metadata == contents.metadata);
  require(std::ranges::equal(second.tensors, contents.tensors, equal));
  return 0;
}
