#ifndef DYLORA_CORE_NAMED_HPP
#define DYLORA_CORE_NAMED_HPP

#include <algorithm>
#include <array>
#include <cstddef>
#include <string_view>

/// What checks that several types share say of the type that they were called for.
namespace dylora::detail {

/// A string literal as a template argument.
template <std::size_t n>
struct Literal {
  char text[n] = {};
  constexpr Literal(const char (&from)[n]) { std::copy_n(from, n, text); }
};

template <class Named, Literal text>
inline constexpr auto named_characters = [] {
  std::array<char, Named::name.size() + sizeof(text.text) - 1> whole{};
  const auto end = std::copy(Named::name.begin(), Named::name.end(), whole.begin());
  std::copy_n(text.text, sizeof(text.text) - 1, end);
  return whole;
}();

/// Named::name and then the text, composed when the program is compiled: a check that passes composes nothing.
template <class Named, Literal text>
constexpr std::string_view named() {
  constexpr const auto& characters = named_characters<Named, text>;
  return {characters.data(), characters.size()};
}

}  // namespace dylora::detail

#endif
