#ifndef DYLORA_LINALG_KERNELS_SIMD_HPP
#define DYLORA_LINALG_KERNELS_SIMD_HPP

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "dylora/core/types.hpp"

/// One vector register, as wide as the flags of the compiler allow: what the kernels under product.hpp are written in.
namespace dylora::detail {

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64;
#elif defined(__AVX__)
inline constexpr int vector_bytes = 32;
#else
inline constexpr int vector_bytes = 16;
#endif

template <class S>
inline constexpr int lanes = vector_bytes / static_cast<int>(sizeof(S));

#if defined(__GNUC__)
template <class S>
using Pack [[gnu::vector_size(vector_bytes)]] = S;
#else
template <class S>
using Pack = Eigen::Array<S, lanes<S>, 1>;
#endif

template <class S>
Pack<S> zero() {
#if defined(__GNUC__)
  return Pack<S>{};
#else
  return Pack<S>::Zero();
#endif
}

template <class S>
Pack<S> load(const S* from) {
  Pack<S> pack;
  std::memcpy(&pack, from, sizeof pack);
  return pack;
}

template <class S>
void store(S* to, const Pack<S>& pack) {
  std::memcpy(to, &pack, sizeof pack);
}

template <class S>
Pack<S> broadcast(S value) {
#if defined(__GNUC__)
  return value - Pack<S>{};
#else
  return Pack<S>::Constant(value);
#endif
}

/// a ∘ b + c, fused wherever the machine can. Said outright, because a compiler that is left to fuse does so in one kernel and not in
/// another, and their results would differ in the last bit.
template <class S>
Pack<S> multiply_add(const Pack<S>& a, const Pack<S>& b, const Pack<S>& c) {
#if defined(__GNUC__)
  using Packet = typename Eigen::internal::packet_traits<S>::type;
  if constexpr (sizeof(Packet) == sizeof(Pack<S>)) {
    return (Pack<S>)Eigen::internal::pmadd((Packet)a, (Packet)b, (Packet)c);
  } else {
    return a * b + c;
  }
#else
  return a * b + c;
#endif
}

/// The first `count` elements, and zeros.
template <class S>
Pack<S> load_some(const S* from, Index count) {
  if (count == lanes<S>) return load(from);
  S padded[lanes<S>] = {};
  std::copy_n(from, count, padded);
  return load(padded);
}

/// The first `count` elements only.
template <class S>
void store_some(S* to, const Pack<S>& pack, Index count) {
  if (count == lanes<S>) return store<S>(to, pack);
  S elements[lanes<S>];
  store<S>(elements, pack);
  std::copy_n(elements, count, to);
}

/// Asks for the memory `ahead` bytes after `at`, to be read soon. It need not belong to anything.
inline void prefetch([[maybe_unused]] const void* at, [[maybe_unused]] std::uintptr_t ahead) {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(at) + ahead));
#endif
}

/// Asks for the memory at `at`, to be written soon.
inline void prefetch_for_write([[maybe_unused]] const void* at) {
#if defined(__GNUC__)
  __builtin_prefetch(at, 1);
#endif
}

#if defined(__GNUC__)
/// The elements of the lower (or upper) halves of a and b in turn: a₀ b₀ a₁ b₁ …
template <class S, bool upper, int... i>
Pack<S> zip(const Pack<S>& a, const Pack<S>& b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i / 2 + i % 2 * lanes<S> + (upper ? lanes<S> / 2 : 0))...);
}
#endif

/// Lane i of the result is the sum over the lanes of packs[i], halves added to halves down to one lane. Overwrites the packs.
template <class S>
Pack<S> sums_of_lanes(Pack<S> (&packs)[lanes<S>]) {
  constexpr int n = lanes<S>;
#if defined(__GNUC__)
#pragma GCC unroll 4
  for (int half = n / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      packs[i] = zip<S, false>(packs[i], packs[i + half], std::make_integer_sequence<int, n>()) +
                 zip<S, true>(packs[i], packs[i + half], std::make_integer_sequence<int, n>());
    }
  }
  return packs[0];
#else
  S sums[n];
  for (int i = 0; i < n; ++i) {
    S lane[n];
    store<S>(lane, packs[i]);
    for (int half = n / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    }
    sums[i] = lane[0];
  }
  return load<S>(sums);
#endif
}

/// Lane c of packs[r] becomes lane r of packs[c]: log₂ lanes times, the first half of the packs is zipped with the second.
template <class S>
void transpose_registers(Pack<S> (&packs)[lanes<S>]) {
  constexpr int n = lanes<S>;
#if defined(__GNUC__)
#pragma GCC unroll 4
  for (int stage = 1; stage < n; stage *= 2) {
    Pack<S> zipped[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      zipped[2 * i] = zip<S, false>(packs[i], packs[i + n / 2], std::make_integer_sequence<int, n>());
      zipped[2 * i + 1] = zip<S, true>(packs[i], packs[i + n / 2], std::make_integer_sequence<int, n>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) packs[i] = zipped[i];
  }
#else
  for (int r = 0; r < n; ++r) {
    for (int c = 0; c < r; ++c) std::swap(packs[r][c], packs[c][r]);
  }
#endif
}

/// to[c · to_stride + r] = from[r · from_stride + c] for any rows × cols.
template <class S>
void transpose(Index rows, Index cols, const S* from, Index from_stride, S* to, Index to_stride) {
  const Index whole_rows = rows / lanes<S> * lanes<S>, whole_cols = cols / lanes<S> * lanes<S>;
  for (Index r = 0; r < whole_rows; r += lanes<S>) {
    for (Index c = 0; c < whole_cols; c += lanes<S>) {
      Pack<S> square[lanes<S>];
#pragma GCC unroll 16
      for (int i = 0; i < lanes<S>; ++i) square[i] = load(from + (r + i) * from_stride + c);
      transpose_registers<S>(square);
#pragma GCC unroll 16
      for (int i = 0; i < lanes<S>; ++i) store<S>(to + (c + i) * to_stride + r, square[i]);
    }
  }
  for (Index r = 0; r < rows; ++r) {
    for (Index c = r < whole_rows ? whole_cols : 0; c < cols; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

}  // namespace dylora::detail

#endif
