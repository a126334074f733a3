#include "dylora/io/bytes/tensor.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "dylora/core/random.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

/// The elements of a tensor of these values, which lie `offset` bytes past an aligned address.
template <class To, class From>
std::vector<To> converted(DType dtype, const std::vector<From>& values, std::size_t offset = 0) {
  const auto source = std::as_bytes(std::span(values));
  std::vector<std::byte> memory(source.size() + 8);
  std::memcpy(memory.data() + offset, source.data(), source.size());
  const TensorView tensor{"t", dtype, {static_cast<Index>(values.size())}, std::span(memory).subspan(offset, source.size())};
  std::vector<To> result(values.size() + 1, To{42});
  copy_elements(tensor, result.data(), "file");
  CHECK(result.back() == To{42});
  result.pop_back();
  return result;
}

/// The value of an IEEE number of so many exponent and fraction bits, from the definition.
double value_of(unsigned bits, int exponent_bits, int fraction_bits) {
  const auto fraction = static_cast<double>(bits & ((1u << fraction_bits) - 1));
  const int exponent = static_cast<int>(bits >> fraction_bits & ((1u << exponent_bits) - 1));
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = (bits >> (exponent_bits + fraction_bits) & 1) != 0 ? -1 : 1;
  if (exponent == 2 * bias + 1) return fraction == 0 ? sign * std::numeric_limits<double>::infinity() : nan<double>;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp(fraction + std::ldexp(1.0, fraction_bits), exponent - bias - fraction_bits);
}

/// How many of all 65 536 bit patterns become another number than they are, or lose their sign.
template <class To>
int wrong_conversions(DType dtype, int exponent_bits, int fraction_bits, std::size_t offset) {
  std::vector<std::uint16_t> patterns(65536);
  for (std::size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<std::uint16_t>(i);
  const std::vector<To> got = converted<To>(dtype, patterns, offset);
  int wrong = 0;
  for (unsigned i = 0; i < 65536; ++i) {
    const double expected = value_of(i, exponent_bits, fraction_bits);
    const bool same = std::isnan(expected) ? std::isnan(got[i]) : static_cast<double>(got[i]) == expected;
    const bool same_sign = std::isnan(expected) || std::signbit(got[i]) == std::signbit(expected);
    if (!same || !same_sign) ++wrong;
  }
  return wrong;
}

}  // namespace

TEST_CASE("a type of elements has its format's name and width") {
  const std::vector<std::pair<std::string, int>> expected{
      {"BOOL", 8},    {"F4", 4},          {"F6_E2M3", 6},     {"F6_E3M2", 6}, {"U8", 8},   {"I8", 8},   {"F8_E5M2", 8}, {"F8_E4M3", 8},
      {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16}, {"F16", 16}, {"BF16", 16},   {"I32", 32},
      {"U32", 32},    {"F32", 32},        {"C64", 64},        {"F64", 64},    {"I64", 64}, {"U64", 64}};
  REQUIRE(dtype_infos.size() == expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const auto dtype = static_cast<DType>(i);
    CHECK(info(dtype).name == expected[i].first);
    CHECK(info(dtype).bits == expected[i].second);
    CHECK(dtype_of(expected[i].first) == dtype);
  }
  CHECK(info(DType::F8_E5M2).name == "F8_E5M2");
  CHECK(info(DType::BF16).name == "BF16");
  CHECK(info(DType::U64).name == "U64");
  for (const char* none : {"", "f32", "F32 ", "F", "F128"}) CHECK(!dtype_of(none));
}

TEST_CASE("all 65 536 F16 and BF16 numbers convert exactly, at any address") {
  for (std::size_t offset = 0; offset < 4; ++offset) {
    CHECK(wrong_conversions<float>(DType::F16, 5, 10, offset) == 0);
    CHECK(wrong_conversions<double>(DType::F16, 5, 10, offset) == 0);
    CHECK(wrong_conversions<float>(DType::BF16, 8, 7, offset) == 0);
    CHECK(wrong_conversions<double>(DType::BF16, 8, 7, offset) == 0);
  }
}

