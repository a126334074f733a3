#ifndef DYLORA_IO_SAFETENSORS_SAFETENSORS_HPP
#define DYLORA_IO_SAFETENSORS_SAFETENSORS_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/io/bytes/atomic_file.hpp"
#include "dylora/io/bytes/mapped_file.hpp"
#include "dylora/io/bytes/tensor.hpp"
#include "dylora/io/safetensors/header.hpp"

/// Hugging Face's safetensors format: 8 bytes say how long the header is; the header, in JSON, says of each tensor its name, type, shape
/// and place; behind it lie the tensors, without a gap.
namespace dylora {

/// What a safetensors file holds, its tensors as views of the given bytes, in the order of their bytes.
struct SafetensorsContents {
  std::map<std::string, std::string> metadata;
  std::vector<TensorView> tensors;
  std::vector<std::size_t> by_name;  ///< their positions in `tensors`, sorted by name

  /// The tensor of that name, or null. Costs log2(tensors) comparisons.
  const TensorView* find(std::string_view name) const {
    const auto found = std::lower_bound(by_name.begin(), by_name.end(), name,
                                        [this](std::size_t i, std::string_view sought) { return tensors[i].name < sought; });
    return found == by_name.end() || tensors[*found].name != name ? nullptr : &tensors[*found];
  }
};

namespace detail {

inline const std::string& name_of(const TensorView& tensor) { return tensor.name; }
inline const std::string& name_of(const SafetensorsEntry& entry) { return entry.tensor.name; }

/// The positions of `named`, sorted by name.
template <class Named>
std::vector<std::size_t> sorted_by_name(const std::vector<Named>& named) {
  std::vector<std::size_t> order(named.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return name_of(named[a]) < name_of(named[b]); });
  return order;
}

/// The first name that two have, or null.
template <class Named>
const std::string* repeated_name(const std::vector<Named>& named, const std::vector<std::size_t>& by_name) {
  const auto same = [&](std::size_t a, std::size_t b) { return name_of(named[a]) == name_of(named[b]); };
  const auto found = std::adjacent_find(by_name.begin(), by_name.end(), same);
  return found == by_name.end() ? nullptr : &name_of(named[*found]);
}

/// Throws FormatError unless the entries, in the order of their offsets, each take the bytes of its type and shape, and together all
/// `data_size` bytes of a file of `file_size`.
inline void require_exact_cover(const std::vector<SafetensorsEntry>& entries, std::uint64_t data_size, std::uint64_t file_size,
                                const std::string& file) {
  const auto fail = [&](const SafetensorsEntry& entry, const std::string& expected, const std::string& got) {
    throw FormatError(file + ": header: tensor " + in_quotes(entry.tensor.name) + ": expected " + expected + ", got " + got);
  };
  const auto offsets = [](const SafetensorsEntry& entry) {
    return "data_offsets [" + std::to_string(entry.begin) + ", " + std::to_string(entry.end) + "]";
  };
  std::uint64_t end = 0;
  for (const SafetensorsEntry& entry : entries) {
    const std::optional<std::uint64_t> bits = bit_count(entry.tensor.dtype, entry.tensor.shape);
    if (!bits) fail(entry, "a shape of less than 2^64 bits", describe_shape(entry.tensor.shape));
    if (*bits % 8 != 0) fail(entry, "a shape of whole bytes", std::to_string(*bits) + " bits");
    if (entry.end < entry.begin) fail(entry, "an end that is not before the beginning", offsets(entry));
    if (entry.begin != end) fail(entry, "to begin at " + std::to_string(end) + ", without a gap or an overlap", offsets(entry));
    if (entry.end - entry.begin != *bits / 8)
      fail(entry, "the " + std::to_string(*bits / 8) + " bytes of its dtype and shape", offsets(entry));
    end = entry.end;
  }
  if (end > data_size) {
    const auto cut = std::find_if(entries.begin(), entries.end(), [&](const SafetensorsEntry& entry) { return entry.end > data_size; });
    fail(*cut, "to end within the " + std::to_string(data_size) + " bytes of data",
         offsets(*cut) + "; bytes missing at the end of the file: " + std::to_string(end - data_size) + " (a truncated download?)");
  }
  if (end < data_size) {
    throw FormatError(file + ": byte " + std::to_string(file_size - (data_size - end)) +
                      ": expected the end of the file, got bytes that belong to no tensor: " + std::to_string(data_size - end));
  }
}

}  // namespace detail

