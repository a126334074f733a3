#ifndef DYLORA_CORE_SEQUENCES_HPP
#define DYLORA_CORE_SEQUENCES_HPP

#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

/// How the columns of a batch divide into sequences: laid end to end, of any lengths, without padding.
class Sequences {
 public:
  Sequences() = default;

  /// Throws ShapeError if there is no sequence or one has no token.
  explicit Sequences(const std::vector<Index>& lengths) {
    if (lengths.empty()) throw ShapeError("Sequences: expected at least one sequence, got an empty batch");
    begins_.reserve(lengths.size() + 1);
    begins_.push_back(0);
    for (const Index length : lengths) {
      if (length < 1) {
        throw ShapeError("Sequences: length of sequence " + std::to_string(count()) + ": expected at least 1 token, got " +
                         std::to_string(length));
      }
      begins_.push_back(begins_.back() + length);
    }
  }

  /// `count` sequences of `length` tokens each.
  static Sequences equal(Index count, Index length) {
    if (count < 1) throw ShapeError("Sequences: expected at least one sequence, got " + std::to_string(count));
    return Sequences(std::vector<Index>(static_cast<std::size_t>(count), length));
  }

  Index count() const { return begins_.empty() ? 0 : static_cast<Index>(begins_.size()) - 1; }
  Index tokens() const { return begins_.empty() ? 0 : begins_.back(); }
  Index begin(Index sequence) const { return begins_[static_cast<std::size_t>(sequence)]; }
  Index length(Index sequence) const { return begin(sequence + 1) - begin(sequence); }

  bool operator==(const Sequences&) const = default;

 private:
  std::vector<Index> begins_;  // of each sequence, and the total at the end
};

}  // namespace dylora

#endif