TEST_CASE("F32 converts exactly and F64 to its nearest float, at any address") {
  constexpr double ulp = 0x1p-23;
  Rng rng(1);
  std::vector<double> doubles{1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp / 2 + 0x1p-52, 0x1p-149, 0x1p-150, 0x1.8p-150,
                              -0.0,        0x1.fffffep127,  0x1.ffffffp127,        -1e300};
  const std::vector<float> nearest{1,
                                   1 + 2 * 0x1p-23f,
                                   1 + 0x1p-23f,
                                   0x1p-149f,
                                   0,
                                   0x1p-149f,
                                   -0.0f,
                                   0x1.fffffep127f,
                                   std::numeric_limits<float>::infinity(),
                                   -std::numeric_limits<float>::infinity()};
  const std::size_t known = nearest.size();
  for (int i = 0; i < 1000; ++i) doubles.push_back(std::ldexp(2 * rng.uniform() - 1, static_cast<int>(rng.below(200)) - 100));
  for (std::size_t offset = 0; offset < 8; ++offset) {
    const std::vector<float> floats = converted<float>(DType::F64, doubles, offset);
    CHECK(std::memcmp(floats.data(), nearest.data(), known * sizeof(float)) == 0);
    int farther = 0;
    for (std::size_t i = known; i < doubles.size(); ++i) {
      const double error = std::abs(floats[i] - doubles[i]);
      for (const float end : {-HUGE_VALF, HUGE_VALF}) farther += std::abs(std::nextafter(floats[i], end) - doubles[i]) < error;
    }
    CHECK(farther == 0);
    CHECK(converted<double>(DType::F64, doubles, offset) == doubles);
    CHECK(converted<float>(DType::F32, floats, offset) == floats);
    const std::vector<double> widened = converted<double>(DType::F32, floats, offset);
    for (std::size_t i = 0; i < floats.size(); ++i) CHECK(widened[i] == static_cast<double>(floats[i]));
  }
}

TEST_CASE("elements that are no floating-point numbers are not converted") {
  const std::vector<std::int64_t> values{1};
  TensorView tensor = tensor_view("w\n", values);
  float to[8];
  CHECK_THROWS_SAYING(FormatError, copy_elements(tensor, to, "a.safetensors"),
                      "a.safetensors: tensor \"w\\x0a\": expected F16, BF16, F32 or F64, got I64");
  for (std::size_t i = 0; i < dtype_infos.size(); ++i) {
    tensor.dtype = static_cast<DType>(i);
    if (!tensor.is_floating_point())
      CHECK_THROWS_SAYING(FormatError, copy_elements(tensor, to, "f"), "got " + std::string(info(tensor.dtype).name));
  }
}

TEST_CASE("a matrix is read row by row, and nothing else is a matrix") {
  const std::vector<float> values{1, 2, 3, 4, 5, 6};
  TensorView tensor = tensor_view("w", values);
  CHECK_THROWS_SAYING(FormatError, matrix_of<float>(tensor, "f"), "f: tensor \"w\": expected a matrix, got 6");
  tensor.shape = {2, 3};
  const RowMatrix<double> matrix = matrix_of<double>(tensor, "f");
  CHECK(matrix == (RowMatrix<double>(2, 3) << 1, 2, 3, 4, 5, 6).finished());
  tensor.shape = {1, 2, 3};
  CHECK_THROWS_SAYING(FormatError, matrix_of<float>(tensor, "f"), "expected a matrix, got 1 × 2 × 3");
  tensor.shape = {};
  CHECK_THROWS_SAYING(FormatError, matrix_of<float>(tensor, "f"), "expected a matrix, got a scalar");
  tensor.shape = {0, 3};
  tensor.bytes = {};
  CHECK(matrix_of<float>(tensor, "f").rows() == 0);
}

TEST_CASE("a matrix of finite numbers has its rows along the first dimension, and is refused if one is not finite where it is read to") {
  std::vector<double> values{1, 2, 3, 4, 5, 6};
  TensorView tensor = tensor_view("w", values);
  CHECK(finite_matrix_of<float>(tensor, "f") == (RowMatrix<float>(6, 1) << 1, 2, 3, 4, 5, 6).finished());
  tensor.shape = {2, 1, 3, 1};
  CHECK(finite_matrix_of<float>(tensor, "f") == (RowMatrix<float>(2, 3) << 1, 2, 3, 4, 5, 6).finished());
  values[4] = 1e39;
  CHECK(finite_matrix_of<double>(tensor, "f")(1, 1) == 1e39);
  CHECK_THROWS_SAYING(FormatError, finite_matrix_of<float>(tensor, "f"), "f: tensor \"w\": expected values that its type of numbers holds");
  for (const double bad : {nan<double>, HUGE_VAL, -HUGE_VAL}) {
    values[4] = bad;
    CHECK_THROWS_SAYING(FormatError, finite_matrix_of<float>(tensor, "f"),
                        "f: tensor \"w\": expected finite values, got a NaN or an infinity");
  }
  tensor.shape = {0, 3};
  tensor.bytes = {};
  CHECK(finite_matrix_of<float>(tensor, "f").cols() == 3);
}

