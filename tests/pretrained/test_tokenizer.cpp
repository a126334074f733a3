#include "pretrained/tokenizer.hpp"

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "dylora/core/random.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"
#include "support/throws.hpp"

namespace pretrained {

namespace {

using dylora::FileError;
using dylora::Rng;
using dylora::test::contents_of;
using dylora::test::put;
using dylora::test::TemporaryFolder;
using nlohmann::json;

const std::string golden_folder = DYLORA_GOLDEN_DIR "/tokenizer";

std::string from_hex(const std::string& digits) {
  std::string bytes;
  for (std::size_t i = 0; i < digits.size(); i += 2) bytes += static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16));
  return bytes;
}

std::string text_of(const json& golden_case) {
  return golden_case.contains("text") ? golden_case["text"].get<std::string>() : from_hex(golden_case.at("hex"));
}

std::vector<std::size_t> lengths(const std::vector<std::string_view>& pieces) {
  std::vector<std::size_t> result;
  for (const std::string_view piece : pieces) result.push_back(piece.size());
  return result;
}

/// The id of every byte is its value; then come these.
json vocabulary_with(const std::vector<std::string>& tokens) {
  json vocabulary;
  unsigned next = 256;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool visible = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    const unsigned c = visible ? byte : next++;
    const std::string key = c < 0x80 ? std::string(1, static_cast<char>(c))
                                     : std::string{static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
    vocabulary[key] = byte;
  }
  for (const std::string& token : tokens) vocabulary[token] = vocabulary.size();
  return vocabulary;
}

using Merges = std::vector<std::pair<std::string, std::string>>;

std::string lines_of(const Merges& merges) {
  std::string lines;
  for (const auto& [left, right] : merges) lines += left + ' ' + right + '\n';
  return lines;
}

/// A pre-token's tokens by the definition: as long as neighbours can be merged, all pairs of the lowest rank are, from left to right.
std::vector<std::string> merged_by_definition(std::string_view pre_token, const Merges& merges) {
  std::vector<std::string> symbols;
  for (const char c : pre_token) symbols.emplace_back(1, c);
  const auto is_pair = [&](const auto& merge) {
    return std::adjacent_find(symbols.begin(), symbols.end(), [&](const auto& l, const auto& r) { return std::pair(l, r) == merge; }) !=
           symbols.end();
  };
  for (auto merge = merges.begin(); (merge = std::find_if(merges.begin(), merges.end(), is_pair)) != merges.end();) {
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      if (symbols[i] != merge->first || symbols[i + 1] != merge->second) continue;
      symbols[i] += symbols[i + 1];
      symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(i) + 1);
    }
  }
  return symbols;
}

/// Often well-formed UTF-8, often not.
std::string random_bytes(Rng& rng) {
  static constexpr std::string_view pieces[] = {
      "a", "The", "'s", "'", "7", " ", "  ", "\n", "\r\n", "\xc2\xa0", "\xe3\x80\x80", "\xf0\x9f\x99\x82"};
  std::string bytes;
  for (Index i = rng.below(40); i > 0; --i) {
    if (rng.below(2) == 0) {
      bytes += static_cast<char>(rng.below(256));
    } else {
      bytes += pieces[rng.below(static_cast<Index>(std::size(pieces)))];
      if (rng.below(4) == 0) bytes.pop_back();
    }
  }
  return bytes;
}

}  // namespace

TEST_CASE("Pre-tokens and tokens are those of the golden files", "[tokenizer]") {
  const auto tokenizer = Tokenizer::from_folder(golden_folder);
  const json golden = json::parse(contents_of(golden_folder + "/cases.json"));
  REQUIRE(golden.at("cases").size() > 200);
  for (const json& golden_case : golden["cases"]) {
    INFO(golden_case.dump());
    const std::string text = text_of(golden_case);
    CHECK(lengths(split(text)) == golden_case.at("lengths").get<std::vector<std::size_t>>());
    CHECK(tokenizer.encode(text) == golden_case.at("ids").get<std::vector<Index>>());
    CHECK(tokenizer.decode(golden_case.at("ids").get<std::vector<Index>>()) == text);
  }
}

