#ifndef DYLORA_IO_GGUF_WRITER_HPP
#define DYLORA_IO_GGUF_WRITER_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/bytes/tensor.hpp"
#include "dylora/io/gguf/contents.hpp"

namespace dylora {

namespace detail {

/// What comes before the data, as text.
class GgufHeader {
 public:
  std::string text = "GGUF";

  template <class T>
    requires std::is_arithmetic_v<T>
  void append(T value) {
    text.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  void append(bool value) { text += value ? '\1' : '\0'; }
  void append(std::string_view value) {
    append(std::uint64_t{value.size()});
    text += value;
  }
  void append(const std::string& value) { append(std::string_view(value)); }
  template <class T>
  void append(const std::vector<T>& values) {
    append(std::uint64_t{values.size()});
    for (const T& value : values) append(value);
  }
  void append(std::monostate) { throw std::invalid_argument("expected an array of numbers, bools or strings, got an array of nothing"); }

  /// The type, and then the value. The variants are in the order of the numbers that the file has for the types.
  template <class... T>
  void append(const std::variant<T...>& value) {
    append(static_cast<std::uint32_t>(value.index()));
    std::visit([&](const auto& alternative) { append(alternative); }, value);
  }
};

/// Throws std::invalid_argument for what parse_gguf would refuse.
inline void require_writable(const GgufContents& contents) {
  const auto require = [](bool accepted, const std::string& what) {
    if (!accepted) throw std::invalid_argument("GGUF: " + what);
  };
  std::set<std::string_view> keys, names;
  for (const GgufEntry& entry : contents.metadata) {
    require(!entry.key.empty() && keys.insert(entry.key).second,
            "key " + in_quotes(entry.key) + ": expected one that is not empty and occurs once");
  }
  require(gguf_alignment(contents).has_value(), "general.alignment: expected a power of two as u32, got something else");
  for (const GgufTensor& tensor : contents.tensors) {
    const std::string subject = "tensor " + in_quotes(tensor.name) + ": ";
    require(tensor.name.size() <= longest_gguf_name,
            subject + "name: expected at most 63 bytes, got " + std::to_string(tensor.name.size()));
    require(names.insert(tensor.name).second, subject + "name: expected once, got it twice");
    require(tensor.shape.size() <= most_gguf_dimensions,
            subject + "expected at most 4 dimensions, got " + std::to_string(tensor.shape.size()));
    require(std::all_of(tensor.shape.begin(), tensor.shape.end(), [](Index extent) { return extent >= 0; }),
            subject + "expected dimensions of at least 0, got " + describe_shape(tensor.shape));
    const auto elements = gguf_element_count(tensor.shape);
    require(elements.has_value(), subject + "expected elements that can be counted, got " + describe_shape(tensor.shape));
    const std::uint64_t row = tensor.shape.empty() ? 1 : static_cast<std::uint64_t>(tensor.shape.back());
    const GgmlType& type = *tensor.type;
    require(row % type.block_elements == 0 && tensor.bytes.size() % type.block_bytes == 0 &&
                *elements / type.block_elements == tensor.bytes.size() / type.block_bytes,
            subject + "expected the bytes of " + describe_shape(tensor.shape) + " elements of type " + std::string(type.name) + ", got " +
                std::to_string(tensor.bytes.size()));
  }
}

}  // namespace detail

/// Writes a file of version 3 into `file` (an AtomicFile, or what has its write), the same bytes for the same contents: every tensor is
/// padded with zeros, the last one too. Commits nothing. Throws std::invalid_argument, with nothing written, for what no reader accepts.
template <class File>
void write_gguf(File& file, const GgufContents& contents) {
  detail::require_writable(contents);
  const std::uint64_t alignment = *detail::gguf_alignment(contents);
  detail::GgufHeader header;
  header.append(std::uint32_t{3});
  header.append(std::uint64_t{contents.tensors.size()});
  header.append(std::uint64_t{contents.metadata.size()});
  for (const GgufEntry& entry : contents.metadata) {
    header.append(entry.key);
    header.append(entry.value);
  }
  std::uint64_t offset = 0;
  for (const GgufTensor& tensor : contents.tensors) {
    header.append(tensor.name);
    header.append(static_cast<std::uint32_t>(tensor.shape.size()));
    for (auto extent = tensor.shape.rbegin(); extent != tensor.shape.rend(); ++extent) header.append(static_cast<std::uint64_t>(*extent));
    header.append(tensor.type->number);
    header.append(offset);
    offset += tensor.bytes.size() + detail::gguf_padding(tensor.bytes.size(), alignment);
  }
  const auto pad = [&](std::uint64_t size) { return std::string(static_cast<std::size_t>(detail::gguf_padding(size, alignment)), '\0'); };
  if (!contents.tensors.empty()) header.text += pad(header.text.size());
  file.write(std::string_view(header.text));
  for (const GgufTensor& tensor : contents.tensors) {
    file.write(tensor.bytes);
    file.write(std::string_view(pad(tensor.bytes.size())));
  }
}

}  // namespace dylora

#endif
