#ifndef DYLORA_IO_PEFT_PATTERN_HPP
#define DYLORA_IO_PEFT_PATTERN_HPP

#include <algorithm>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dylora {

/// A key of PEFT's rank_pattern or alpha_pattern: a regular expression that a module's path has to match, whole or after one of its dots.
/// In Python: re.match(rf"(.*\.)?({key})$", path).
///
///     PeftPattern("q_proj").matches("h.0.attn.q_proj")                      true
///     PeftPattern(R"(h\.[0-3]\..*_proj)").matches("decoder.h.4.q_proj")     false
///
/// Of Python's expressions it knows literals, `.`, \d \w \s and their opposites, [classes], (groups), `|`, `*` `+` `?`, `^` and `$`. All
/// that is beyond ASCII counts as letters. Matching takes time in proportion to the length of the path times that of the key, whatever the
/// key.
class PeftPattern {
 public:
  static constexpr std::size_t longest_key = 1000;

  /// Never throws for what the key holds: one that nobody asks about does no harm.
  explicit PeftPattern(std::string_view key) {
    try {
      if (key.size() > longest_key) throw Unsupported("more than 1000 characters");
      const std::u32string text = characters(key);
      Compiler compiler{text, program_};
      compiler.alternatives(0);
      if (!compiler.rest.empty()) throw Unsupported("a ) without its (");
      program_.steps.push_back({Step::matched});
    } catch (const Unsupported& error) {
      unsupported_ = error.what();
    }
  }

  /// What this key holds that is not known here, or "".
  const std::string& unsupported() const { return unsupported_; }

  /// Throws std::invalid_argument for an unsupported key.
  bool matches(std::string_view module) const {
    if (!unsupported_.empty())
      throw std::invalid_argument("PeftPattern: expected a simple regular expression, got one with " + unsupported_);
    const std::u32string path = characters(module);
    std::vector<std::size_t> now, next;
    std::vector<std::size_t> seen(program_.steps.size(), path.size() + 1);  // the position at which a step was last reached
    for (std::size_t i = 0; i <= path.size(); ++i) {
      if (i == 0 || path[i - 1] == '.') now.push_back(0);
      while (!now.empty()) {
        const std::size_t at = now.back();
        now.pop_back();
        if (std::exchange(seen[at], i) == i) continue;
        const Step& step = program_.steps[at];
        const auto go = [&](bool condition, int by = 1) {
          if (condition) now.push_back(static_cast<std::size_t>(static_cast<std::ptrdiff_t>(at) + by));
        };
        const bool last = i == path.size();
        switch (step.kind) {
          case Step::matched:
            if (last) return true;
            break;
          case Step::character:
            if (!last && accepts(step, path[i])) next.push_back(at + 1);
            break;
          case Step::begin: go(i == 0); break;
          case Step::end: go(last); break;
          case Step::jump: go(true, step.to); break;
          case Step::split: go(true, step.to); go(true, step.other);
        }
      }
      std::swap(now, next);
    }
    return false;
  }

  /// The key that matches this path alone.
  static std::string exactly(std::string_view path) {
    std::string key = "^";
    for (const char c : path) {
      if (!is_word(static_cast<unsigned char>(c))) key += '\\';
      key += c;
    }
    return key;
  }

