#include "dylora/io/bytes/checksum.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <set>
#include <span>
#include <string>
#include <string_view>

#include "dylora/core/random.hpp"
#include "support/catch.hpp"

namespace dylora::test {

namespace {

std::uint64_t checksum_of(std::string_view text, std::uint64_t before = 0) { return checksum(std::as_bytes(std::span(text)), before); }

std::string random_bytes(std::size_t size, std::uint64_t seed) {
  Rng rng(seed);
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>(rng.next() & 0xff);
  return bytes;
}

/// The formula, word by word.
std::uint64_t by_hand(std::string text) {
  std::uint64_t h = text.size();
  text.resize((text.size() + 7) / 8 * 8, '\0');
  for (std::size_t i = 0; i < text.size(); i += 8) {
    std::uint64_t word = 0;
    for (std::size_t j = 8; j-- > 0;) word = word << 8 | static_cast<unsigned char>(text[i + j]);
    const std::uint64_t k = 0x9e3779b97f4a7c15u, w = k * word, g = h ^ (k * (w ^ w / (std::uint64_t{1} << 32)));
    h = k * (g ^ g / (std::uint64_t{1} << 32));
  }
  return h;
}

}  // namespace

TEST_CASE("a checksum is what its formula says, at every length and address") {
  const std::string bytes = random_bytes(100, 1);
  for (std::size_t begin = 0; begin < 9; ++begin) {
    for (std::size_t size = 0; begin + size <= bytes.size(); ++size) {
      const std::string_view part = std::string_view(bytes).substr(begin, size);
      CHECK(checksum_of(part) == by_hand(std::string(part)));
    }
  }
}

TEST_CASE("a checksum stays what it was when files were written with it") {
  CHECK(hexadecimal(checksum_of("")) == "0000000000000000");
  CHECK(hexadecimal(checksum_of("dylora")) == "4c048a26c437460d");
  CHECK(hexadecimal(checksum_of("a checkpoint of several words")) == "fb83c7ed5fb579e5");
}

TEST_CASE("a checksum shows every change of one and of two bits") {
  for (const std::string& bytes : {random_bytes(61, 2), std::string(61, '\0')}) {
    std::set<std::uint64_t> seen{checksum_of(bytes)};
    std::string changed = bytes;
    const auto flip = [&](std::size_t bit) { changed[bit / 8] = static_cast<char>(changed[bit / 8] ^ (1 << bit % 8)); };
    for (std::size_t i = 0; i < 8 * bytes.size(); ++i) {
      flip(i);
      if (!seen.insert(checksum_of(changed)).second) FAIL("bit " << i);
      for (std::size_t j = 0; j < i; ++j) {
        flip(j);
        if (!seen.insert(checksum_of(changed)).second) FAIL("bits " << i << " and " << j);
        flip(j);
      }
      flip(i);
    }
  }
}

TEST_CASE("a checksum shows which numbers of many have changed their signs") {
  // The highest bits of words and of their halves, which multiplication alone does not spread.
  for (const float number : {1.5f, 0.f, 0.1f}) {
    std::set<std::uint64_t> seen;
    for (unsigned signs = 0; signs < 1u << 16; ++signs) {
      float numbers[16];
      for (unsigned i = 0; i < 16; ++i) numbers[i] = (signs >> i & 1) != 0 ? -number : number;
      if (!seen.insert(checksum(std::as_bytes(std::span(numbers)))).second) FAIL(number << ", signs " << signs);
    }
  }
}

TEST_CASE("a checksum shows zeros that were added or cut") {
  std::set<std::uint64_t> seen;
  for (std::size_t size = 0; size < 100; ++size) CHECK(seen.insert(checksum_of(std::string(size, '\0'))).second);
}

TEST_CASE("a checksum goes on from that of what comes before") {
  const std::string first = random_bytes(16, 3), second = random_bytes(13, 4);
  const std::uint64_t both = checksum_of(second, checksum_of(first));
  CHECK(both != checksum_of(second));
  CHECK(both != checksum_of(second, checksum_of(random_bytes(16, 5))));
}

TEST_CASE("hexadecimal digits are the bits of a number, four each") {
  CHECK(hexadecimal(0x0123456789abcdefu) == "0123456789abcdef");
  CHECK(hexadecimal(1) == "0000000000000001");
  CHECK(hexadecimal(UINT64_MAX) == "ffffffffffffffff");
}

}  // namespace dylora::test
