#include "pretrained/unicode.hpp"

#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "support/catch.hpp"

namespace pretrained {

namespace {

std::vector<char32_t> code_points(std::string_view text) {
  std::vector<char32_t> result;
  while (!text.empty()) {
    const CodePoint c = first_code_point(text);
    result.push_back(c.value);
    text.remove_prefix(c.bytes);
  }
  return result;
}

}  // namespace

TEST_CASE("Letters, numbers and white space are those of the Unicode version that is named", "[unicode]") {
  const auto golden = nlohmann::json::parse(std::ifstream(DYLORA_GOLDEN_DIR "/tokenizer/cases.json"));
  CHECK(golden.at("unicode") == unicode_version);
  const auto check = [&](const char* kind, bool (*is_of_kind)(char32_t)) {
    INFO(kind);
    std::uint64_t count = 0, sum = 0;
    for (char32_t c = 0; c <= 0x10FFFF; ++c) {
      if (!is_of_kind(c)) continue;
      ++count;
      sum += c;
    }
    CHECK(golden.at(kind) == nlohmann::json{count, sum});
  };
  check("letters", is_letter);
  check("numbers", is_number);
  check("spaces", is_space);
  for (const char32_t c : {U'a', U'Z', U'é', U'ß', U'ж', U'灯', U'ª', U'ʰ'}) CHECK((is_letter(c) && !is_number(c) && !is_space(c)));
  for (const char32_t c : {U'0', U'9', U'²', U'½', U'Ⅷ', U'٣', U'〇'}) CHECK((is_number(c) && !is_letter(c) && !is_space(c)));
  for (const char32_t c : {U' ', U'\t', U'\v', U'\u0085', U'\u00a0', U'\u3000'}) CHECK((is_space(c) && !is_letter(c) && !is_number(c)));
  for (const char32_t c : {U'_', U'\'', U'\0', U'\x1c', U'\u200b', U'\u0301', U'\ufffd', char32_t{0xD800}, char32_t{0x110000}}) {
    CHECK_FALSE((is_letter(c) || is_number(c) || is_space(c)));
  }
}

TEST_CASE("UTF-8 of every length is read, up to its limits", "[unicode]") {
  CHECK(code_points("aé灯🙂") == std::vector<char32_t>{U'a', U'é', U'灯', U'🙂'});
  CHECK(code_points(std::string(1, '\0')) == std::vector<char32_t>{0});
  CHECK(code_points("\x7f\xc2\x80\xdf\xbf") == std::vector<char32_t>{0x7F, 0x80, 0x7FF});
  CHECK(code_points("\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xef\xbf\xbf") == std::vector<char32_t>{0x800, 0xD7FF, 0xE000, 0xFFFF});
  CHECK(code_points("\xf0\x90\x80\x80\xf4\x8f\xbf\xbf") == std::vector<char32_t>{0x10000, 0x10FFFF});
}

TEST_CASE("A byte that is not UTF-8 is a unit of its own", "[unicode]") {
  const auto bytes = GENERATE(values<std::string_view>({
      "\x80", "\xbf", "\xff", "\xc0\x80", "\xc1\xbf",      // continuation without a lead, never a byte of UTF-8, overlong
      "\xe0\x80\x80", "\xe0\x9f\xbf", "\xf0\x8f\xbf\xbf",  // overlong
      "\xed\xa0\x80", "\xed\xbf\xbf",                      // surrogates
      "\xf4\x90\x80\x80", "\xf7\xbf\xbf\xbf",              // past the last code point
      "\xf8\x88\x80\x80", "\xfe",                          // five and more bytes
      "\xc3", "\xe2\x82", "\xf0\x9f\x99"                   // ends early
  }));
  CHECK(code_points(bytes) == std::vector<char32_t>(bytes.size(), 0xFFFD));
  CHECK(code_points(std::string(bytes) + 'a') == [&] {
    std::vector<char32_t> expected(bytes.size(), 0xFFFD);
    expected.push_back('a');
    return expected;
  }());
}

}  // namespace pretrained
