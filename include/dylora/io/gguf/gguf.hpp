#ifndef DYLORA_IO_GGUF_GGUF_HPP
#define DYLORA_IO_GGUF_GGUF_HPP

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/bytes/file_kind.hpp"
#include "dylora/io/bytes/mapped_file.hpp"
#include "dylora/io/gguf/contents.hpp"

/// GGUF, the files of ggml and llama.cpp, versions 2 and 3 (written alike), little-endian:
///
///     "GGUF" | u32 version | u64 tensors | u64 entries | entries | tensor headers | padding | data
///     entry:  string key | u32 type | value              string: u64 bytes | text     array: u32 type | u64 count | values
///     tensor: string name | u32 n | u64 ne[n] | u32 type | u64 offset in the data     each padded, the last one too
namespace dylora {

namespace detail {

class GgufReader {
 public:
  GgufReader(std::span<const std::byte> bytes, const std::string& name) : bytes_(bytes), name_(name) {}

  GgufContents contents() {
    read_magic();
    GgufContents contents;
    read(contents.version);
    if (contents.version == 1) fail("expected version 2 or 3, got 1, which ggml no longer reads either");
    if (contents.version != 0 && (contents.version & 0xffff) == 0) {
      fail("expected version 2 or 3, got " + std::to_string(contents.version) + ": a big-endian file?");
    }
    if (contents.version < 2 || contents.version > 3) fail("expected version 2 or 3, got " + std::to_string(contents.version));
    const std::uint64_t tensors = read_count(24, "tensors"), entries = read_count(14, "metadata entries");
    read_metadata(entries, contents);
    subject_ = "general.alignment: ";
    const auto alignment = gguf_alignment(contents);
    if (!alignment) fail("expected a power of two as u32, got something else");
    read_tensors(tensors, contents);
    find_data(*alignment, contents);
    return contents;
  }

 private:
  struct Extent {
    std::uint64_t blocks, offset;
  };

  /// The byte is where the value begins that is wrong.
  [[noreturn]] void fail(const std::string& what) const {
    throw FormatError(name_ + ": byte " + std::to_string(begin_) + ": " + subject_ + what);
  }

  std::size_t left() const { return bytes_.size() - position_; }

  std::span<const std::byte> take(std::size_t size) {
    begin_ = position_;
    if (size > left()) {
      fail("expected " + std::to_string(size) + " bytes more, got the end of the file after " + std::to_string(left()));
    }
    position_ += size;
    return bytes_.subspan(begin_, size);
  }

  template <class T>
    requires std::is_arithmetic_v<T>
  void read(T& value) {
    std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
  }
  void read(bool& value) {
    std::uint8_t byte = 0;
    read(byte);
    if (byte > 1) fail("expected a bool of 0 or 1, got " + std::to_string(byte));
    value = byte == 1;
  }
  void read(std::string& text) {
    std::uint64_t size = 0;
    read(size);
    if (size > std::uint64_t{1} << 30) fail("expected a string of at most 2^30 bytes, got one of " + std::to_string(size));
    if (size > left()) {
      fail("expected a string within the " + std::to_string(left()) + " bytes that follow, got one of " + std::to_string(size));
    }
    const auto bytes = take(static_cast<std::size_t>(size));
    text.assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  template <class T>
  void read(std::vector<T>& values) {
    const std::uint64_t count = read_count(std::same_as<T, std::string> ? 8 : sizeof(T), "array elements");
    values.reserve(static_cast<std::size_t>(count));
    for (std::uint64_t i = 0; i < count; ++i) {
      T value{};
      read(value);
      values.push_back(std::move(value));
    }
  }
  void read(GgufArray& array) { read_alternative(array, "an array of "); }
  void read(std::monostate&) { fail("expected an array of numbers, bools or strings, got an array of arrays"); }

  /// A type's number, and the value of that type.
  template <class... T>
  void read_alternative(std::variant<T...>& value, const std::string& what) {
    std::uint32_t type = 0;
    read(type);
    if (type >= sizeof...(T)) fail("expected " + what + "a type in [0, 12], got " + std::to_string(type));
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      ((I == type ? read(value.template emplace<I>()) : void()), ...);
    }(std::index_sequence_for<T...>());
  }

  /// So many things follow, each of `least` bytes or more: memory may be had for them if that many bytes are left.
  std::uint64_t read_count(std::uint64_t least, const char* what) {
    std::uint64_t count = 0;
    read(count);
    if (count > left() / least) {
      fail("number of " + std::string(what) + ": expected at most the " + std::to_string(left() / least) + " that can be in the " +
           std::to_string(left()) + " bytes that follow, got " + std::to_string(count));
    }
    return count;
  }

  void read_magic() {
    const std::string_view magic(reinterpret_cast<const char*>(bytes_.data()), std::min<std::size_t>(bytes_.size(), 4));
    if (magic != "GGUF") {
      const std::string_view kind = likely_kind(bytes_);
      fail("expected a GGUF file, which begins with \"GGUF\", got " + in_quotes(magic) +
           (kind.empty() ? "" : "; it looks like " + std::string(kind)));
    }
    take(4);
  }

