#include "dylora/io/bytes/json.hpp"

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

std::string nested(int depth, std::string_view open, std::string_view inside, std::string_view close) {
  std::string text;
  for (int i = 0; i < depth; ++i) text += open;
  text += inside;
  for (int i = 0; i < depth; ++i) text += close;
  return text;
}

}  // namespace

TEST_CASE("a JSON text is read as the parser reads it") {
  for (const std::string_view text :
       {R"({"r":8,"lora_alpha":16.5,"modules":["q","v",[]],"none":null,"yes":true,"no":false,"in":{"a":{},"b":[{}]}})", "[]", "{}", "\"x\"",
        "-0", "17", "-17", "18446744073709551615", "-9223372036854775808", "1e308", "5e-324", "1e-999", "18446744073709551616", "null",
        " [ 1 , 2 ] \n", R"(["\u0000\ud83e\udd17\"\\\/\b\f\n\r\t",""])", R"({"":{"":0}})", R"([{"a":1},{"a":2}])",
        R"({"a":{"a":{"a":1}},"b":{"a":1}})"}) {
    INFO(text);
    const nlohmann::json expected = nlohmann::json::parse(text), got = parse_json(text, "f");
    CHECK(got == expected);
    CHECK(got.dump() == expected.dump());
  }
}

TEST_CASE("what is not JSON is refused with the name and the byte") {
  const std::vector<std::pair<std::string, std::string>> cases{{"", "byte 0"},
                                                               {"  ", "byte 2"},
                                                               {"{", "byte 1"},
                                                               {"[1,2", "byte 4"},
                                                               {"[1,2,]", "byte 5"},
                                                               {"{\"a\":1,}", "byte 7"},
                                                               {"{}x", "byte 2"},
                                                               {"{}{}", "byte 2"},
                                                               {"[] []", "byte 3"},
                                                               {"[01]", "byte 2"},
                                                               {"[+1]", "byte 1"},
                                                               {"[.5]", "byte 1"},
                                                               {"[1.]", "byte 3"},
                                                               {"['a']", "byte 1"},
                                                               {"/**/[]", "byte 0"},
                                                               {"[] //", "byte 3"},
                                                               {"[nul]", "byte 4"},
                                                               {"[NaN]", "byte 1"},
                                                               {"[Infinity]", "byte 1"},
                                                               {"{a:1}", "byte 1"},
                                                               {"{1:1}", "byte 1"},
                                                               {"\"a\nb\"", "byte 2"},
                                                               {"\"a", "byte 2"},
                                                               {"\"\xff\"", "byte 1"},
                                                               {"\"\xc0\x80\"", "byte 1"},
                                                               {"\"\xed\xa0\x80\"", "byte 2"},
                                                               {"\"\\ud800\"", "byte 7"},
                                                               {"\"\\x\"", "byte 2"}};
  for (const auto& refused : cases) {
    const std::string &text = refused.first, &byte = refused.second;
    INFO(text);
    CHECK_THROWS_SAYING(FormatError, parse_json(text, "dir/config.json"),
                        "dir/config.json: " + byte + ": expected JSON, got something else or its end");
  }
}

TEST_CASE("a byte order mark, a zero byte and a number beyond double's range are refused") {
  const auto refused = [](std::string_view text, std::string_view says) {
    return wrong_throw<FormatError>([&] { parse_json(text, "f"); }, {says});
  };
  CHECK(refused("\xef\xbb\xbf{}", "f: byte 0: expected JSON, got a byte order mark") == "");
  CHECK(refused(std::string_view("{}\0", 3), "f: byte 2: expected JSON, got a zero byte") == "");
  CHECK(refused(std::string_view("[\"\0\"]", 5), "f: byte 2: expected JSON, got a zero byte") == "");
  CHECK(refused("[1e999]", "f: byte 5: expected JSON, got a number that is too large") == "");
  CHECK(refused("{\"a\":-1e999}", "f: byte 10: expected JSON, got a number that is too large") == "");
}

TEST_CASE("a key that occurs twice in an object is refused, at any depth") {
  for (const std::string_view text : {R"({"a":1,"a":1})", R"({"a":1,"b":2,"\u0061":3})", R"([{"b":[{"a":[],"a":{}}]}])",
                                      R"({"x":{"a":null,"a":null}})", R"({"a":{},"b":{"a":0},"a":0})"}) {
    INFO(text);
    CHECK_THROWS_SAYING(FormatError, parse_json(text, "f"), "f: key \"a\": expected once in its object, got it twice");
  }
  CHECK_THROWS_SAYING(FormatError, parse_json(R"({"":1,"":1})", "f"), "f: key \"\": ");
}

TEST_CASE("JSON is read 64 deep and no deeper") {
  const std::string deeper = "f: expected JSON nested at most 64 deep, got more";
  CHECK(parse_json(nested(64, "[", "1", "]"), "f").dump() == nested(64, "[", "1", "]"));
  CHECK(parse_json(nested(64, R"({"a":)", "1", "}"), "f").dump() == nested(64, R"({"a":)", "1", "}"));
  CHECK_THROWS_SAYING(FormatError, parse_json(nested(65, "[", "", "]"), "f"), deeper);
  CHECK_THROWS_SAYING(FormatError, parse_json(nested(65, R"({"a":)", "1", "}"), "f"), deeper);
  CHECK_THROWS_SAYING(FormatError, parse_json(nested(100'000, "[", "", "]"), "f"), deeper);
  CHECK_THROWS_SAYING(FormatError, parse_json(nested(100'000, R"({"a":)", "", ""), "f"), deeper);
  CHECK_THROWS_SAYING(FormatError, parse_json(nested(50'000, R"([{"a":)", "", ""), "f"), deeper);
}

TEST_CASE("a JSON text may have as many bytes as the caller allows, and 64 MiB at most unless it says") {
  CHECK(parse_json("[1,23]", "f", 6).size() == 2);
  CHECK_THROWS_SAYING(FormatError, parse_json("[1,234]", "f", 6), "f: expected at most 6 bytes of JSON, got 7");
  const std::string large(std::size_t{64} << 20, ' ');
  CHECK_THROWS_SAYING(FormatError, parse_json(large, "f"), "f: byte 67108864: expected JSON");  // all of it was read
  CHECK_THROWS_SAYING(FormatError, parse_json(large + ' ', "f"), "f: expected at most 67108864 bytes of JSON, got 67108865");
}

}  // namespace dylora::test
