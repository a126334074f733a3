#ifndef DYLORA_IO_BYTES_TENSOR_HPP
#define DYLORA_IO_BYTES_TENSOR_HPP

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
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
#include <utility>
#include <variant>
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

inline constexpr auto dtype_infos = std::to_array<DTypeInfo>(
    {{"BOOL", 8},    {"F4", 4},          {"F6_E2M3", 6},     {"F6_E3M2", 6}, {"U8", 8},   {"I8", 8},   {"F8_E5M2", 8}, {"F8_E4M3", 8},
     {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16}, {"F16", 16}, {"BF16", 16},   {"I32", 32},
     {"U32", 32},    {"F32", 32},        {"C64", 64},        {"F64", 64},    {"I64", 64}, {"U64", 64}});

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

/// The elements of a tensor of that shape: one for a scalar, none if any extent is 0.
inline Index element_count(std::span<const Index> shape) {
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;  // whatever the others are: their product may not fit
  return std::accumulate(shape.begin(), shape.end(), Index{1}, std::multiplies<>());
}

/// The bits that those elements take, or none if 64 bits cannot say. No extent may be negative.
inline std::optional<std::uint64_t> bit_count(DType dtype, std::span<const Index> shape) {
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  auto bits = static_cast<std::uint64_t>(info(dtype).bits);
  for (const Index extent : shape) {
    if (bits > UINT64_MAX / static_cast<std::uint64_t>(extent)) return std::nullopt;
    bits *= static_cast<std::uint64_t>(extent);
  }
  return bits;
}

/// A tensor in somebody else's memory: a mapped file, or a matrix that is about to be written.
struct TensorView {
  std::string name;
  DType dtype = DType::F32;
  std::vector<Index> shape;  ///< the last one varies fastest; none for a scalar
  std::span<const std::byte> bytes;

  Index size() const { return element_count(shape); }
  bool is_floating_point() const { return dtype == DType::F16 || dtype == DType::BF16 || dtype == DType::F32 || dtype == DType::F64; }
};

/// "2 × 3", as messages show it.
inline std::string describe_shape(std::span<const Index> shape) {
  if (shape.empty()) return "a scalar";
  std::string text;
  for (const Index extent : shape) text += (text.empty() ? "" : " × ") + std::to_string(extent);
  return text;
}

/// "F32 2 × 3", as messages show it; "none" for null.
inline std::string describe_tensor(const TensorView* tensor) {
  return tensor == nullptr ? "none" : std::string(info(tensor->dtype).name) + ' ' + describe_shape(tensor->shape);
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

/// A tensor with its values.
struct OwnedTensor {
  std::string name;
  std::vector<Index> shape;
  std::variant<RowMatrix<float>, RowMatrix<double>> values;  ///< as many as the shape says

  /// Must not outlive this.
  TensorView view() const {
    TensorView result = std::visit([&](const auto& matrix) { return tensor_view(name, matrix); }, values);
    result.shape = shape;
    return result;
  }
};

/// The elements where they are, if they are of type S and lie at an address that S may have; else null. Nothing is copied.
template <class S>
const S* elements_in_place(const TensorView& tensor) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(tensor.bytes.data()) % alignof(S) == 0;
  return tensor.dtype == dtype_v<S> && aligned ? reinterpret_cast<const S*>(tensor.bytes.data()) : nullptr;
}

namespace detail {

/// Calls f(element) for each element of type T, at whatever address it is.
template <class T, class F>
void for_each_element(const TensorView& tensor, F&& f) {
  for (std::size_t i = 0; i < tensor.bytes.size() / sizeof(T); ++i) {
    T element;
    std::memcpy(&element, tensor.bytes.data() + i * sizeof(T), sizeof(T));
    f(element);
  }
}

/// Whether no element has all the bits of its exponent set, as infinities and NaNs have.
template <class Bits>
bool all_finite(const TensorView& tensor, Bits exponent) {
  bool finite = true;
  for_each_element<Bits>(tensor, [&](Bits bits) { finite &= (bits & exponent) != exponent; });
  return finite;
}

}  // namespace detail

/// Whether an F16, BF16, F32 or F64 tensor holds neither a NaN nor an infinity. Of another type, it is not looked at: true.
inline bool all_finite(const TensorView& tensor) {
  switch (tensor.dtype) {
    case DType::F16: return detail::all_finite<std::uint16_t>(tensor, 0x7c00);
    case DType::BF16: return detail::all_finite<std::uint16_t>(tensor, 0x7f80);
    case DType::F32: return detail::all_finite<std::uint32_t>(tensor, 0x7f80'0000);
    case DType::F64: return detail::all_finite<std::uint64_t>(tensor, 0x7ff0'0000'0000'0000);
    default: return true;
  }
}

/// Writes size() elements of an F16, BF16, F32 or F64 tensor to `to`: exactly, subnormals too, where S holds the value; F64 to float rounds
/// to the nearest. Throws FormatError, beginning with `file`, for a tensor of another type.
template <std::floating_point S>
void copy_elements(const TensorView& tensor, S* to, std::string_view file) {
  const auto convert = [&to](auto value) { *to++ = static_cast<S>(value); };
  const auto widen = [&to](auto value) { *to++ = static_cast<S>(static_cast<float>(value)); };
  switch (tensor.dtype) {
    case DType::F16: return detail::for_each_element<Eigen::half>(tensor, widen);
    case DType::BF16: return detail::for_each_element<Eigen::bfloat16>(tensor, widen);
    case DType::F32: return detail::for_each_element<float>(tensor, convert);
    case DType::F64: return detail::for_each_element<double>(tensor, convert);
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

/// The same of one or more dimensions, whose rows are along the first one: a copy of finite numbers. Throws FormatError, beginning with
/// `file` and naming the tensor, for an element that is not finite, or not as an S.
template <std::floating_point S>
RowMatrix<S> finite_matrix_of(const TensorView& tensor, std::string_view file) {
  assert(!tensor.shape.empty());
  const auto wrong = [&](const char* problem) {
    throw FormatError(std::string(file) + ": tensor " + in_quotes(tensor.name) + ": expected " + problem);
  };
  if (!all_finite(tensor)) wrong("finite values, got a NaN or an infinity");
  RowMatrix<S> matrix(tensor.shape.front(), element_count(std::span(tensor.shape).subspan(1)));
  copy_elements(tensor, matrix.data(), file);
  if (!matrix.allFinite()) wrong("values that its type of numbers holds, got larger ones");
  return matrix;
}

}  // namespace dylora

#endif