  void read_metadata(std::uint64_t count, GgufContents& contents) {
    contents.metadata.resize(static_cast<std::size_t>(count));  // now, so that keys stay where they are
    std::set<std::string_view> keys;
    for (GgufEntry& entry : contents.metadata) {
      subject_ = "metadata: ";
      read(entry.key);
      if (entry.key.empty()) fail("expected a key, got an empty one");
      subject_ = "key " + in_quotes(entry.key) + ": ";
      if (!keys.insert(entry.key).second) fail("expected once, got it twice");
      read_alternative(entry.value, "");
    }
  }

  void read_tensors(std::uint64_t count, GgufContents& contents) {
    contents.tensors.resize(static_cast<std::size_t>(count));
    std::set<std::string_view> names;
    for (GgufTensor& tensor : contents.tensors) {
      subject_ = "tensor: ";
      read(tensor.name);
      subject_ = "tensor " + in_quotes(tensor.name) + ": ";
      if (tensor.name.size() > longest_gguf_name) fail("name: expected at most 63 bytes, got " + std::to_string(tensor.name.size()));
      if (!names.insert(tensor.name).second) fail("name: expected once, got it twice");
      const std::uint64_t elements = read_shape(tensor.shape);
      std::uint32_t type = 0;
      read(type);
      tensor.type = ggml_type(type);
      if (tensor.type == nullptr) fail("expected a type of elements that is known, got number " + std::to_string(type));
      const std::uint64_t row = tensor.shape.empty() ? 1 : static_cast<std::uint64_t>(tensor.shape.back());
      if (row % tensor.type->block_elements != 0) {
        fail("expected rows of whole blocks of " + std::to_string(tensor.type->block_elements) + " elements (" +
             std::string(tensor.type->name) + "), got rows of " + std::to_string(row));
      }
      std::uint64_t offset = 0;
      read(offset);
      extents_.push_back({elements / tensor.type->block_elements, offset});
    }
  }

  /// Returns the number of elements.
  std::uint64_t read_shape(std::vector<Index>& shape) {
    std::uint32_t dimensions = 0;
    read(dimensions);
    if (dimensions > most_gguf_dimensions) fail("expected at most 4 dimensions, got " + std::to_string(dimensions));
    for (std::uint32_t i = 0; i < dimensions; ++i) {
      std::int64_t extent = 0;
      read(extent);
      if (extent < 0) fail("expected dimensions of at least 0, got " + std::to_string(extent));
      shape.insert(shape.begin(), extent);
    }
    const auto elements = gguf_element_count(shape);
    if (!elements) fail("expected less than 2^63 elements, got more");
    return *elements;
  }

  /// Each tensor must begin where the one before it ends, padded: no gaps, no overlap.
  void find_data(std::uint64_t alignment, GgufContents& contents) {
    if (contents.tensors.empty()) return;
    subject_ = "padding before the data: ";
    take(static_cast<std::size_t>(gguf_padding(position_, alignment)));
    const std::size_t data = position_;
    for (std::size_t i = 0; i < contents.tensors.size(); ++i) {
      GgufTensor& tensor = contents.tensors[i];
      const Extent& extent = extents_[i];
      subject_ = "tensor " + in_quotes(tensor.name) + ": ";
      begin_ = position_;
      if (extent.offset != position_ - data) {
        fail("offset: expected " + std::to_string(position_ - data) + ", where the tensor before it ends, got " +
             std::to_string(extent.offset));
      }
      const std::uint64_t bytes = tensor.type->block_bytes;
      if (extent.blocks > left() / bytes) {
        fail("expected " + std::to_string(extent.blocks) + " × " + std::to_string(bytes) + " bytes, got the end of the file after " +
             std::to_string(left()) + ": was it cut short?");
      }
      tensor.bytes = take(static_cast<std::size_t>(extent.blocks * bytes));
      subject_ += "padding after it: ";
      take(static_cast<std::size_t>(gguf_padding(tensor.bytes.size(), alignment)));
    }
  }

  std::span<const std::byte> bytes_;
  const std::string& name_;
  std::size_t begin_ = 0, position_ = 0;
  std::string subject_;
  std::vector<Extent> extents_;
};

}  // namespace detail

/// Checks all of `bytes` but the values of the elements, as strictly as ggml's own reader or more: a product of dimensions that overflows
/// is refused, too. Bytes after the last tensor's padding are accepted, as there, and belong to nothing. Throws FormatError that begins
/// with `name`, the file they are from. The tensors refer to `bytes`.
inline GgufContents parse_gguf(std::span<const std::byte> bytes, const std::string& name) {
  return detail::GgufReader(bytes, name).contents();
}

/// A GGUF file, mapped.
class GgufFile {
 public:
  explicit GgufFile(const std::filesystem::path& path) : file_(path), contents_(parse_gguf(file_.bytes(), file_.name())) {}

  const std::string& name() const { return file_.name(); }
  const GgufContents& contents() const { return contents_; }

 private:
  MappedFile file_;
  GgufContents contents_;
};

}  // namespace dylora

#endif
