#ifndef DYLORA_ADAPTERS_DROPOUT_MASK_HPP
#define DYLORA_ADAPTERS_DROPOUT_MASK_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <string_view>

#include "dylora/core/error.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/buffer.hpp"

namespace dylora {

/// M ∘ x, with M zero with probability p and 1 / (1 − p) otherwise. p is rounded to a multiple of 2⁻¹⁶.
///
/// Drawn element by element in storage order, four of which take one word of the Rng, lowest 16 bits first: an element is dropped if its
/// bits are below p · 2¹⁶. One cache holds one mask; each draw overwrites it.
template <std::floating_point S>
class DropoutMask {
 public:
  /// Throws std::invalid_argument, naming `what`, unless 0 ≤ p < 1.
  static void require_probability(double probability, std::string_view what) {
    require_option(probability >= 0 && probability < 1, probability, what, "a number in [0, 1)");
  }

  /// A fresh mask of the shape of x, applied to x. False, with nothing drawn, if p rounds to 0.
  bool draw(ConstMatrixRef<S> x, double probability, Rng& rng) {
    const auto threshold = std::min<std::uint64_t>(0xffff, static_cast<std::uint64_t>(std::llround(probability * 0x1p16)));
    if (threshold == 0) return false;
    gain_ = static_cast<S>(1 / (1 - static_cast<double>(threshold) * 0x1p-16));
    auto kept = kept_.resize(x.rows(), x.cols());
    std::uint64_t word = 0;
    for (Index i = 0; i < kept.size(); ++i, word >>= 16) {
      if (i % 4 == 0) word = rng.next();
      kept.data()[i] = (word & 0xffff) >= threshold;
    }
    x_.resize(x.rows(), x.cols()) = kept.array().template cast<bool>().select(gain_ * x.array(), S(0));
    return true;
  }

  /// M ∘ x of the last draw.
  typename Buffer<S>::ConstView x() const { return x_.view(); }

  /// dx += M ∘ dropped_dx, both of the shape of that x.
  void add_backward(ConstMatrixRef<S> dropped_dx, MatrixRef<S> dx) const {
    dx.array() += kept_.view().array().template cast<bool>().select(gain_ * dropped_dx.array(), S(0));
  }

 private:
  Buffer<std::uint8_t> kept_;
  Buffer<S> x_;
  S gain_ = 1;
};

}  // namespace dylora

#endif
