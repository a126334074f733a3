#ifndef DYLORA_IO_TENSOR_HPP
#define DYLORA_IO_TENSOR_HPP

#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"

/// Tensors as files hold them: named bytes with a type and a shape, row by row, little-endian.
namespace dylora {

static_assert(std::endian::native == std::endian::little, "the file formats are little-endian, and so must be the machine");

/// The types of elements, in safetensors' order: by alignment, then as the format lists them.
enum class DType : std::uint8_t {
  BOOL,
  F4,
  F6_E2M3,
  F6_E3M2,
  U8,
  I8,
  F8_E5M2,
  F8_E4M3,
  F8_E8M0,
  F8_E4M3FNUZ,
  F8_E5M2FNUZ,
  I16,
  U16,
  F16,
  BF16,
  I32,
  U32,
  F32,
  C64,
  F64,
  I64,
  U64
};

struct DTypeInfo {
  std::string_view name;
  int bits;
};

inline constexpr std::array<DTypeInfo, 22> dtype_infos{
    {{"BOOL", 8},    {"F4", 4},          {"F6_E2M3", 6},     {"F6_E3M2", 6}, {"U8", 8},   {"I8", 8},   {"F8_E5M2", 8}, {"F8_E4M3", 8},
     {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16}, {"F16", 16}, {"BF16", 16},   {"I32", 32},
     {"U32", 32},    {"F32", 32},        {"C64", 64},        {"F64", 64},    {"I64", 64}, {"U64", 64}}};

inline const DTypeInfo& info(DType dtype) { return dtype_infos[static_cast<std::size_t>(dtype)]; }

/// The type of that name (case matters), or none.
inline std::optional<DType> dtype_of(std::string_view name) {
  for (std::size_t i = 0; i < dtype_infos.size(); ++i) {
    if (dtype_infos[i].name == name) return static_cast<DType>(i);
  }
  return std::nullopt;
}

template <class T>
inline constexpr DType dtype_v = [] {
  if constexpr (std::same_as<T, float>) return DType::F32;
  if constexpr (std::same_as<T, double>) return DType::F64;
  if constexpr (std::same_as<T, std::int64_t>) return DType::I64;
  if constexpr (std::same_as<T, std::uint64_t>) return DType::U64;
  if constexpr (std::same_as<T, std::uint8_t>) return DType::U8;
}();

/// A tensor in somebody else's memory: a mapped file, or a matrix that is about to be written.
struct TensorView {
  std::string name;
  DType dtype = DType::F32;
  std::vector<Index> shape;  ///< the last one varies fastest; none for a scalar
  std::span<const std::byte> bytes;

  Index size() const { return std::accumulate(shape.begin(), shape.end(), Index{1}, std::multiplies<>()); }
  bool is_floating_point() const { return dtype == DType::F16 || dtype == DType::BF16 || dtype == DType::F32 || dtype == DType::F64; }
};

/// "2 × 3", as messages show it.
inline std::string describe_shape(std::span<const Index> shape) {
  if (shape.empty()) return "a scalar";
  std::string text;
  for (const Index extent : shape) text += (text.empty() ? "" : " × ") + std::to_string(extent);
  return text;
}

/// Of a row-major matrix, which must outlive the view.
template <class S>
TensorView tensor_view(std::string name, const RowMatrix<S>& matrix) {
  return {std::move(name),
          dtype_v<S>,
          {matrix.rows(), matrix.cols()},
          std::as_bytes(std::span(matrix.data(), static_cast<std::size_t>(matrix.size())))};
}

/// Of a vector, which must outlive the view.
template <class S>
TensorView tensor_view(std::string name, const std::vector<S>& values) {
  return {std::move(name), dtype_v<S>, {static_cast<Index>(values.size())}, std::as_bytes(std::span(values))};
}

/// The elements where they are, if they are of type S and lie at an address that S may have; else null. Nothing is copied.
template <class S>
const S* elements_in_place(const TensorView& tensor) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(tensor.bytes.data()) % alignof(S) == 0;
  return tensor.dtype == dtype_v<S> && aligned ? reinterpret_cast<const S*>(tensor.bytes.data()) : nullptr;
}

namespace detail {

template <class From, class To>
void convert_elements(const TensorView& tensor, To* to) {
  for (std::size_t i = 0; i < tensor.bytes.size() / sizeof(From); ++i) {
    From value;
    std::memcpy(&value, tensor.bytes.data() + i * sizeof(From), sizeof(From));  // at any address
    to[i] = static_cast<To>(value);
  }
}

}  // namespace detail

/// Writes size() elements of an F16, BF16, F32 or F64 tensor to `to`: exactly, subnormals too, where S holds the value; F64 to float rounds.
/// Throws FormatError, beginning with `file`, for a tensor of another type.
template <std::floating_point S>
void copy_elements(const TensorView& tensor, S* to, std::string_view file) {
  switch (tensor.dtype) {
    case DType::F16: return detail::convert_elements<Eigen::half>(tensor, to);
    case DType::BF16: return detail::convert_elements<Eigen::bfloat16>(tensor, to);
    case DType::F32: return detail::convert_elements<float>(tensor, to);
    case DType::F64: return detail::convert_elements<double>(tensor, to);
    default: break;
  }
  throw FormatError(std::string(file) + ": tensor " + in_quotes(tensor.name) + ": expected F16, BF16, F32 or F64, got " +
                    std::string(info(tensor.dtype).name));
}

/// A copy as a row-major matrix, converted as copy_elements does. Throws FormatError, beginning with `file`, unless the tensor has two
/// dimensions.
template <std::floating_point S>
RowMatrix<S> matrix_of(const TensorView& tensor, std::string_view file) {
  if (tensor.shape.size() != 2) {
    throw FormatError(std::string(file) + ": tensor " + in_quotes(tensor.name) + ": expected a matrix, got " +
                      describe_shape(tensor.shape));
  }
  RowMatrix<S> matrix(tensor.shape[0], tensor.shape[1]);
  copy_elements(tensor, matrix.data(), file);
  return matrix;
}

}  // namespace dylora

#endif
