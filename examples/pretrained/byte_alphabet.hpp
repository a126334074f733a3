#ifndef DYLORA_EXAMPLES_PRETRAINED_BYTE_ALPHABET_HPP
#define DYLORA_EXAMPLES_PRETRAINED_BYTE_ALPHABET_HPP

#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "pretrained/unicode.hpp"

namespace pretrained {

/// GPT-2's files write every byte as one visible character: as the Latin-1 character that it is where that is visible, the others in order
/// as U+0100, U+0101 and so on. The byte of each code point, -1 where there is none.
inline constexpr auto byte_of_character = [] {
  std::array<int, 256 + 68> bytes{};
  bytes.fill(-1);
  std::size_t next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool visible = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
    bytes[visible ? static_cast<std::size_t>(byte) : next++] = byte;
  }
  return bytes;
}();

/// The bytes that a key of vocab.json stands for; none if one of its characters stands for no byte.
inline std::optional<std::string> bytes_of(std::string_view key) {
  std::string bytes;
  while (!key.empty()) {
    const CodePoint c = first_code_point(key);
    const int byte = c.value < byte_of_character.size() ? byte_of_character[c.value] : -1;
    if (byte < 0) return std::nullopt;
    bytes += static_cast<char>(byte);
    key.remove_prefix(c.bytes);
  }
  return bytes;
}

}  // namespace pretrained

#endif