TEST_CASE("Any bytes come back from their tokens, and pre-tokens are encoded one by one", "[tokenizer]") {
  const auto tokenizer = Tokenizer::from_folder(golden_folder);
  Rng rng(1);
  for (int i = 0; i < 2000; ++i) {
    const std::string text = random_bytes(rng);
    INFO(dylora::in_quotes(text));
    const std::vector<Index> ids = tokenizer.encode(text);
    CHECK(tokenizer.decode(ids) == text);
    std::vector<Index> piecewise;
    std::string joined;
    for (const std::string_view piece : split(text)) {
      CHECK_FALSE(piece.empty());
      joined += piece;
      for (const Index id : tokenizer.encode(piece)) piecewise.push_back(id);
    }
    CHECK(joined == text);
    CHECK(piecewise == ids);
  }
}

TEST_CASE("Merges are made in the order of their ranks, whichever way they depend on each other", "[tokenizer]") {
  Rng rng(2);
  for (int i = 0; i < 300; ++i) {
    std::set<std::string> strings{"a", "b", "c"};
    const auto random_string = [&](Index length) {
      std::string result;
      for (; length > 0; --length) result += static_cast<char>('a' + rng.below(3));
      return result;
    };
    for (int j = 0; j < 25; ++j) strings.insert(random_string(2 + rng.below(4)));
    Merges merges;
    for (const std::string& whole : strings) {
      for (std::size_t cut = 1; cut < whole.size(); ++cut) {
        if (strings.contains(whole.substr(0, cut)) && strings.contains(whole.substr(cut))) {
          const auto place = rng.below(static_cast<Index>(merges.size()) + 1);
          merges.insert(merges.begin() + place, {whole.substr(0, cut), whole.substr(cut)});
        }
      }
    }
    for (const char* byte : {"a", "b", "c"}) strings.erase(byte);
    const Tokenizer tokenizer(vocabulary_with({strings.begin(), strings.end()}).dump(), lines_of(merges));
    for (int j = 0; j < 5; ++j) {
      const std::string text = random_string(1 + rng.below(40));
      INFO(text << " with\n" << lines_of(merges));
      std::vector<std::string> tokens;
      for (const Index id : tokenizer.encode(text)) tokens.push_back(tokenizer.decode(std::vector{id}));
      CHECK(tokens == merged_by_definition(text, merges));
    }
  }
}

TEST_CASE("The token at the end of a text is known, and never made from text", "[tokenizer]") {
  const auto tokenizer = Tokenizer::from_folder(golden_folder);
  REQUIRE(tokenizer.end_of_text() == tokenizer.size() - 1);
  CHECK(tokenizer.decode(std::vector{*tokenizer.end_of_text()}) == "<|endoftext|>");
  const std::vector<Index> ids = tokenizer.encode("one<|endoftext|>two <|endoftext|>");
  CHECK(std::find(ids.begin(), ids.end(), *tokenizer.end_of_text()) == ids.end());
  CHECK(Tokenizer(vocabulary_with({}).dump(), "").end_of_text() == std::nullopt);
}

TEST_CASE("A pre-token of a megabyte is encoded", "[tokenizer]") {
  constexpr std::size_t n = 1 << 20;
  const Tokenizer doubling(vocabulary_with({"aa", "aaaa", "aaaaaaaa"}).dump(), "a a\naa aa\naaaa aaaa\n");
  const std::string letters(n, 'a'), spaces(n, ' ');
  CHECK(doubling.encode(letters) == std::vector<Index>(n / 8, 258));
  CHECK(split(letters).size() == 1);
  const auto tokenizer = Tokenizer::from_folder(golden_folder);
  CHECK(tokenizer.decode(tokenizer.encode(letters)) == letters);
  CHECK(tokenizer.decode(tokenizer.encode(spaces)) == spaces);
  CHECK(split(spaces).size() == 1);
  CHECK(lengths(split(spaces + 'a')) == std::vector<std::size_t>{n - 1, 2});
}

