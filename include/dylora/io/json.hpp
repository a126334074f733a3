#ifndef DYLORA_IO_JSON_HPP
#define DYLORA_IO_JSON_HPP

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "dylora/core/error.hpp"

namespace dylora {

inline constexpr int deepest_json = 64;

/// Throws FormatError for what a JSON parser may let pass: a byte order mark, a zero byte.
inline void require_plain_json(std::string_view text, const std::string& name) {
  if (text.starts_with("\xef\xbb\xbf")) throw FormatError(name + ": byte 0: expected JSON, got a byte order mark");
  if (const std::size_t zero = text.find('\0'); zero != text.npos) {
    throw FormatError(name + ": byte " + std::to_string(zero) + ": expected JSON, got a zero byte");
  }
}

/// The value of a JSON text (RFC 8259), read strictly: besides what is not JSON, refuses a byte order mark, zero bytes, a key that occurs
/// twice in an object, and nesting deeper than 64. Throws FormatError beginning with `name` and saying at which byte.
inline nlohmann::json parse_json(std::string_view text, const std::string& name) {
  using nlohmann::json;
  require_plain_json(text, name);
  std::vector<std::unordered_set<std::string>> keys;  // of each object that is open
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > deepest_json)
      throw FormatError(name + ": expected JSON nested at most " + std::to_string(deepest_json) + " deep, got more");
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(parsed.get_ref<const std::string&>()).second) {
      throw FormatError(name + ": key " + in_quotes(parsed.get_ref<const std::string&>()) + ": expected once in its object, got it twice");
    }
    return true;
  };
  try {
    return json::parse(text, check);
  } catch (const json::parse_error& error) {
    throw FormatError(name + ": byte " + std::to_string(error.byte) + ": expected JSON, got something else or its end");
  } catch (const json::exception&) {
    throw FormatError(name + ": expected JSON, got a number that is too large");
  }
}

}  // namespace dylora

#endif
