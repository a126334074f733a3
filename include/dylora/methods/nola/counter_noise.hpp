#ifndef DYLORA_METHODS_NOLA_COUNTER_NOISE_HPP
#define DYLORA_METHODS_NOLA_COUNTER_NOISE_HPP

#include <concepts>
#include <cstdint>

#include "dylora/core/types.hpp"

namespace dylora {

/// Numbers uniform in (−1, 1) that are a function of where they are, and so need not be kept: any of them can be had without the others, in
/// any order and on any thread, the same on every platform.
///
///     const CounterNoise row = CounterNoise(seed).stream(basis).stream(r);   // a stream of streams …
///     const double entry = row.at<double>(c);                                // … and one element of it
///     CounterNoise::Tile<float> tile;
///     row.read(c, tile);                                                     // elements c, c + 1, … c + tile_size − 1
///
/// The address of a stream is mixed as SplitMix64 does (Steele, Lea and Flood, 2014), the position by two rounds of multiplication and
/// shift in 32 bits, with the constants of MurmurHash3's finaliser, so that compilers turn it into vector instructions. An element is an
/// odd multiple of 2⁻²⁴: exact in float and double alike, and symmetric about 0. Fit for random bases, not for secrets.
class CounterNoise {
 public:
  static constexpr Index tile_size = 256;
  template <std::floating_point S>
  using Tile = Eigen::Array<S, tile_size, 1>;

  explicit CounterNoise(std::uint64_t seed) : key_(mix(seed + weyl)) {}

  /// Stream `number` of this one, independent of the others and of this.
  CounterNoise stream(Index number) const {
    CounterNoise result = *this;
    result.key_ = mix(key_ + weyl * (static_cast<std::uint64_t>(number) + 1));
    return result;
  }

  /// Element `position` of this stream, 0 ≤ position < 2³².
  template <std::floating_point S>
  S at(Index position) const {
    return element<S>(static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(key_), static_cast<std::uint32_t>(key_ >> 32));
  }

  /// tile[i] = at(position + i).
  template <std::floating_point S>
  void read(Index position, Tile<S>& tile) const {
    const auto first = static_cast<std::uint32_t>(position), low = static_cast<std::uint32_t>(key_),
               high = static_cast<std::uint32_t>(key_ >> 32);
    S* const to = tile.data();
    for (std::uint32_t i = 0; i < tile_size; ++i) to[i] = element<S>(first + i, low, high);
  }

 private:
  static constexpr std::uint64_t weyl = 0x9e3779b97f4a7c15u;  // 2⁶⁴ over the golden ratio, odd

  static std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  /// The second half of the key comes in between the rounds: else streams whose first halves are near would be shifts of each other.
  template <std::floating_point S>
  static S element(std::uint32_t counter, std::uint32_t low, std::uint32_t high) {
    std::uint32_t z = counter * 0x9e3779b9u + low;
    z = (z ^ (z >> 16)) * 0x85ebca6bu + high;
    z = (z ^ (z >> 13)) * 0xc2b2ae35u;
    z ^= z >> 16;
    return static_cast<S>((static_cast<std::int32_t>(z) >> 7) | 1) * static_cast<S>(0x1p-24);
  }

  std::uint64_t key_;
};

}  // namespace dylora

#endif