 private:
  struct Unsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
  };

  /// A state of a machine that is in many states at once. Where it goes is said relative to the step itself.
  struct Step {
    enum Kind : std::uint8_t { character, split, jump, begin, end, matched } kind;
    enum What : std::uint8_t { literal, any, set } what = literal;
    char32_t value = 0;
    int to = 0, other = 0;  // of a set: its index
  };
  using Set = std::bitset<129>;  // of ASCII, and whether all that is beyond belongs

  struct Program {
    std::vector<Step> steps;
    std::vector<Set> sets;
  };

  /// One number for each character of a UTF-8 text: its bytes.
  static std::u32string characters(std::string_view text) {
    std::u32string result;
    for (const char c : text) {
      const auto byte = static_cast<unsigned char>(c);
      const bool continues = byte >= 0x80 && byte < 0xc0 && !result.empty() && result.back() >= 0xc0 && result.back() < 0x1000000;
      if (continues) {
        result.back() = result.back() << 8 | byte;
      } else {
        result.push_back(byte);
      }
    }
    return result;
  }

  bool accepts(const Step& step, char32_t c) const {
    if (step.what == Step::literal) return c == step.value;
    return step.what == Step::any ? c != '\n' : program_.sets[static_cast<std::size_t>(step.to)].test(std::min<std::size_t>(c, 128));
  }

  static bool is_digit(char32_t c) { return c >= '0' && c <= '9'; }
  static bool is_word(char32_t c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || is_digit(c) || c == '_' || c >= 128; }

  /// Recursive descent: each function takes what it reads off `rest` and adds its steps to the program.
  struct Compiler {
    std::u32string_view rest;
    Program& program;

    /// a|b|c  as  split(a, or else: split(b, or else: c)), with a jump to the end behind a and b.
    void alternatives(int depth) {
      constexpr int deepest = 50;
      if (depth > deepest) throw Unsupported("groups nested more than 50 deep");
      std::size_t start = size();
      sequence(depth);
      std::vector<std::size_t> jumps;
      while (take_if('|')) {
        insert(start, {.kind = Step::split, .to = 1, .other = since(start) + 2});
        jumps.push_back(size());
        program.steps.push_back({.kind = Step::jump});
        start = size();
        sequence(depth);
      }
      for (const std::size_t jump : jumps) program.steps[jump].to = since(jump);
    }

    void sequence(int depth) {
      while (!rest.empty() && rest.front() != '|' && rest.front() != ')') {
        const std::size_t start = size();
        const bool assertion = rest.front() == '^' || rest.front() == '$';
        atom(depth);
        if (repeated() && assertion) throw Unsupported("a repeated ^ or $");
        if (repeated()) repetition(start);
      }
    }

    bool repeated() const { return !rest.empty() && (rest.front() == '*' || rest.front() == '+' || rest.front() == '?'); }

    /// Of the atom whose steps begin at `start`.
    void repetition(std::size_t start) {
      const char32_t sign = take();
      take_if('?');  // which of several matches is found does not matter
      if (repeated()) throw Unsupported("a repetition of a repetition");
      if (sign == '+') return program.steps.push_back({.kind = Step::split, .to = -since(start), .other = 1});
      insert(start, {.kind = Step::split, .to = 1, .other = since(start) + (sign == '*' ? 2 : 1)});
      if (sign == '*') program.steps.push_back({.kind = Step::jump, .to = -since(start)});
    }

    void atom(int depth) {
      const char32_t c = take();
      switch (c) {
        case '.': return program.steps.push_back({.kind = Step::character, .what = Step::any});
        case '^': return program.steps.push_back({.kind = Step::begin});
        case '$': return program.steps.push_back({.kind = Step::end});
        case '[': return any_of(bracketed());
        case '(':
          if (take_if('?') && !take_if(':')) throw Unsupported("a group with (?");
          alternatives(depth + 1);
          if (!take_if(')')) throw Unsupported("a ( without its )");
          return;
        case '\\': {
          const char32_t escaped = take();
          const std::optional<Set> set = named_set(escaped);
          return set ? any_of(*set) : literal(unescaped(escaped));
        }
        case '*':
        case '+':
        case '?': throw Unsupported("a repetition of nothing");
        case '{': throw Unsupported("a repetition in braces");
        default: return literal(c);
      }
    }

    /// What follows a [, up to its ].
    Set bracketed() {
      Set set;
      const bool negated = take_if('^');
      if (rest.starts_with(']')) throw Unsupported("a ] that begins a class");
      while (!take_if(']')) {
        char32_t first = take();
        const std::optional<Set> named = first == '\\' && !rest.empty() ? named_set(rest.front()) : std::nullopt;
        if (first == '\\') first = named ? take() : unescaped(take());
        char32_t last = first;
        if (rest.starts_with('-') && !rest.starts_with(U"-]")) {
          if (named) throw Unsupported("a range that begins with a class");
          take();
          last = take();
          if (last == '\\') last = unescaped(take());
        }
        if (named) {
          set |= *named;
          continue;
        }
        if (first >= 128 || last >= 128) throw Unsupported("a class with a character beyond ASCII");
        if (first > last) throw Unsupported("a range from high to low");
        for (std::size_t i = first; i <= last; ++i) set.set(i);
      }
      return negated ? ~set : set;
    }

    /// \d, \w and \s, and their opposites in capitals.
    static std::optional<Set> named_set(char32_t c) {
      const char32_t lower = c == 'D' || c == 'W' || c == 'S' ? c - 'A' + 'a' : c;
      if (lower != 'd' && lower != 'w' && lower != 's') return std::nullopt;
      Set set;
      for (std::size_t i = 0; i < set.size(); ++i) {
        const auto element = static_cast<char32_t>(i);
        const bool space = std::u32string_view(U" \t\n\r\f\v").find(element) != std::u32string_view::npos;
        set.set(i, lower == 'd' ? is_digit(element) : lower == 'w' ? is_word(element) : space);
      }
      return lower == c ? set : ~set;
    }

    static char32_t unescaped(char32_t c) {
      if (is_word(c) && c != '_' && c < 128) throw Unsupported(std::string("the escape \\") + static_cast<char>(c));
      return c;
    }

    void literal(char32_t c) { program.steps.push_back({.kind = Step::character, .value = c}); }
    void any_of(const Set& set) {
      program.steps.push_back({.kind = Step::character, .what = Step::set, .to = static_cast<int>(program.sets.size())});
      program.sets.push_back(set);
    }

    std::size_t size() const { return program.steps.size(); }
    int since(std::size_t start) const { return static_cast<int>(size() - start); }
    void insert(std::size_t at, Step step) { program.steps.insert(program.steps.begin() + static_cast<std::ptrdiff_t>(at), step); }

    char32_t take() {
      if (rest.empty()) throw Unsupported("an end where more has to come");
      const char32_t c = rest.front();
      rest.remove_prefix(1);
      return c;
    }
    bool take_if(char32_t c) {
      const bool is = rest.starts_with(c);
      if (is) rest.remove_prefix(1);
      return is;
    }
  };

  Program program_;
  std::string unsupported_;
};

}  // namespace dylora

#endif
