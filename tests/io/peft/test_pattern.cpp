#include "dylora/io/peft/pattern.hpp"

#include <string>

#include "support/catch.hpp"
#include "support/throws.hpp"

namespace dylora::test {

TEST_CASE("a PEFT pattern matches a whole path, or what follows one of its dots") {
  const struct {
    const char *key, *path;
    bool matches;
  } cases[] = {
      {"q_proj", "q_proj", true},
      {"q_proj", "h.0.attn.q_proj", true},
      {"q_proj", "h.0.attn.my_q_proj", false},
      {"q_proj", "q_proj.inner", false},
      {"attn.q_proj", "h.0.attn.q_proj", true},
      {"attn.q_proj", "h.0.attn_q_proj", true},
      {R"(attn\.q_proj)", "h.0.attn_q_proj", false},
      {"0.attn", "h.0xattn", true},
      {R"(0\.attn)", "h.0xattn", false},
      {R"(^h\.0\.attn)", "h.0.attn", true},
      {R"(^h\.0\.attn)", "decoder.h.0.attn", false},
      {R"(h\.0\.attn$)", "decoder.h.0.attn", true},
      {R"(h\.[01]\..*)", "h.1.mlp.fc", true},
      {R"(h\.[01]\..*)", "h.2.mlp.fc", false},
      {R"(h\.[^01]\.fc)", "h.2.fc", true},
      {R"(h\.[^01]\.fc)", "h.0.fc", false},
      {R"(h\.[0-35-7]\.fc)", "h.3.fc", true},
      {R"(h\.[0-35-7]\.fc)", "h.4.fc", false},
      {R"([\w-]+)", "a.b-c_1", true},
      {R"([.\]-]+)", "]-.", true},
      {R"(h\.\d+\.fc)", "h.17.fc", true},
      {R"(h\.\d+\.fc)", "h..fc", false},
      {R"(h\.\d*\.fc)", "h..fc", true},
      {R"(h\.\D\.fc)", "h.0.fc", false},
      {R"(\w\s\S)", "a b", true},
      {R"(\W)", "-", true},
      {"colou?r", "color", true},
      {"colou?r", "colouur", false},
      {"q_proj|v_proj", "h.v_proj", true},
      {"^h.q|^v", "h.v", false},
      {"(q|k|v|o)_proj", "h.o_proj", true},
      {"(?:q|k)_proj", "h.v_proj", false},
      {"(ab)+", "ababab", true},
      {"(ab)+", "aba", false},
      {"(a|b)*c", "abbac", true},
      {"(a*)*b", "aaab", true},
      {"(|a)+", "x.aa", true},
      {"a+?b*?c??", "aabb", true},
      {"()", "a.b", false},
      {"", "a.b", false},
      {"", "a.", true},
      {".*", "anything at all", true},
      {"a|", "b", false},
      {R"(a\-b\_c\/d)", "a-b_c/d", true},
      {"é", "h.é", true},
      {"é+", "éé", true},
      {"..", "é€", true},
      {"...", "é€", false},
      {"è", "é", false},
      {R"(mod\wle)", "modèle", true},
      {R"(mod\Wle)", "modèle", false},
      {R"(mod[^a-z]le)", "modèle", true},
      {R"(mod[a-z]le)", "modèle", false},
  };
  for (const auto& [key, path, matches] : cases) {
    INFO(key << " on " << path);
    const PeftPattern pattern{key};
    CHECK(pattern.unsupported() == "");
    CHECK(pattern.matches(path) == matches);
  }
}

TEST_CASE("a PEFT pattern of one path matches that path alone") {
  for (const std::string path : {"transformer.h.0.attn.q_proj", "a-b.(c)+[d]*{e}", "x", R"(\d^$|?)", "modèle.q"}) {
    const PeftPattern pattern(PeftPattern::exactly(path));
    CHECK(pattern.unsupported() == "");
    CHECK(pattern.matches(path));
    CHECK_FALSE(pattern.matches("encoder." + path));
    CHECK_FALSE(pattern.matches(path + "x"));
    CHECK_FALSE(pattern.matches(path.substr(1)));
  }
  CHECK(PeftPattern::exactly("h.0.q_proj") == R"(^h\.0\.q_proj)");
}

TEST_CASE("a PEFT pattern that is not understood says what is in it, and refuses to match") {
  const struct {
    std::string key;
    const char* why;
  } cases[] = {
      {"a{2}", "braces"},
      {"(?i)a", "(?"},
      {"(?=a)", "(?"},
      {R"((a)\1)", R"(\1)"},
      {R"(\bfc)", R"(\b)"},
      {R"(fc\Z)", R"(\Z)"},
      {"*a", "repetition of nothing"},
      {"a|+", "repetition of nothing"},
      {"a**", "repetition of a repetition"},
      {"a++", "repetition of a repetition"},
      {"^*a", "^"},
      {"(a", "("},
      {"a)", ")"},
      {"[a", "end"},
      {"[", "end"},
      {"[]a]", "]"},
      {"[b-a]", "high to low"},
      {R"([\d-z])", "class"},
      {R"([a-\d])", R"(\d)"},
      {"[é]", "ASCII"},
      {"a\\", "end"},
      {"[a\\", "end"},
      {std::string(60, '(') + std::string(60, ')'), "50"},
      {std::string(PeftPattern::longest_key + 1, 'a'), "1000"},
  };
  for (const auto& [key, why] : cases) {
    INFO(key);
    const PeftPattern pattern(key);
    CHECK(pattern.unsupported() != "");
    CHECK_THROWS_SAYING(std::invalid_argument, pattern.matches("a"), "PeftPattern", why);
  }
}

// A matcher that goes back would not come to an end here.
TEST_CASE("no PEFT pattern makes matching slow") {
  const std::string path(2000, 'a');
  for (const char* key : {"(a*)*b", "(a|a)*b", "(a|aa)+b", "(.*.*.*.*)*b", "((a?)*)*b"}) CHECK_FALSE(PeftPattern(key).matches(path));
  std::string nested = "a";
  for (int i = 0; i < 40; ++i) nested = "(" + nested + ")*";
  CHECK_FALSE(PeftPattern(nested + "b").matches(path));
}

}  // namespace dylora::test