TEST_CASE("elements are used in place only where their type and address allow it") {
  const std::vector<float> values{1, 2, 3};
  TensorView tensor = tensor_view("w", values);
  CHECK(elements_in_place<float>(tensor) == values.data());
  CHECK(elements_in_place<double>(tensor) == nullptr);
  for (const std::size_t offset : {1u, 2u, 3u}) {
    TensorView moved = tensor;
    moved.bytes = tensor.bytes.subspan(offset, 4);
    CHECK(elements_in_place<float>(moved) == nullptr);
  }
  tensor.dtype = DType::I32;
  CHECK(elements_in_place<float>(tensor) == nullptr);
}

TEST_CASE("a view of a matrix or a vector says its type, shape and bytes") {
  const RowMatrix<double> matrix = RowMatrix<double>::Random(3, 2);
  const TensorView of_matrix = tensor_view("m", matrix);
  CHECK((of_matrix.name == "m" && of_matrix.dtype == DType::F64 && of_matrix.shape == std::vector<Index>{3, 2}));
  CHECK((of_matrix.bytes.size() == 48 && static_cast<const void*>(of_matrix.bytes.data()) == matrix.data()));
  const std::vector<std::uint64_t> states{1, 2, 3, 4};
  const TensorView of_vector = tensor_view("v", states);
  CHECK((of_vector.dtype == DType::U64 && of_vector.shape == std::vector<Index>{4} && of_vector.bytes.size() == 32));
  CHECK(tensor_view("v", std::vector<float>{}).dtype == DType::F32);
  CHECK(tensor_view("v", std::vector<std::int64_t>{}).dtype == DType::I64);
  CHECK(tensor_view("v", std::vector<std::uint8_t>{}).dtype == DType::U8);
}

TEST_CASE("a tensor that owns its values is viewed in the shape that it says") {
  const OwnedTensor tensor{"w", {3, 2, 1}, RowMatrix<double>(RowMatrix<double>::Random(3, 2))};
  const TensorView view = tensor.view();
  CHECK((view.name == "w" && view.dtype == DType::F64 && view.shape == std::vector<Index>{3, 2, 1} && view.bytes.size() == 48));
  CHECK(finite_matrix_of<double>(view, "f") == std::get<RowMatrix<double>>(tensor.values));
  CHECK(OwnedTensor{"w", {1}, RowMatrix<float>(RowMatrix<float>::Zero(1, 1))}.view().dtype == DType::F32);
}

TEST_CASE("a scalar has one element, and a shape with a 0 none, whatever else is in it") {
  constexpr Index large = Index{1} << 48;
  CHECK(element_count(std::vector<Index>{}) == 1);
  CHECK(element_count(std::vector<Index>{2, 3, 4}) == 24);
  CHECK(element_count(std::vector<Index>{0, large, large}) == 0);
  CHECK(element_count(std::vector<Index>{large, large, 0}) == 0);
  CHECK(TensorView{"t", DType::F32, {large, large, 0}, {}}.size() == 0);
  CHECK(bit_count(DType::F32, std::vector<Index>{}) == 32u);
  CHECK(bit_count(DType::F4, std::vector<Index>{3}) == 12u);
  CHECK(bit_count(DType::F64, std::vector<Index>{large, large, 0}) == 0u);
  CHECK(bit_count(DType::U8, std::vector<Index>{large, 8191}) == std::uint64_t{8191} << 51);
  CHECK(!bit_count(DType::U8, std::vector<Index>{large, 8192}));
  CHECK(!bit_count(DType::U8, std::vector<Index>{large, large}));
}

TEST_CASE("a shape reads as its extents") {
  CHECK(describe_shape(std::vector<Index>{}) == "a scalar");
  CHECK(describe_shape(std::vector<Index>{5}) == "5");
  CHECK(describe_shape(std::vector<Index>{2, 0, 3}) == "2 × 0 × 3");
  const TensorView tensor{"t", DType::BF16, {2, 3}, {}};
  CHECK(describe_tensor(&tensor) == "BF16 2 × 3");
  CHECK(describe_tensor(nullptr) == "none");
}

}  // namespace dylora::test
