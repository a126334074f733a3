#ifndef DYLORA_IO_CHECKPOINT_VALUES_HPP
#define DYLORA_IO_CHECKPOINT_VALUES_HPP

#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/io/bytes/json.hpp"
#include "dylora/io/bytes/tensor.hpp"

/// How the single values of a checkpoint are written: as JSON, one entry of the file's metadata for each.
namespace dylora::detail {

struct AnyValue {
  void operator()(const auto&) const {}
};

template <class T>
concept ArchivedScalar = std::integral<T> || std::same_as<T, double> || std::same_as<T, std::string>;

template <class E>
inline constexpr bool is_archived_element =
    std::same_as<E, float> || std::same_as<E, double> || (std::integral<E> && sizeof(E) == sizeof(std::int64_t));

template <class T>
concept ArchivedVector = is_archived_element<typename T::value_type> && std::same_as<T, std::vector<typename T::value_type>>;

template <class E>
inline constexpr DType element_dtype = std::signed_integral<E> ? DType::I64 : DType::U64;
template <std::floating_point E>
inline constexpr DType element_dtype<E> = dtype_v<E>;

/// Text that may hold anything, as a message may show it.
inline std::string printable(std::string_view text) {
  const std::string quoted = in_quotes(text);
  const bool cut = quoted.ends_with("...");
  return quoted.substr(1, quoted.size() - (cut ? 5 : 2)) + (cut ? "..." : "");
}

template <class T>
std::string kind_of() {
  if constexpr (std::same_as<T, bool>) return "a boolean";
  if constexpr (std::integral<T>) return "an integer of " + std::to_string(8 * sizeof(T)) + " bits";
  return std::same_as<T, double> ? "a number" : "text";
}

template <class T>
void require_finite(const std::string& path, const T& value) {
  if constexpr (std::floating_point<T>) {
    if (!std::isfinite(value)) {
      throw NonFiniteError("checkpoint: " + printable(path) + ": expected a finite number, got " + std::to_string(value));
    }
  }
}

/// The value as JSON, from which exactly the value can be read; what JSON has no number for as a string. Throws std::invalid_argument for
/// text that is not UTF-8.
template <class T>
std::string archived_text(const std::string& path, const T& value) {
  if constexpr (std::floating_point<T>) {
    if (!std::isfinite(value)) return archived_text(path, std::to_string(value));
  }
  try {
    return nlohmann::json(value).dump();
  } catch (const nlohmann::json::type_error&) {
    throw std::invalid_argument("checkpoint: " + printable(path) + ": expected text in UTF-8, got other bytes");
  }
}

/// More than any single value takes. What is longer is not worth the memory that JSON takes to be parsed.
inline constexpr std::size_t most_archived_text = std::size_t{1} << 20;

/// Throws std::invalid_argument for text that archived_value would refuse for its size.
inline void require_readable(const std::string& path, const std::string& text) {
  if (text.size() <= most_archived_text) return;
  throw std::invalid_argument("checkpoint: " + printable(path) + ": expected a value of at most " + std::to_string(most_archived_text) +
                              " bytes in JSON, got " + std::to_string(text.size()));
}

/// What archived_text was given, or none if that was no T or is longer than most_archived_text.
template <ArchivedScalar T>
std::optional<T> archived_value(const std::string& text) {
  if (text.size() > most_archived_text) return std::nullopt;
  nlohmann::json value;
  try {
    value = parse_json(text, "");
  } catch (const FormatError&) {
    return std::nullopt;
  }
  if constexpr (std::same_as<T, bool>) {
    if (value.is_boolean()) return value.get<bool>();
  } else if constexpr (std::same_as<T, double>) {
    if (value.is_number_float()) return value.get<double>();
  } else if constexpr (std::same_as<T, std::string>) {
    if (value.is_string()) return value.get<std::string>();
  } else if (value.is_number_unsigned()) {
    if (std::in_range<T>(value.get<std::uint64_t>())) return value.get<T>();
  } else if (value.is_number_integer() && std::in_range<T>(value.get<std::int64_t>())) {
    return value.get<T>();
  }
  return std::nullopt;
}

}  // namespace dylora::detail

#endif
