#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "pretrained/tokenizer.hpp"

namespace {

using pretrained::Tokenizer;

/// All bytes, and the words of up to four letters a and b.
std::string small_vocabulary() {
  nlohmann::json vocabulary;
  const auto add = [&](const std::string& key) { vocabulary.emplace(key, vocabulary.size()); };
  for (std::size_t c = 0; c < pretrained::byte_of_character.size(); ++c) {
    if (pretrained::byte_of_character[c] < 0) continue;
    add(c < 0x80 ? std::string(1, static_cast<char>(c))
                 : std::string{static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))});
  }
  for (unsigned length = 2; length <= 4; ++length) {
    for (unsigned bits = 0; bits < 1u << length; ++bits) {
      std::string word;
      for (unsigned i = 0; i < length; ++i) word += bits >> i & 1 ? 'b' : 'a';
      add(word);
    }
  }
  return vocabulary.dump();
}

void check_round_trip(const Tokenizer& tokenizer, std::string_view text) {
  if (tokenizer.decode(tokenizer.encode(text)) != text) std::abort();
}

}  // namespace

/// The first byte says what the others are: a text, a vocabulary, or merges and a text after a zero byte.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::string vocabulary = small_vocabulary();
  static const Tokenizer tokenizer(vocabulary, "b a\na a\naa aa\naa b\nb b\nb aa\n");
  if (size == 0) return 0;
  const std::string_view input(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    switch (data[0] % 3) {
      case 0: check_round_trip(tokenizer, input); break;
      case 1: check_round_trip(Tokenizer(input, ""), input); break;
      default:
        const std::size_t end = std::min(input.find('\0'), input.size());
        check_round_trip(Tokenizer(vocabulary, input.substr(0, end)), input.substr(end));
    }
  } catch (const dylora::FormatError&) {  // is what malformed files are for
  }
  return 0;
}
