#ifndef DYLORA_EXAMPLES_PRETRAINED_UNICODE_HPP
#define DYLORA_EXAMPLES_PRETRAINED_UNICODE_HPP

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <span>
#include <string_view>

#include "pretrained/unicode_ranges.hpp"

/// Text as code points, as far as splitting it into tokens needs them.
namespace pretrained {

/// The ranges must be ascending.
inline bool is_in(std::span<const CodePointRange> ranges, char32_t c) {
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), c, [](char32_t value, CodePointRange r) { return value < r.first; });
  return after != ranges.begin() && c <= std::prev(after)->last;
}

/// \p{L}
inline bool is_letter(char32_t c) { return is_in(letter_ranges, c); }

/// \p{N}
inline bool is_number(char32_t c) { return is_in(number_ranges, c); }

/// \s
inline bool is_space(char32_t c) { return is_in(space_ranges, c); }

struct CodePoint {
  char32_t value;
  std::size_t bytes;  ///< how many it takes in UTF-8
};

/// The first code point of any bytes but none. A byte that begins no well-formed sequence (RFC 3629, so no overlong form, no surrogate,
/// nothing past U+10FFFF) is a unit of its own, read as U+FFFD, the replacement character: neither letter, number nor space.
inline CodePoint first_code_point(std::string_view text) {
  constexpr CodePoint not_utf8{0xFFFD, 1};
  constexpr char32_t smallest[] = {0, 0, 0x80, 0x800, 0x10000};  // that needs so many bytes
  const auto lead = static_cast<unsigned char>(text[0]);
  if (lead < 0x80) return {lead, 1};
  const std::size_t bytes = lead < 0xC0 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF8 ? 4 : 0;
  if (bytes == 0 || text.size() < bytes) return not_utf8;
  char32_t value = lead & (0x7Fu >> bytes);
  for (const char c : text.substr(1, bytes - 1)) {
    const auto byte = static_cast<unsigned char>(c);
    if ((byte & 0xC0u) != 0x80u) return not_utf8;
    value = value << 6 | (byte & 0x3Fu);
  }
  const bool surrogate = value >= 0xD800 && value <= 0xDFFF;
  return value < smallest[bytes] || surrogate || value > 0x10FFFF ? not_utf8 : CodePoint{value, bytes};
}

}  // namespace pretrained

#endif
