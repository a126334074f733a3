#ifndef DYLORA_IO_SAFETENSORS_HEADER_HPP
#define DYLORA_IO_SAFETENSORS_HEADER_HPP

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/io/bytes/file_kind.hpp"
#include "dylora/io/bytes/json.hpp"
#include "dylora/io/bytes/tensor.hpp"

namespace dylora::detail {

inline constexpr std::size_t safetensors_word = 8;  // in bytes
inline constexpr std::uint64_t largest_safetensors_header = 100'000'000;
inline constexpr Index largest_safetensors_extent = Index{1} << 48;
inline constexpr std::size_t most_safetensors_dimensions = 64;

/// The JSON text of a safetensors file, which follows the 8 bytes of its length. Throws FormatError with the likely cause.
inline std::string_view safetensors_header_text(std::span<const std::byte> bytes, const std::string& name) {
  const std::string_view file(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const std::string kind(likely_kind(bytes));
  std::string cause = kind.empty() ? "" : "; it looks like " + kind;
  if (file.size() < safetensors_word) {
    throw FormatError(name + ": expected a safetensors file of at least 8 bytes, got " + std::to_string(file.size()) + cause);
  }
  std::uint64_t length = 0, reversed = 0;
  std::memcpy(&length, file.data(), safetensors_word);
  std::reverse_copy(file.begin(), file.begin() + safetensors_word, reinterpret_cast<char*>(&reversed));
  const std::string_view rest = file.substr(safetensors_word);
  const bool in_range = length > 0 && length <= largest_safetensors_header;
  if (in_range && length <= rest.size()) return rest.substr(0, static_cast<std::size_t>(length));

  if (in_range && rest.starts_with('{')) {
    cause = "; bytes missing of it: " + std::to_string(length - rest.size()) + ", and all data (a truncated download?)";
  } else if (rest.starts_with('{') && reversed > 0 && reversed <= rest.size()) {
    cause = "; it would fit in the other byte order (a big-endian file?)";
  }
  throw FormatError(name + ": byte 0: length of the header: expected " +
                    (in_range ? "at most the " + std::to_string(rest.size()) + " bytes that follow"
                              : "1 to " + std::to_string(largest_safetensors_header)) +
                    ", got " + std::to_string(length) + cause);
}

struct SafetensorsEntry {
  TensorView tensor;  // its bytes are still to be found
  std::uint64_t begin = 0, end = 0;
};

/// Reads the JSON text of a safetensors file event by event. What the format does not have is refused where it begins, so that memory stays
/// in proportion to what is kept. A name that two tensors have is for the caller to find.
class SafetensorsHeader : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::map<std::string, std::string> metadata;
  std::vector<SafetensorsEntry> entries;

  /// Throws FormatError beginning with `name`.
  SafetensorsHeader(std::string_view text, std::string name) : name_(std::move(name)) {
    require_plain_json(text, name_, safetensors_word);
    nlohmann::json::sax_parse(text, this);
  }

  bool null() override {
    if (state_ == State::metadata) return go_to(State::top);  // as if it were not there
    return value("null");
  }
  bool boolean(bool) override { return value("a boolean"); }
  bool number_integer(number_integer_t) override { return value("a negative number"); }
  bool number_float(number_float_t, const string_t&) override { return value("a number that is no unsigned 64-bit integer"); }
  bool binary(binary_t&) override { return value("binary data"); }

  bool number_unsigned(number_unsigned_t number) override {
    if (state_ == State::in_shape) {
      if (number > largest_safetensors_extent) fail("shape: expected extents of at most 2^48, got " + std::to_string(number));
      auto& shape = entries.back().tensor.shape;
      if (shape.size() == most_safetensors_dimensions) fail("shape: expected at most 64 dimensions, got more");
      shape.push_back(static_cast<Index>(number));
      return true;
    }
    if (state_ == State::in_offsets) {
      if (offsets_ == 2) fail("data_offsets: expected two numbers, got more");
      (offsets_++ == 0 ? entries.back().begin : entries.back().end) = number;
      return true;
    }
    return value("a number");
  }

  bool string(string_t& text) override {
    if (state_ == State::in_metadata) {
      metadata.emplace(std::move(key_), std::move(text));
      return true;
    }
    if (state_ == State::dtype) {
      const auto dtype = dtype_of(text);
      if (!dtype) fail("dtype: expected one that the format has, got " + in_quotes(text));
      entries.back().tensor.dtype = *dtype;
      return go_to(State::entry);
    }
    return value("a string");
  }

  bool key(string_t& key) override {
    if (state_ == State::top) {
      if (key != "__metadata__") {
        entries.emplace_back().tensor.name = std::move(key);
        return go_to(State::before_entry);
      }
      if (std::exchange(has_metadata_, true)) fail("key \"__metadata__\": expected once, got it twice");
      return go_to(State::metadata);
    }
    if (state_ == State::in_metadata) {
      if (metadata.contains(key)) fail("__metadata__: key " + in_quotes(key) + ": expected once, got it twice");
      key_ = std::move(key);
    }
    if (state_ == State::entry) {
      const auto field = std::find(fields.begin(), fields.end(), key);
      if (field == fields.end()) return go_to(State::ignored);
      const auto i = static_cast<std::size_t>(field - fields.begin());
      if (std::exchange(has_field_[i], true)) fail(key + ": expected once, got it twice");
      state_ = std::array{State::dtype, State::shape, State::offsets}[i];
    }
    return true;
  }

  bool start_object(std::size_t) override {
    if (state_ == State::ignored) return deeper();
    if (state_ == State::start) return go_to(State::top);
    if (state_ != State::metadata && state_ != State::before_entry) return value("an object");
    has_field_.fill(false);
    return go_to(state_ == State::metadata ? State::in_metadata : State::entry);
  }

  bool end_object() override {
    if (state_ == State::ignored) return shallower();
    if (state_ == State::top) return go_to(State::end);
    if (state_ == State::entry) {
      for (std::size_t i = 0; i < fields.size(); ++i) {
        if (!has_field_[i]) fail("expected " + std::string(fields[i]) + ", got none");
      }
    }
    return go_to(State::top);
  }

  bool start_array(std::size_t) override {
    if (state_ == State::ignored) return deeper();
    if (state_ == State::shape) return go_to(State::in_shape);
    if (state_ != State::offsets) return value("an array");
    offsets_ = 0;
    return go_to(State::in_offsets);
  }

  bool end_array() override {
    if (state_ == State::ignored) return shallower();
    if (state_ == State::in_offsets && offsets_ != 2) fail("data_offsets: expected two numbers, got " + std::to_string(offsets_));
    return go_to(State::entry);
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) override {
    throw FormatError(name_ + ": byte " + std::to_string(safetensors_word + position - 1) +
                      ": header: expected JSON, got something else or its end");
  }

 private:
  enum class State { start, top, metadata, in_metadata, before_entry, entry, dtype, shape, in_shape, offsets, in_offsets, ignored, end };
  static constexpr std::array<std::string_view, 3> fields{"dtype", "shape", "data_offsets"};

  /// A value where the state expects another; of a field that the format does not know, any will do.
  bool value(const char* got) {
    if (state_ == State::ignored) {
      if (depth_ == 0) state_ = State::entry;
      return true;
    }
    const auto expected = [&]() -> std::string {
      switch (state_) {
        case State::metadata: return "__metadata__: expected an object of strings";
        case State::in_metadata: return "__metadata__: key " + in_quotes(key_) + ": expected a string";
        case State::before_entry: return "expected an object with dtype, shape and data_offsets";
        case State::dtype: return "dtype: expected a string";
        case State::shape: return "shape: expected an array of unsigned integers";
        case State::in_shape: return "shape: expected unsigned integers";
        case State::offsets: return "data_offsets: expected an array of two unsigned integers";
        case State::in_offsets: return "data_offsets: expected unsigned integers";
        default: return "expected a JSON object";
      }
    };
    fail(expected() + ", got " + got);
  }

  [[noreturn]] void fail(const std::string& what) const {
    const bool in_tensor =
        !entries.empty() && state_ != State::start && state_ != State::top && state_ != State::metadata && state_ != State::in_metadata;
    throw FormatError(name_ + ": header: " + (in_tensor ? "tensor " + in_quotes(entries.back().tensor.name) + ": " : "") + what);
  }

  bool go_to(State state) {
    state_ = state;
    return true;
  }
  bool deeper() {
    if (++depth_ > deepest_json) fail("expected JSON nested at most 64 deep, got more");
    return true;
  }
  bool shallower() {
    if (--depth_ == 0) state_ = State::entry;
    return true;
  }

  std::string name_;
  State state_ = State::start;
  std::string key_;  // in the metadata
  bool has_metadata_ = false;
  std::array<bool, fields.size()> has_field_{};
  int offsets_ = 0, depth_ = 0;
};

}  // namespace dylora::detail

#endif