TEST_CASE("Threads share a tokenizer", "[tokenizer]") {
  const auto tokenizer = Tokenizer::from_folder(golden_folder);
  const std::string text = contents_of(golden_folder + "/cases.json");
  const std::vector<Index> ids = tokenizer.encode(text);
  std::vector<std::vector<Index>> results(4);
  std::vector<std::thread> threads;
  for (auto& result : results) threads.emplace_back([&] { result = tokenizer.encode(text); });
  for (std::thread& thread : threads) thread.join();
  for (const auto& result : results) CHECK(result == ids);
  CHECK(tokenizer.decode(ids) == text);
}

TEST_CASE("A token outside the vocabulary is not decoded", "[tokenizer]") {
  const Tokenizer tokenizer(vocabulary_with({}).dump(), "");
  CHECK(tokenizer.size() == 256);
  CHECK_THROWS_SAYING(std::invalid_argument, tokenizer.decode(std::vector<Index>{7, 256}),
                      "Tokenizer::decode: token 1: expected a value in [0, 255], got 256");
  CHECK_THROWS_SAYING(std::invalid_argument, tokenizer.decode(std::vector<Index>{-1}), "token 0", "got -1");
}

TEST_CASE("merges.txt may have a version line, a blank last line, and either line ending", "[tokenizer]") {
  const std::string vocabulary = vocabulary_with({"ab", "abc", "#a"}).dump();
  const std::vector<Index> expected{257, 256};
  for (const char* merges : {"a b\nab c", "a b\nab c\n", "a b\nab c\n\n", "#version: 0.2\na b\nab c\n", "#version: 0.2\r\na b\r\nab c\r\n",
                             "a b\r\nab c\r\n\r\n", "# a\na b\nab c\n"}) {
    INFO(merges);
    CHECK(Tokenizer(vocabulary, merges).encode("abcab") == expected);
  }
  CHECK(Tokenizer(vocabulary, "").encode("ab") == std::vector<Index>{'a', 'b'});
  CHECK(Tokenizer(vocabulary, "#version: 0.2").encode("ab") == std::vector<Index>{'a', 'b'});
}

TEST_CASE("A vocabulary that is none is refused", "[tokenizer]") {
  const auto refuse = [](const json& vocabulary, std::initializer_list<std::string_view> parts) {
    CHECK(dylora::test::wrong_throw<FormatError>([&] { Tokenizer(vocabulary.dump(), "", "folder/v.json"); }, parts) == "");
  };
  const auto with = [](const std::string& key, const json& id) {
    json vocabulary = vocabulary_with({"ab"});
    vocabulary[key] = id;
    return vocabulary;
  };
  refuse(json::array({"a", "b"}), {"folder/v.json: expected an object of tokens and their ids, got array"});
  refuse(nullptr, {"folder/v.json: expected an object", "got null"});
  refuse(json::object(), {"folder/v.json: expected a token for every byte, got none for byte 0"});
  refuse(with("ab", "1"), {"folder/v.json: key \"ab\": expected an id in [0, 256], got \"\"1\"\""});
  refuse(with("ab", -1), {"key \"ab\"", "got \"-1\""});
  refuse(with("ab", 256.0), {"key \"ab\"", "got \"256.0\""});
  refuse(with("ab", nullptr), {"key \"ab\"", "got \"null\""});
  refuse(with("ab", json::array({256})), {"key \"ab\"", "got \"[256]\""});
  refuse(with("ab", 257), {"key \"ab\": expected an id in [0, 256], got \"257\""});
  refuse(with("ab", 18446744073709551615u), {"key \"ab\"", "got \"18446744073709551615\""});
  refuse(with("ab", 97), {"folder/v.json: key \"ab\": expected an id of its own, got 97, which another token has as well"});
  refuse(with("a c", 257), {"folder/v.json: key \"a c\": expected characters of GPT-2's byte alphabet, at least one"});
  refuse(with("\u0144", 257), {"key \"\\xc5\\x84\": expected characters of GPT-2's byte alphabet"});
  refuse(with("灯", 257), {"key \"\\xe7\\x81\\xaf\": expected characters of GPT-2's byte alphabet"});
  refuse(with("\u00ad", 257), {"expected characters of GPT-2's byte alphabet"});
  refuse(with("", 257), {"key \"\": expected characters of GPT-2's byte alphabet, at least one"});
  json vocabulary = vocabulary_with({});
  vocabulary.erase("\u0120");  // the blank
  vocabulary["\u00ff"] = 32;
  refuse(vocabulary, {"folder/v.json: expected a token for every byte, got none for byte 32"});

  CHECK_THROWS_SAYING(FormatError, Tokenizer("{\"a\": 0, \"a\": 1}", ""), "vocab.json: ", "\"a\"");
  CHECK_THROWS_SAYING(FormatError, Tokenizer("{\"a\": 0", "", "v.json"), "v.json: ");
  CHECK_THROWS_SAYING(FormatError, Tokenizer("", ""), "vocab.json: ");
}

