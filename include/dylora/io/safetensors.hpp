#ifndef DYLORA_IO_SAFETENSORS_HPP
#define DYLORA_IO_SAFETENSORS_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/io/atomic_file.hpp"
#include "dylora/io/mapped_file.hpp"
#include "dylora/io/safetensors_header.hpp"
#include "dylora/io/tensor.hpp"

namespace dylora {

inline constexpr std::uint64_t largest_safetensors_header = 100'000'000;

/// What a safetensors file holds, its tensors as views of the given bytes, in the order of their bytes.
struct SafetensorsContents {
  std::map<std::string, std::string> metadata;
  std::vector<TensorView> tensors;
};

/// Checks all of `bytes` but the values of the elements. Throws FormatError that begins with `name`, the file they are from.
inline SafetensorsContents parse_safetensors(std::span<const std::byte> bytes, const std::string& name) {
  const std::size_t size = bytes.size();
  if (size < 8) throw FormatError(name + ": expected a safetensors file of at least 8 bytes, got " + std::to_string(size));
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  if (length > largest_safetensors_header)
    throw FormatError(name + ": byte 0: header: expected at most 100000000 bytes, got " + std::to_string(length));
  if (length > size - 8)
    throw FormatError(name + ": byte 0: header: expected at most the " + std::to_string(size - 8) + " bytes that follow, got " +
                      std::to_string(length));
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8, static_cast<std::size_t>(length));
  detail::SafetensorsHeader header(text, name, 8);
  std::stable_sort(header.entries.begin(), header.entries.end(),
                   [](const auto& a, const auto& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });

  const std::span<const std::byte> data = bytes.subspan(8 + static_cast<std::size_t>(length));
  SafetensorsContents contents{std::move(header.metadata), {}};
  std::uint64_t end = 0;
  for (detail::SafetensorsEntry& entry : header.entries) {
    const auto fail = [&](const std::string& what) {
      throw FormatError(name + ": header: tensor " + in_quotes(entry.tensor.name) + ": " + what);
    };
    if (entry.begin != end || entry.end < entry.begin)
      fail("data_offsets: expected to begin at " + std::to_string(end) + ", where the tensor before it ends, got [" +
           std::to_string(entry.begin) + ", " + std::to_string(entry.end) + "]");
    const bool empty = std::find(entry.tensor.shape.begin(), entry.tensor.shape.end(), 0) != entry.tensor.shape.end();
    std::uint64_t bits = empty ? 0 : static_cast<std::uint64_t>(info(entry.tensor.dtype).bits);
    for (const Index extent : entry.tensor.shape) {
      if (bits != 0 && static_cast<std::uint64_t>(extent) > UINT64_MAX / bits)
        fail("shape: expected a size of less than 2^64 bits, got more");
      bits *= static_cast<std::uint64_t>(extent);
    }
    if (bits % 8 != 0) fail("shape: expected whole bytes, got " + std::to_string(bits) + " bits");
    if (entry.end - entry.begin != bits / 8)
      fail("data_offsets: expected the " + std::to_string(bits / 8) + " bytes of its dtype and shape, got " +
           std::to_string(entry.end - entry.begin));
    if (entry.end > data.size())
      fail("data_offsets: expected to end within the " + std::to_string(data.size()) + " bytes of data, got " + std::to_string(entry.end) +
           " (a truncated download?)");
    entry.tensor.bytes = data.subspan(static_cast<std::size_t>(entry.begin), static_cast<std::size_t>(bits / 8));
    end = entry.end;
    contents.tensors.push_back(std::move(entry.tensor));
  }
  if (end != data.size())
    throw FormatError(name + ": byte " + std::to_string(size - data.size() + end) + ": expected the end of the file, got " +
                      std::to_string(data.size() - end) + " bytes more");
  return contents;
}

/// A safetensors file, mapped.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path) : file_(path), contents_(parse_safetensors(file_.bytes(), file_.name())) {}

  const std::string& name() const { return file_.name(); }
  const std::map<std::string, std::string>& metadata() const { return contents_.metadata; }
  const std::vector<TensorView>& tensors() const { return contents_.tensors; }

  /// The tensor of that name, or null.
  const TensorView* find(std::string_view tensor) const {
    const auto found = std::find_if(tensors().begin(), tensors().end(), [&](const TensorView& t) { return t.name == tensor; });
    return found == tensors().end() ? nullptr : &*found;
  }

 private:
  MappedFile file_;
  SafetensorsContents contents_;
};

/// Writes the tensors and metadata (format=pt is added) into `file`, the same bytes for the same contents. Commits nothing.
inline void write_safetensors(AtomicFile& file, std::vector<TensorView> tensors, std::map<std::string, std::string> metadata = {}) {
  metadata.insert({"format", "pt"});
  std::sort(tensors.begin(), tensors.end(), [](const TensorView& a, const TensorView& b) {
    return std::pair(b.dtype, std::string_view(a.name)) < std::pair(a.dtype, std::string_view(b.name));
  });
  nlohmann::ordered_json header{{"__metadata__", metadata}};
  std::uint64_t end = 0;
  for (const TensorView& tensor : tensors) {
    const std::uint64_t begin = end;
    end += tensor.bytes.size();
    header[tensor.name] = {{"dtype", info(tensor.dtype).name}, {"shape", tensor.shape}, {"data_offsets", {begin, end}}};
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  const std::uint64_t length = text.size();
  file.write(std::as_bytes(std::span(&length, 1)));
  file.write(text);
  for (const TensorView& tensor : tensors) file.write(tensor.bytes);
}

/// Writes a file of its own.
inline void save_safetensors(const std::filesystem::path& path, std::vector<TensorView> tensors,
                             std::map<std::string, std::string> metadata = {}) {
  AtomicFile file(path);
  write_safetensors(file, std::move(tensors), std::move(metadata));
  file.commit();
}

}  // namespace dylora

#endif
