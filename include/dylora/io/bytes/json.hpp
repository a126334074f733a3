#ifndef DYLORA_IO_BYTES_JSON_HPP
#define DYLORA_IO_BYTES_JSON_HPP

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"

namespace dylora {

inline constexpr int deepest_json = 64;

/// In bytes of text: of a configuration or a value within another file, of an index of files, and of anything at all.
inline constexpr std::size_t largest_json_config = std::size_t{1} << 20, largest_json_index = std::size_t{1} << 24,
                             largest_json = std::size_t{1} << 26;

/// Throws FormatError for what a JSON parser may let pass: a byte order mark, a zero byte. `offset` is where in its file the text begins.
inline void require_plain_json(std::string_view text, const std::string& name, std::size_t offset = 0) {
  const auto fail = [&](std::size_t at, const char* got) {
    throw FormatError(name + ": byte " + std::to_string(offset + at) + ": expected JSON, got " + got);
  };
  if (text.starts_with("\xef\xbb\xbf")) fail(0, "a byte order mark");
  if (const std::size_t zero = text.find('\0'); zero != text.npos) fail(zero, "a zero byte");
}

namespace detail {

/// Builds a value from the events of a parser, and refuses what a JSON parser may let pass.
class StrictJson : public nlohmann::json_sax<nlohmann::json> {
 public:
  /// Throws FormatError beginning with `name`.
  StrictJson(std::string_view text, const std::string& name) : name_(name) {
    require_plain_json(text, name);
    nlohmann::json::sax_parse(text, this);
  }

  nlohmann::json result;

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t number) override { return add(number); }
  bool number_unsigned(number_unsigned_t number) override { return add(number); }
  bool number_float(number_float_t number, const string_t&) override { return add(number); }
  bool string(string_t& text) override { return add(std::move(text)); }
  bool binary(binary_t& bytes) override { return add(std::move(bytes)); }

  bool key(string_t& key) override {
    auto& members = open_.back()->get_ref<nlohmann::json::object_t&>();
    const auto [member, added] = members.try_emplace(std::move(key));
    if (!added) throw FormatError(name_ + ": key " + in_quotes(member->first) + ": expected once in its object, got it twice");
    member_ = &member->second;
    return true;
  }
  bool start_object(std::size_t) override { return open(nlohmann::json::value_t::object); }
  bool start_array(std::size_t) override { return open(nlohmann::json::value_t::array); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception& error) override {
    const bool out_of_range = dynamic_cast<const nlohmann::json::out_of_range*>(&error) != nullptr;
    throw FormatError(name_ + ": byte " + std::to_string(position - 1) + ": expected JSON, got " +
                      (out_of_range ? "a number that is too large" : "something else or its end"));
  }

 private:
  bool add(nlohmann::json value) {
    place(std::move(value));
    return true;
  }

  bool open(nlohmann::json::value_t type) {
    if (open_.size() == deepest_json) throw FormatError(name_ + ": expected JSON nested at most 64 deep, got more");
    open_.push_back(&place(type));
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  /// Where the value belongs. It stays there: what holds it does not grow before it is complete.
  nlohmann::json& place(nlohmann::json value) {
    nlohmann::json& to = open_.empty() ? result : open_.back()->is_array() ? open_.back()->emplace_back() : *member_;
    return to = std::move(value);
  }

  const std::string& name_;
  std::vector<nlohmann::json*> open_;  // the arrays and objects around the next value
  nlohmann::json* member_ = nullptr;   // of the innermost object, the value of its last key
};

}  // namespace detail

/// The value of a JSON text (RFC 8259), read strictly: besides what is not JSON, refuses a byte order mark, zero bytes, a key that occurs
/// twice in an object, numbers beyond double's range, nesting deeper than 64, and more than `largest` bytes. Throws FormatError beginning
/// with `name`.
///
/// Needs up to 40 times the memory of the text (for one of nothing but empty objects): for configuration, not for data.
inline nlohmann::json parse_json(std::string_view text, const std::string& name, std::size_t largest = largest_json) {
  if (text.size() > largest)
    throw FormatError(name + ": expected at most " + std::to_string(largest) + " bytes of JSON, got " + std::to_string(text.size()));
  return detail::StrictJson(text, name).result;
}

}  // namespace dylora

#endif
