#ifndef DYLORA_IO_GGUF_CONTENTS_HPP
#define DYLORA_IO_GGUF_CONTENTS_HPP

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/bytes/tensor.hpp"

/// What a GGUF file holds: metadata and tensors, as ggml (the library under llama.cpp) has them.
namespace dylora {

/// A type of elements. A quantised one packs `block_elements` neighbours of a row into `block_bytes`.
struct GgmlType {
  std::uint32_t number;  ///< as the file has it
  std::string_view name;
  std::uint64_t block_elements = 1, block_bytes = 1;
  std::optional<DType> dtype = std::nullopt;  ///< the same as a type of TensorView; none for a quantised one
};

/// Those that a file may have here: block sizes as in ggml's block structs.
inline constexpr std::array<GgmlType, 20> ggml_types{
    {{0, "F32", 1, 4, DType::F32},  {1, "F16", 1, 2, DType::F16},  {2, "Q4_0", 32, 18},           {3, "Q4_1", 32, 20},
     {6, "Q5_0", 32, 22},           {7, "Q5_1", 32, 24},           {8, "Q8_0", 32, 34},           {9, "Q8_1", 32, 36},
     {10, "Q2_K", 256, 84},         {11, "Q3_K", 256, 110},        {12, "Q4_K", 256, 144},        {13, "Q5_K", 256, 176},
     {14, "Q6_K", 256, 210},        {15, "Q8_K", 256, 292},        {24, "I8", 1, 1, DType::I8},   {25, "I16", 1, 2, DType::I16},
     {26, "I32", 1, 4, DType::I32}, {27, "I64", 1, 8, DType::I64}, {28, "F64", 1, 8, DType::F64}, {30, "BF16", 1, 2, DType::BF16}}};

/// The type of that number, or null.
inline const GgmlType* ggml_type(std::uint32_t number) {
  const auto found = std::find_if(ggml_types.begin(), ggml_types.end(), [&](const GgmlType& type) { return type.number == number; });
  return found == ggml_types.end() ? nullptr : &*found;
}

/// The same type in ggml, or null.
inline const GgmlType* ggml_type(DType dtype) {
  const auto found = std::find_if(ggml_types.begin(), ggml_types.end(), [&](const GgmlType& type) { return type.dtype == dtype; });
  return found == ggml_types.end() ? nullptr : &*found;
}

/// A tensor in somebody else's memory.
struct GgufTensor {
  std::string name;
  const GgmlType* type = &ggml_types[0];  ///< never null
  std::vector<Index> shape;               ///< the last one varies fastest, as in TensorView: ggml's ne from behind
  std::span<const std::byte> bytes;

  /// As the other readers have tensors; none if it is quantised.
  std::optional<TensorView> view() const {
    if (!type->dtype) return std::nullopt;
    return TensorView{name, *type->dtype, shape, bytes};
  }
};

/// Throws std::invalid_argument for a type that ggml has not.
inline GgufTensor gguf_tensor(const TensorView& tensor) {
  const GgmlType* type = ggml_type(tensor.dtype);
  if (type == nullptr) {
    throw std::invalid_argument("tensor " + in_quotes(tensor.name) + ": expected a type that GGUF has, got " +
                                std::string(info(tensor.dtype).name));
  }
  return {tensor.name, type, tensor.shape, tensor.bytes};
}

/// The index of each alternative is the number that the file has for its type. An array of arrays is nothing that ggml reads; at its place
/// is a hole.
using GgufArray =
    std::variant<std::vector<std::uint8_t>, std::vector<std::int8_t>, std::vector<std::uint16_t>, std::vector<std::int16_t>,
                 std::vector<std::uint32_t>, std::vector<std::int32_t>, std::vector<float>, std::vector<bool>, std::vector<std::string>,
                 std::monostate, std::vector<std::uint64_t>, std::vector<std::int64_t>, std::vector<double>>;
using GgufValue = std::variant<std::uint8_t, std::int8_t, std::uint16_t, std::int16_t, std::uint32_t, std::int32_t, float, bool,
                               std::string, GgufArray, std::uint64_t, std::int64_t, double>;

struct GgufEntry {
  std::string key;
  GgufValue value;
};

struct GgufContents {
  std::uint32_t version = 3;
  std::vector<GgufEntry> metadata;  ///< in the order of the file
  std::vector<GgufTensor> tensors;  ///< in the order of the file, which is that of their bytes

  /// The value of that key, or null.
  const GgufValue* find(std::string_view key) const {
    const auto found = std::find_if(metadata.begin(), metadata.end(), [&](const GgufEntry& entry) { return entry.key == key; });
    return found == metadata.end() ? nullptr : &found->value;
  }

  /// The tensor of that name, or null.
  const GgufTensor* find_tensor(std::string_view name) const {
    const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const GgufTensor& tensor) { return tensor.name == name; });
    return found == tensors.end() ? nullptr : &*found;
  }

  /// The value of that key if it is a T; null for another type, too.
  template <class T>
  const T* find_as(std::string_view key) const {
    const GgufValue* value = find(key);
    return value == nullptr ? nullptr : std::get_if<T>(value);
  }
};

namespace detail {

inline constexpr std::size_t longest_gguf_name = 63;  // and a zero byte, in ggml's tensors
inline constexpr std::size_t most_gguf_dimensions = 4;

/// The number of elements, if those of the dimensions that are not 0 can be counted, so that nobody's product can overflow: their product
/// is less than 2⁶³. No extent may be negative.
inline std::optional<std::uint64_t> gguf_element_count(std::span<const Index> shape) {
  std::uint64_t product = 1;
  for (const Index extent : shape) {
    if (extent > 0 && product > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max() / extent)) return std::nullopt;
    if (extent > 0) product *= static_cast<std::uint64_t>(extent);
  }
  return std::find(shape.begin(), shape.end(), 0) == shape.end() ? product : 0;
}

/// Every tensor begins at a multiple of this. None if the metadata say something that is no alignment.
inline std::optional<std::uint64_t> gguf_alignment(const GgufContents& contents) {
  if (contents.find("general.alignment") == nullptr) return 32;
  const auto* alignment = contents.find_as<std::uint32_t>("general.alignment");
  if (alignment == nullptr || !std::has_single_bit(*alignment)) return std::nullopt;
  return *alignment;
}

/// How many bytes are to follow `size` bytes.
inline std::uint64_t gguf_padding(std::uint64_t size, std::uint64_t alignment) { return (alignment - size % alignment) % alignment; }

}  // namespace detail

}  // namespace dylora

#endif
