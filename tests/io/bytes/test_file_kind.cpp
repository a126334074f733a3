#include "dylora/io/bytes/file_kind.hpp"

#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "io/malformed_safetensors.hpp"
#include "support/catch.hpp"

namespace dylora::test {

namespace {

std::string kind_of(std::string_view text) { return std::string(likely_kind(std::as_bytes(std::span(text)))); }

}  // namespace

TEST_CASE("what people have in place of a model is named by its first bytes") {
  const std::vector<std::pair<std::string, std::string>> kinds{{"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"},
                                                               {"PK\3\4", "a zip archive"},
                                                               {"\x80\2}q", "a Python pickle"},
                                                               {"\x80\5\x95", "a Python pickle"},
                                                               {"GGUF\3", "a GGUF file"},
                                                               {"\x89HDF\r\n\x1a\n", "an HDF5 file"},
                                                               {"\x1f\x8b\x08", "a gzip archive"},
                                                               {"<!DOCTYPE html>", "a web page"},
                                                               {" \n<html>", "a web page"},
                                                               {"\xef\xbb\xbf<?xml version=\"1.0\"?><Error>", "a web page"},
                                                               {R"({"error":"not found"})", "JSON"},
                                                               {"[\n1]", "JSON"},
                                                               {std::string(300, '\0'), "zeros"},
                                                               {safetensors_bytes(good_header(), 16), "a safetensors file"}};
  for (const auto& kind : kinds) {
    INFO(kind.second);
    CHECK(kind_of(kind.first).starts_with(kind.second));
  }
}

TEST_CASE("a safetensors file is one also if its length reads like another kind") {
  for (const std::size_t length : {0x5bu, 0x3cu, 0x7bu, 0x0au, 0x8b1fu})
    CHECK(kind_of(safetensors_bytes("{" + std::string(length - 1, ' '), 0)) == "a safetensors file");
}

TEST_CASE("of what is not known, nothing is said") {
  for (const std::string_view text : {"", "x", "version 2", "PK", "\x80", "\x80\1", "GGU", "hello, world"}) CHECK(kind_of(text).empty());
  CHECK(kind_of(std::string("<\0\0\0", 4)).empty());
  CHECK(kind_of(std::string("\x10\0\0\0\0\0\0\0{", 9)).empty());  // of which the rest is missing
}

}  // namespace dylora::test