/// Checks all of `bytes` but the values of the elements. Throws FormatError, which begins with `name`, the file they are from, and says
/// what is probably wrong with it. Takes memory in proportion to the header: at most 7 times its size for tensors, 13 times for metadata.
inline SafetensorsContents parse_safetensors(std::span<const std::byte> bytes, const std::string& name) {
  const std::string_view text = detail::safetensors_header_text(bytes, name);
  const std::span<const std::byte> data = bytes.last(bytes.size() - detail::safetensors_word - text.size());
  detail::SafetensorsHeader header(text, name);
  std::sort(header.entries.begin(), header.entries.end(),
            [](const auto& a, const auto& b) { return std::tie(a.begin, a.end, a.tensor.name) < std::tie(b.begin, b.end, b.tensor.name); });

  SafetensorsContents contents{std::move(header.metadata), {}, detail::sorted_by_name(header.entries)};
  if (const std::string* twice = detail::repeated_name(header.entries, contents.by_name)) {
    throw FormatError(name + ": header: tensor " + in_quotes(*twice) + ": expected once, got it twice");
  }
  detail::require_exact_cover(header.entries, data.size(), bytes.size(), name);
  contents.tensors.reserve(header.entries.size());
  for (detail::SafetensorsEntry& entry : header.entries) {
    entry.tensor.bytes = data.subspan(static_cast<std::size_t>(entry.begin), static_cast<std::size_t>(entry.end - entry.begin));
    contents.tensors.push_back(std::move(entry.tensor));
  }
  return contents;
}

/// A safetensors file, mapped.
class SafetensorsFile {
 public:
  /// Throws FileError if it cannot be read, and FormatError as parse_safetensors does.
  explicit SafetensorsFile(const std::filesystem::path& path) : file_(path), contents_(parse_safetensors(file_.bytes(), file_.name())) {}

  const std::string& name() const { return file_.name(); }
  const std::map<std::string, std::string>& metadata() const { return contents_.metadata; }
  const std::vector<TensorView>& tensors() const { return contents_.tensors; }

  /// The tensor of that name, or null. Costs log2(tensors) comparisons.
  const TensorView* find(std::string_view tensor) const { return contents_.find(tensor); }

 private:
  MappedFile file_;
  SafetensorsContents contents_;
};

namespace detail {

/// Throws std::invalid_argument for a tensor that a reader would refuse.
inline void require_writable(const TensorView& tensor) {
  const auto fail = [&](const std::string& what) {
    throw std::invalid_argument("safetensors: tensor " + in_quotes(tensor.name) + ": " + what);
  };
  if (tensor.name == "__metadata__") fail("expected another name; this one is the metadata's");
  if (tensor.shape.size() > most_safetensors_dimensions) {
    fail("expected at most 64 dimensions, got " + std::to_string(tensor.shape.size()));
  }
  for (const Index extent : tensor.shape) {
    if (extent < 0 || extent > largest_safetensors_extent) fail("expected extents in [0, 2^48], got " + std::to_string(extent));
  }
  const std::optional<std::uint64_t> bits = bit_count(tensor.dtype, tensor.shape);
  if (!bits || *bits % 8 != 0 || tensor.bytes.size() != *bits / 8) {
    fail("expected the bytes of " + std::string(info(tensor.dtype).name) + ", " + describe_shape(tensor.shape) + ", got " +
         std::to_string(tensor.bytes.size()));
  }
}

inline std::string json_string(const std::string& text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::type_error&) {
    throw std::invalid_argument("safetensors: expected names and metadata in UTF-8, got " + in_quotes(text));
  }
}

}  // namespace detail

