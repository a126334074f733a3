#ifndef DYLORA_IO_SAFETENSORS_HEADER_HPP
#define DYLORA_IO_SAFETENSORS_HEADER_HPP

#include <cstddef>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/io/json.hpp"
#include "dylora/io/tensor.hpp"

namespace dylora::detail {

struct SafetensorsEntry {
  TensorView tensor;  // its bytes are still to be found
  std::uint64_t begin = 0, end = 0;
};

/// Reads the JSON text of a safetensors file event by event. What the format does not have is refused where it begins, so that memory stays
/// in proportion to what is kept.
class SafetensorsHeader : public nlohmann::json_sax<nlohmann::json> {
 public:
  static constexpr std::uint64_t largest_extent = std::uint64_t{1} << 48;
  static constexpr std::size_t most_dimensions = 64;

  std::map<std::string, std::string> metadata;
  std::vector<SafetensorsEntry> entries;

  /// Throws FormatError beginning with `name`. `offset` is where in the file the text begins.
  SafetensorsHeader(std::string_view text, std::string name, std::size_t offset) : name_(std::move(name)), offset_(offset) {
    require_plain_json(text, name_);
    nlohmann::json::sax_parse(text, this);
  }

  bool null() override {
    if (state_ == State::metadata) return back_to(State::top);  // as if it were not there
    return value("null");
  }
  bool boolean(bool) override { return value("a boolean"); }
  bool number_integer(number_integer_t) override { return value("a negative number"); }
  bool number_float(number_float_t, const string_t&) override { return value("a number that is no unsigned 64-bit integer"); }
  bool binary(binary_t&) override { return value("binary data"); }

  bool number_unsigned(number_unsigned_t number) override {
    if (state_ == State::in_shape) {
      if (number > largest_extent) fail("shape: expected extents of at most 2^48, got " + std::to_string(number));
      auto& shape = entries.back().tensor.shape;
      if (shape.size() == most_dimensions) fail("shape: expected at most 64 dimensions, got more");
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
      metadata[key_] = text;
      return true;
    }
    if (state_ == State::dtype) {
      const auto dtype = dtype_of(text);
      if (!dtype) fail("dtype: expected one that the format has, got " + in_quotes(text));
      entries.back().tensor.dtype = *dtype;
      return back_to(State::entry);
    }
    return value("a string");
  }

  bool key(string_t& key) override {
    if (state_ == State::ignored) return true;
    if (!keys_[state_ == State::top ? 0 : 1].insert(key).second) fail("key " + in_quotes(key) + ": expected once, got it twice");
    key_ = key;
    if (state_ == State::top) {
      if (key == "__metadata__") return back_to(State::metadata);
      entries.emplace_back().tensor.name = key;
      return back_to(State::before_entry);
    }
    if (state_ == State::entry) {
      state_ = key == "dtype" ? State::dtype : key == "shape" ? State::shape : key == "data_offsets" ? State::offsets : State::ignored;
    }
    return true;
  }

  bool start_object(std::size_t) override {
    if (state_ == State::ignored) return deeper();
    if (state_ == State::start) return back_to(State::top);
    if (state_ != State::metadata && state_ != State::before_entry) return value("an object");
    keys_[1].clear();
    return back_to(state_ == State::metadata ? State::in_metadata : State::entry);
  }

  bool end_object() override {
    if (state_ == State::ignored) return shallower();
    if (state_ == State::top) return back_to(State::end);
    if (state_ == State::entry) {
      for (const char* field : {"dtype", "shape", "data_offsets"}) {
        if (!keys_[1].contains(field)) fail(std::string("expected a ") + field + ", got none");
      }
    }
    return back_to(State::top);
  }

  bool start_array(std::size_t) override {
    if (state_ == State::ignored) return deeper();
    if (state_ == State::shape) return back_to(State::in_shape);
    if (state_ != State::offsets) return value("an array");
    offsets_ = 0;
    return back_to(State::in_offsets);
  }

  bool end_array() override {
    if (state_ == State::ignored) return shallower();
    if (state_ == State::in_offsets && offsets_ != 2) fail("data_offsets: expected two numbers, got " + std::to_string(offsets_));
    return back_to(State::entry);
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) override {
    throw FormatError(name_ + ": byte " + std::to_string(offset_ + position) + ": header: expected JSON, got something else or its end");
  }

 private:
  enum class State { start, top, metadata, in_metadata, before_entry, entry, dtype, shape, in_shape, offsets, in_offsets, ignored, end };

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

  bool back_to(State state) {
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
  std::size_t offset_;
  State state_ = State::start;
  std::string key_;
  std::unordered_set<std::string> keys_[2];  // of the header, and of the object inside it
  int offsets_ = 0, depth_ = 0;
};

}  // namespace dylora::detail

#endif
