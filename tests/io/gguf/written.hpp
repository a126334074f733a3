#ifndef DYLORA_TESTS_IO_GGUF_WRITTEN_HPP
#define DYLORA_TESTS_IO_GGUF_WRITTEN_HPP

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include "dylora/io/gguf/gguf.hpp"
#include "dylora/io/gguf/writer.hpp"

namespace dylora::test {

/// The bytes of a GGUF file that was never on a disk.
inline std::string written(const GgufContents& contents) {
  struct Memory {
    std::string text;
    void write(std::span<const std::byte> bytes) { text.append(reinterpret_cast<const char*>(bytes.data()), bytes.size()); }
    void write(std::string_view bytes) { text += bytes; }
  } memory;
  write_gguf(memory, contents);
  return memory.text;
}

}  // namespace dylora::test

#endif
