#ifndef DYLORA_EXAMPLES_PRETRAINED_PRE_TOKENS_HPP
#define DYLORA_EXAMPLES_PRETRAINED_PRE_TOKENS_HPP

#include <cstddef>
#include <string_view>
#include <vector>

#include "pretrained/unicode.hpp"

namespace pretrained {

enum class CharacterKind { letter, number, space, other };

inline CharacterKind kind_of(char32_t c) {
  if (is_letter(c)) return CharacterKind::letter;
  if (is_number(c)) return CharacterKind::number;
  return is_space(c) ? CharacterKind::space : CharacterKind::other;
}

/// The characters of one kind that a text begins with.
struct Run {
  std::size_t bytes = 0;
  std::size_t last = 0;  ///< where the last of them begins
};

inline Run first_run(std::string_view text, CharacterKind kind) {
  Run run;
  while (run.bytes < text.size()) {
    const CodePoint c = first_code_point(text.substr(run.bytes));
    if (kind_of(c.value) != kind) break;
    run.last = run.bytes;
    run.bytes += c.bytes;
  }
  return run;
}

/// The first of GPT-2's pre-tokens of a text that is not empty, the pieces that no token reaches across. It is what this regular expression
/// matches, whose alternatives are tried from left to right:
///
///     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
///
/// So a word, a number or a run of signs takes the one blank before it with it, and other white space leaves it that blank.
inline std::string_view first_pre_token(std::string_view text) {
  for (const std::string_view ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}) {
    if (text.starts_with(ending)) return text.substr(0, ending.size());
  }
  const std::size_t blank = text[0] == ' ' && text.size() > 1 ? 1 : 0;
  const std::string_view body = text.substr(blank);
  const CharacterKind kind = kind_of(first_code_point(body).value);
  if (kind != CharacterKind::space) return text.substr(0, blank + first_run(body, kind).bytes);
  const Run spaces = first_run(text, CharacterKind::space);
  const bool nothing_follows = spaces.bytes == text.size(), only_one = spaces.last == 0;
  return text.substr(0, nothing_follows || only_one ? spaces.bytes : spaces.last);
}

/// All pre-tokens, in order: views of `text`, joined they are it.
inline std::vector<std::string_view> split(std::string_view text) {
  std::vector<std::string_view> result;
  for (; !text.empty(); text.remove_prefix(result.back().size())) result.push_back(first_pre_token(text));
  return result;
}

}  // namespace pretrained

#endif
