#ifndef DYLORA_CORE_ERROR_HPP
#define DYLORA_CORE_ERROR_HPP

#include <stdexcept>
#include <string>
#include <string_view>

#include "dylora/core/types.hpp"

/// What is thrown: ShapeError for a matrix that does not fit, std::invalid_argument for a value out of range, NonFiniteError when
/// training meets a NaN or an infinity, FormatError for a file that is not what it should be, FileError for one that cannot be read or
/// written. Every message names the thing, what was expected and what came; the require_ functions below write it,
/// for layers and adapters of your own too.
namespace dylora {

/// A matrix, batch or cache that does not fit the object it was given to.
struct ShapeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// A NaN or an infinity where training needs a number. Whoever throws it has changed nothing.
struct NonFiniteError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A file whose contents are not what they should be. The message begins with its path. Whoever throws it has taken nothing from the file.
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A file or folder that cannot be read or written, for a reason that lies outside of it. The message begins with its path; what was there
/// before is as it was.
struct FileError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Text from outside as a message may show it: in quotes, control characters and what is not ASCII as \xHH, cut after 100 bytes.
inline std::string in_quotes(std::string_view text) {
  constexpr std::size_t longest = 100;
  std::string result = "\"";
  for (const char c : text.substr(0, longest)) {
    if (c >= ' ' && c <= '~') {
      result += c;
    } else {
      constexpr std::string_view digits = "0123456789abcdef";
      const auto byte = static_cast<unsigned char>(c);
      result += {'\\', 'x', digits[byte >> 4], digits[byte & 15]};
    }
  }
  return result + (text.size() > longest ? "\"..." : "\"");
}

/// Throws ShapeError unless got = expected.
inline void require_equal(Index got, Index expected, std::string_view what) {
  if (got != expected) {
    throw ShapeError(std::string(what) + ": expected " + std::to_string(expected) + ", got " + std::to_string(got));
  }
}

/// Throws ShapeError for an empty batch.
inline void require_samples(Index samples, std::string_view what) {
  if (samples < 1) throw ShapeError(std::string(what) + ": expected at least one sample (column), got an empty batch");
}

/// Throws std::invalid_argument unless lowest ≤ got ≤ highest.
inline void require_in_range(Index got, Index lowest, Index highest, std::string_view what) {
  if (got < lowest || got > highest) {
    throw std::invalid_argument(std::string(what) + ": expected a value in [" + std::to_string(lowest) + ", " + std::to_string(highest) +
                                "], got " + std::to_string(got));
  }
}

/// Throws std::invalid_argument unless `accepted`, a comparison that a NaN fails.
inline void require_option(bool accepted, double got, std::string_view what, std::string_view expected) {
  if (!accepted) {
    throw std::invalid_argument(std::string(what) + ": expected " + std::string(expected) + ", got " + std::to_string(got));
  }
}

}  // namespace dylora

#endif