TEST_CASE("Merges that are none are refused, by their line", "[tokenizer]") {
  const std::string vocabulary = vocabulary_with({"ab", "abc", "bc"}).dump();
  const auto refuse = [&](std::string_view merges, std::initializer_list<std::string_view> parts) {
    CHECK(dylora::test::wrong_throw<FormatError>([&] { Tokenizer(vocabulary, merges, "v.json", "folder/m.txt"); }, parts) == "");
  };
  const std::string two_symbols = "expected two symbols separated by one space, got ";
  refuse("a b\nab\n", {"folder/m.txt: line 2: " + two_symbols + "\"ab\""});
  refuse("a b c\n", {"line 1: " + two_symbols + "\"a b c\""});
  refuse("a  b\n", {"line 1: " + two_symbols + "\"a  b\""});
  refuse(" a b\n", {"line 1: " + two_symbols});
  refuse("a b \n", {"line 1: " + two_symbols});
  refuse("a \n", {"line 1: " + two_symbols});
  refuse(" b\n", {"line 1: " + two_symbols});
  refuse(" \n", {"line 1: " + two_symbols});
  refuse("a\tb\n", {"line 1: " + two_symbols + "\"a\\x09b\""});
  refuse("\na b\n", {"line 1: " + two_symbols + "\"\""});
  refuse("a b\n\nab c\n", {"line 2: " + two_symbols + "\"\""});
  refuse("a b\n\n\n", {"line 2: " + two_symbols + "\"\""});
  refuse("a b\r\r\n", {"line 1: expected tokens of the vocabulary", "got \"b\\x0d\", which is none"});
  refuse("a b\n#version: 0.2\n", {"line 2: expected tokens of the vocabulary that make another, got \"#version:\", which is none"});
  refuse("a b\nabx c\n", {"folder/m.txt: line 2: expected tokens of the vocabulary that make another, got \"abx\", which is none"});
  refuse("a cb\n", {"line 1: expected tokens of the vocabulary", "got \"cb\""});
  refuse("a b\nb a\n", {"line 2: expected tokens of the vocabulary", "got \"ba\""});
  refuse("#version: 0.2\na b\nb c\na b\n", {"folder/m.txt: line 4: expected a merge of its own, got \"a b\" a second time"});
  CHECK_NOTHROW(Tokenizer(vocabulary, "a b\nb c\nab c\na bc\n"));  // two ways to one token are two merges
}

TEST_CASE("A folder's files are named by what is wrong with them", "[tokenizer]") {
  const TemporaryFolder folder;
  const std::string vocabulary = (folder / "vocab.json").string(), merges = (folder / "merges.txt").string();
  CHECK_THROWS_SAYING(FileError, Tokenizer::from_folder(folder.path()), vocabulary + ": cannot read");
  put(vocabulary, vocabulary_with({"ab"}).dump());
  CHECK_THROWS_SAYING(FileError, Tokenizer::from_folder(folder.path()), merges + ": cannot read");
  put(merges, "a b\na c\n");
  CHECK_THROWS_SAYING(FormatError, Tokenizer::from_folder(folder.path()), merges + ": line 2: ");
  put(vocabulary, "[]");
  CHECK_THROWS_SAYING(FormatError, Tokenizer::from_folder(folder.path()), vocabulary + ": expected an object");
}

}  // namespace pretrained
