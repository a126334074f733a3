#ifndef DYLORA_LAYERS_ATTENTION_KEY_VALUE_CACHE_HPP
#define DYLORA_LAYERS_ATTENTION_KEY_VALUE_CACHE_HPP

#include <algorithm>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

/// The keys and values of one sequence's tokens so far, which Attention::extend reads and appends to. One per attention layer and sequence,
/// owned by the caller; copy it to branch a generation. Memory doubles when full.
template <class S>
class KeyValueCache {
 public:
  Index length() const { return length_; }
  auto keys() const { return keys_.leftCols(length_); }
  auto values() const { return values_.leftCols(length_); }

  /// Appends one column per token. Throws ShapeError if the features differ from those already here.
  void append(ConstMatrixRef<S> keys, ConstMatrixRef<S> values) {
    require_equal(values.cols(), keys.cols(), "KeyValueCache: tokens in values");
    if (length_ > 0) {
      require_equal(keys.rows(), keys_.rows(), "KeyValueCache: features of keys");
      require_equal(values.rows(), values_.rows(), "KeyValueCache: features of values");
    }
    const Index longer = length_ + keys.cols();
    if (longer > std::min(keys_.cols(), values_.cols()) || keys.rows() != keys_.rows() || values.rows() != values_.rows()) {
      const Index capacity = std::max(longer, 2 * length_);
      keys_.conservativeResize(keys.rows(), capacity);
      values_.conservativeResize(values.rows(), capacity);
    }
    keys_.middleCols(length_, keys.cols()) = keys;
    values_.middleCols(length_, values.cols()) = values;
    length_ = longer;
  }

  /// Forgets all tokens but the first `length`. Throws std::invalid_argument if there are fewer.
  void truncate(Index length) {
    require_in_range(length, 0, length_, "KeyValueCache::truncate: length");
    length_ = length;
  }

 private:
  MatrixX<S> keys_, values_;
  Index length_ = 0;
};

}  // namespace dylora

#endif
