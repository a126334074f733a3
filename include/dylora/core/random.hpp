#ifndef DYLORA_CORE_RANDOM_HPP
#define DYLORA_CORE_RANDOM_HPP

#include <cstdint>

#include "dylora/core/types.hpp"

namespace dylora {

/// A seeded stream of random numbers, the same on every platform: SplitMix64 (Steele, Lea and Flood, 2014).
///
/// The standard library's distributions differ between implementations, so none is used. The whole state is one word: Rng(rng.state())
/// continues where `rng` is. Draw once per expression: the order in which operands are evaluated is up to the compiler.
class Rng {
 public:
  explicit Rng(std::uint64_t seed) : state_(seed) {}

  std::uint64_t state() const { return state_; }

  /// Uniform over all 64-bit words.
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  /// Uniform in [0, 1), a multiple of 2⁻⁵³.
  double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }

  /// Uniform over 0 … count − 1; the bias of about count · 2⁻⁵³ is far below anything a run could show.
  Index below(Index count) { return static_cast<Index>(uniform() * static_cast<double>(count)); }

 private:
  std::uint64_t state_;
};

/// rows × cols, each element uniform in [−bound, bound), drawn in storage order: column by column, or row by row for a RowMatrix.
template <class S, class M = MatrixX<S>>
M random_uniform(Index rows, Index cols, double bound, Rng& rng) {
  M matrix(rows, cols);
  for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = static_cast<S>(bound * (2 * rng.uniform() - 1));
  return matrix;
}

}  // namespace dylora

#endif