/// All that comes before the data, for tensors that lie there in this order, one after the other without a gap: what a program writes first
/// that streams values into the file which it need not hold at once. Of the tensors, names, types, shapes and sizes are used, not values.
/// Throws std::invalid_argument for text that is not UTF-8 and for a header of more than 100000000 bytes; checks nothing else.
inline std::string safetensors_beginning(const std::vector<TensorView>& tensors, const std::map<std::string, std::string>& metadata) {
  std::string text(detail::safetensors_word, '\0');
  text += R"({"__metadata__":{)";
  for (const auto& [key, value] : metadata)
    text += (text.back() == '{' ? "" : ",") + detail::json_string(key) + ":" + detail::json_string(value);
  text += "}";
  std::uint64_t begin = 0;
  for (const TensorView& tensor : tensors) {
    const std::uint64_t end = begin + tensor.bytes.size();
    const nlohmann::ordered_json entry{{"dtype", info(tensor.dtype).name}, {"shape", tensor.shape}, {"data_offsets", {begin, end}}};
    text += "," + detail::json_string(tensor.name) + ":" + entry.dump();
    begin = end;
  }
  text += "}";
  text.append((detail::safetensors_word - text.size() % detail::safetensors_word) % detail::safetensors_word, ' ');
  const std::uint64_t length = text.size() - detail::safetensors_word;
  if (length > detail::largest_safetensors_header) {
    throw std::invalid_argument("safetensors: expected a header of at most 100000000 bytes, got " + std::to_string(length));
  }
  std::memcpy(text.data(), &length, detail::safetensors_word);
  return text;
}

/// Writes the tensors and metadata (format=pt is added) into `file`, the same bytes for the same contents in any order: tensors by the
/// alignment of their type, the largest first, then by name. Commits nothing.
///
/// Throws before it writes: std::invalid_argument if there is no tensor, for a name that two have or that is __metadata__, for bytes that
/// do not fit the type and shape, and for text that is not UTF-8; NonFiniteError if a floating-point tensor holds a NaN or an infinity.
inline void write_safetensors(AtomicFile& file, std::vector<TensorView> tensors, std::map<std::string, std::string> metadata = {}) {
  if (tensors.empty()) throw std::invalid_argument("safetensors: expected at least one tensor, got none");
  for (const TensorView& tensor : tensors) detail::require_writable(tensor);
  if (const std::string* twice = detail::repeated_name(tensors, detail::sorted_by_name(tensors))) {
    throw std::invalid_argument("safetensors: tensor " + in_quotes(*twice) + ": expected once, got it twice");
  }
  std::sort(tensors.begin(), tensors.end(),
            [](const TensorView& a, const TensorView& b) { return std::tie(b.dtype, a.name) < std::tie(a.dtype, b.name); });
  metadata.insert({"format", "pt"});
  const std::string beginning = safetensors_beginning(tensors, metadata);
  for (const TensorView& tensor : tensors) {
    if (!all_finite(tensor)) {
      throw NonFiniteError("safetensors: tensor " + in_quotes(tensor.name) + ": expected finite values, got a NaN or an infinity");
    }
  }
  file.write(beginning);
  for (const TensorView& tensor : tensors) file.write(tensor.bytes);
}

/// Writes a file of its own, which appears whole or not at all. Throws as write_safetensors does, and FileError if it cannot be written.
inline void save_safetensors(const std::filesystem::path& path, std::vector<TensorView> tensors,
                             std::map<std::string, std::string> metadata = {}) {
  AtomicFile file(path);
  write_safetensors(file, std::move(tensors), std::move(metadata));
  file.commit();
}

}  // namespace dylora

#endif
