#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "dylora/io/bytes/atomic_file.hpp"
#include "dylora/io/gguf/gguf.hpp"
#include "io/gguf/written.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"
#include "support/throws.hpp"

using namespace dylora;
using namespace dylora::test;

namespace {

/// The bytes of a file, put together by hand: the writer under test has no part in it.
struct Bytes {
  std::string text;

  template <class T>
  Bytes& number(T value) {
    text.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  Bytes& u32(std::uint32_t value) { return number(value); }
  Bytes& u64(std::uint64_t value) { return number(value); }
  Bytes& string(std::string_view value) {
    u64(value.size());
    text += value;
    return *this;
  }
  Bytes& raw(std::string_view bytes) {
    text += bytes;
    return *this;
  }
  Bytes& pad(std::size_t alignment = 32) {
    while (text.size() % alignment != 0) text += '\0';
    return *this;
  }
  Bytes& zeros(std::size_t count) {
    text.append(count, '\0');
    return *this;
  }
  Bytes& tensor(std::string_view name, std::vector<std::uint64_t> ne, std::uint32_t type, std::uint64_t offset) {
    string(name).u32(static_cast<std::uint32_t>(ne.size()));
    for (const std::uint64_t extent : ne) u64(extent);
    return u32(type).u64(offset);
  }
};

Bytes header(std::uint64_t tensors, std::uint64_t entries, std::uint32_t version = 3) {
  return Bytes().raw("GGUF").u32(version).u64(tensors).u64(entries);
}

Bytes with_alignment(std::uint32_t alignment) { return header(0, 1).string("general.alignment").u32(4).u32(alignment); }

/// A file of one tensor, and then so many bytes.
Bytes one_tensor(std::string_view name, std::vector<std::uint64_t> ne, std::uint32_t type, std::size_t bytes, std::uint64_t offset = 0) {
  return header(1, 0).tensor(name, std::move(ne), type, offset).pad().zeros(bytes);
}

GgufContents parse(const std::string& text) { return parse_gguf(std::as_bytes(std::span(text)), "a.gguf"); }
GgufContents parse(const Bytes& bytes) { return parse(bytes.text); }

std::span<const std::byte> bytes_of(const auto& values) { return std::as_bytes(std::span(values)); }

GgufTensor f32(std::string name, std::vector<Index> shape, std::span<const std::byte> bytes) {
  return {std::move(name), ggml_type(DType::F32), std::move(shape), bytes};
}

}  // namespace

TEST_CASE("A file put together by hand is read entry by entry and tensor by tensor") {
  Bytes file = header(2, 14);
  file.string("u8").u32(0).number(std::uint8_t{200});
  file.string("i8").u32(1).number(std::int8_t{-100});
  file.string("u16").u32(2).number(std::uint16_t{60000});
  file.string("i16").u32(3).number(std::int16_t{-30000});
  file.string("u32").u32(4).u32(4'000'000'000);
  file.string("i32").u32(5).number(std::int32_t{-2'000'000'000});
  file.string("f32").u32(6).number(0.1F);
  file.string("yes").u32(7).raw("\1");
  file.string("text").u32(8).string("caf\xc3\xa9");
  file.string("strings").u32(9).u32(8).u64(2).string("a").string("");
  file.string("bools").u32(9).u32(7).u64(3).raw(std::string_view("\1\0\1", 3));
  file.string("u64").u32(10).u64(~std::uint64_t{0});
  file.string("i64").u32(11).number(std::numeric_limits<std::int64_t>::min());
  file.string("f64").u32(12).number(-0.1);
  file.tensor("blk.0.attn_q.weight", {3, 2}, 0, 0).tensor("blk.0.ffn_up.weight", {32, 1, 2}, 8, 32).pad();
  const std::size_t data = file.text.size();
  for (int i = 0; i < 6; ++i) file.number(static_cast<float>(i));
  file.pad().zeros(68).pad();

  for (const std::uint32_t version : {2U, 3U}) {
    file.text[4] = static_cast<char>(version);
    const GgufContents contents = parse(file);
    CHECK(contents.version == version);
    REQUIRE(contents.metadata.size() == 14);
    CHECK(contents.metadata[3].key == "i16");
    CHECK(*contents.find_as<std::uint8_t>("u8") == 200);
    CHECK(*contents.find_as<std::int8_t>("i8") == -100);
    CHECK(*contents.find_as<std::uint16_t>("u16") == 60000);
    CHECK(*contents.find_as<std::int16_t>("i16") == -30000);
    CHECK(*contents.find_as<std::uint32_t>("u32") == 4'000'000'000);
    CHECK(*contents.find_as<std::int32_t>("i32") == -2'000'000'000);
    CHECK(*contents.find_as<float>("f32") == 0.1F);
    CHECK(*contents.find_as<bool>("yes"));
    CHECK(*contents.find_as<std::string>("text") == "caf\xc3\xa9");
    CHECK(std::get<std::vector<std::string>>(*contents.find_as<GgufArray>("strings")) == std::vector<std::string>{"a", ""});
    CHECK(std::get<std::vector<bool>>(*contents.find_as<GgufArray>("bools")) == std::vector<bool>{true, false, true});
    CHECK(*contents.find_as<std::uint64_t>("u64") == ~std::uint64_t{0});
    CHECK(*contents.find_as<std::int64_t>("i64") == std::numeric_limits<std::int64_t>::min());
    CHECK(*contents.find_as<double>("f64") == -0.1);
    CHECK(contents.find_as<float>("f64") == nullptr);
    CHECK(contents.find("none") == nullptr);

    REQUIRE(contents.tensors.size() == 2);
    const auto q = contents.tensors[0].view();
    REQUIRE(q.has_value());
    CHECK(q->dtype == DType::F32);
    CHECK(q->shape == std::vector<Index>{2, 3});  // ne from behind: rows of three
    CHECK(static_cast<const void*>(q->bytes.data()) == file.text.data() + data);
    CHECK(matrix_of<float>(*q, "a.gguf")(1, 0) == 3);
    const GgufTensor* up = contents.find_tensor("blk.0.ffn_up.weight");
    REQUIRE(up != nullptr);
    CHECK(up->type->name == "Q8_0");
    CHECK(up->shape == std::vector<Index>{2, 1, 32});
    CHECK(up->bytes.size() == 2 * 34);
    CHECK_FALSE(up->view().has_value());
    CHECK(contents.find_tensor("blk.0.attn_q") == nullptr);
  }
}

TEST_CASE("What ggml's reader refuses is refused, by name and byte") {
  struct Case {
    const char* name;
    Bytes file;
    const char* message;
  };
  const std::string name_63(63, 'n'), name_64(64, 'n');
  const std::uint64_t big = std::uint64_t{1} << 40, negative = ~std::uint64_t{0};
  const std::vector<Case> cases{
      {"empty", Bytes(), "byte 0: expected a GGUF file, which begins with \"GGUF\", got \"\""},
      {"three bytes", Bytes().raw("GGU"), "got \"GGU\""},
      {"another magic", Bytes().raw("GGML").zeros(30), "got \"GGML\""},
      {"a pickle in a zip", Bytes().raw("PK\3\4").zeros(30), "looks like a zip archive"},
      {"a Git LFS pointer", Bytes().raw("version https://git-lfs.github.com/spec/v1\n"), "looks like a Git LFS pointer"},
      {"no version", Bytes().raw("GGUF"), "byte 4: expected 4 bytes more, got the end of the file after 0"},
      {"version 0", header(0, 0, 0), "byte 4: expected version 2 or 3, got 0"},
      {"version 1", header(0, 0, 1), "expected version 2 or 3, got 1, which ggml no longer reads either"},
      {"version 4", header(0, 0, 4), "expected version 2 or 3, got 4"},
      {"byte-swapped", header(0, 0, 0x03000000), "got 50331648: a big-endian file?"},
      {"no counts", Bytes().raw("GGUF").u32(3), "byte 8: expected 8 bytes more"},
      {"negative number of tensors", header(negative, 0), "number of tensors: expected at most the 0 that can be in the 8 bytes"},
      {"huge number of tensors", header(big, 0).zeros(240), "number of tensors: expected at most the 10 that"},
      {"one tensor too many", header(2, 0).tensor("a", {0}, 0, 0), "number of tensors: expected at most the 1 that"},
      {"negative number of entries", header(0, negative), "number of metadata entries: expected at most the 0"},
      {"huge number of entries", header(0, big).zeros(140), "number of metadata entries: expected at most the 10"},
      {"key past the end", header(0, 1).u64(20).zeros(12), "metadata: expected a string within the 12 bytes that follow, got one of 20"},
      {"key above 1 GiB", header(0, 1).u64((1 << 30) + 1).zeros(12), "expected a string of at most 2^30 bytes, got one of 1073741825"},
      {"empty key", header(0, 1).string("").u32(4).u32(1), "metadata: expected a key, got an empty one"},
      {"duplicate key", header(0, 2).string("k").u32(4).u32(1).string("k").u32(4).u32(2), "key \"k\": expected once, got it twice"},
      {"type 13", header(0, 1).string("k").u32(13).u64(0), "key \"k\": expected a type in [0, 12], got 13"},
      {"type -1", header(0, 1).string("k").u32(0xffffffff).u64(0), "expected a type in [0, 12], got 4294967295"},
      {"array of type 13", header(0, 1).string("k").u32(9).u32(13).u64(0), "expected an array of a type in [0, 12], got 13"},
      {"array of arrays", header(0, 1).string("k").u32(9).u32(9).u64(1).u32(4).u64(0), "got an array of arrays"},
      {"empty array of arrays", header(0, 1).string("k").u32(9).u32(9).u64(0), "got an array of arrays"},
      {"array past the end", header(0, 1).string("k").u32(9).u32(4).u64(3).u64(0), "array elements: expected at most the 2 that"},
      {"strings past the end", header(0, 1).string("k").u32(9).u32(8).u64(3).zeros(16), "array elements: expected at most the 2 that"},
      {"huge array", header(0, 1).string("k").u32(9).u32(12).u64(negative), "array elements: expected at most the 0 that"},
      {"bool of 2", header(0, 1).string("k").u32(7).raw("\2"), "key \"k\": expected a bool of 0 or 1, got 2"},
      {"value past the end", header(0, 1).string("kk").u32(10).u32(0), "key \"kk\": expected 8 bytes more, got the end"},
      {"string value past the end", header(0, 1).string("k").u32(8).u64(1), "key \"k\": expected a string within the 0 bytes"},
      {"alignment 0", with_alignment(0), "general.alignment: expected a power of two as u32"},
      {"alignment 24", with_alignment(24), "general.alignment: expected a power of two as u32"},
      {"alignment as u64", header(0, 1).string("general.alignment").u32(10).u64(32), "general.alignment: expected a power of two as u32"},
      {"name of 64 bytes", one_tensor(name_64, {4}, 0, 32), "name: expected at most 63 bytes, got 64"},
      {"duplicate tensor name", header(2, 0).tensor("a", {4}, 0, 0).tensor("a", {4}, 0, 32).pad().zeros(64),
       "tensor \"a\": name: expected once, got it twice"},
      {"five dimensions", one_tensor("a", {1, 1, 1, 1, 1}, 0, 32), "tensor \"a\": expected at most 4 dimensions, got 5"},
      {"negative dimension", one_tensor("a", {4, negative}, 0, 32), "expected dimensions of at least 0, got -1"},
      {"2^40 x 2^40 elements", one_tensor("a", {big, big}, 0, 32), "expected less than 2^63 elements, got more"},
      {"2^80 elements, the last dimension 0", one_tensor("a", {big, big, 0}, 0, 32), "expected less than 2^63 elements, got more"},
      {"2^80 elements, the first dimension 0", one_tensor("a", {0, big, big}, 0, 32), "expected less than 2^63 elements, got more"},
      {"2^62 elements of 8 bytes", one_tensor("a", {std::uint64_t{1} << 62}, 28, 32), "expected 4611686018427387904 × 8 bytes"},
      {"a type of elements that is gone", one_tensor("a", {32}, 4, 32), "expected a type of elements that is known, got number 4"},
      {"type of elements -1", one_tensor("a", {32}, 0xffffffff, 32), "a type of elements that is known, got number 4294967295"},
      {"rows of half a block", one_tensor("a", {16, 2}, 8, 64), "whole blocks of 32 elements (Q8_0), got rows of 16"},
      {"a quantised scalar", one_tensor("a", {}, 2, 32), "whole blocks of 32 elements (Q4_0), got rows of 1"},
      {"first offset not 0", one_tensor("a", {4}, 0, 64, 32), "tensor \"a\": offset: expected 0, where the tensor before it ends, got 32"},
      {"offset without padding", header(2, 0).tensor("a", {4}, 0, 0).tensor("b", {4}, 0, 16).pad().zeros(64),
       "tensor \"b\": offset: expected 32"},
      {"a gap", header(2, 0).tensor("a", {4}, 0, 0).tensor("b", {4}, 0, 64).pad().zeros(128), "tensor \"b\": offset: expected 32"},
      {"an overlap", header(2, 0).tensor("a", {4}, 0, 0).tensor("b", {4}, 0, 0).pad().zeros(64), "tensor \"b\": offset: expected 32"},
      {"tensor header cut short", header(1, 0).string("a").u32(2).u64(4).u32(0), "tensor \"a\": expected 8 bytes more"},
      {"no padding before the data", header(1, 0).tensor("a", {0}, 0, 0), "padding before the data: expected"},
      {"no data", one_tensor("a", {4}, 0, 0), "tensor \"a\": expected 4 × 4 bytes, got the end of the file after 0: was it cut short?"},
      {"truncated data", one_tensor("a", {16}, 0, 63), "tensor \"a\": expected 16 × 4 bytes, got the end of the file after 63"},
      {"truncated quantised data", one_tensor("a", {256, 2}, 14, 419), "tensor \"a\": expected 2 × 210 bytes, got the end"},
      {"no padding after the last tensor", one_tensor("a", {4}, 0, 31), "tensor \"a\": padding after it: expected 16 bytes more"},
  };
  for (const Case& refused : cases) {
    INFO(refused.name);
    CHECK_THROWS_SAYING(FormatError, parse(refused.file), "a.gguf: byte ", refused.message);
  }
  CHECK(parse(one_tensor(name_63, {4}, 0, 32)).tensors[0].name == name_63);
}

TEST_CASE("Every proper prefix of a file is refused") {
  const std::array<float, 9> values{};
  GgufContents contents;
  contents.metadata = {{"k", GgufArray(std::vector<std::string>{"x", "yz"})}, {"f", 2.5}};
  contents.tensors = {f32("a", {3, 3}, bytes_of(values)), f32("b", {1}, bytes_of(values).first(4))};
  const std::string whole = written(contents);
  CHECK(parse(whole).tensors.size() == 2);
  for (std::size_t size = 0; size < whole.size(); ++size) {
    INFO(size);
    CHECK_THROWS_SAYING(FormatError, parse(whole.substr(0, size)), "a.gguf: byte ");
  }
}

TEST_CASE("Bytes after the last tensor's padding are accepted, as by ggml, and belong to nothing") {
  const Bytes file = one_tensor("a", {4}, 0, 32).raw("more");
  CHECK(parse(file).tensors[0].bytes.size() == 16);
  CHECK(parse(header(0, 0).raw("more")).tensors.empty());
}

TEST_CASE("A file may align its tensors to any power of two") {
  for (const std::uint32_t alignment : {1U, 4U, 64U, 4096U}) {
    Bytes file = header(2, 1).string("general.alignment").u32(4).u32(alignment);
    const std::uint64_t second = (12 + alignment - 1) / alignment * alignment;
    file.tensor("a", {3}, 0, 0).tensor("b", {1}, 0, second).pad(alignment);
    const std::size_t data = file.text.size();
    file.number(1.0F).number(2.0F).number(3.0F).pad(alignment).number(4.0F).pad(alignment);
    const GgufContents contents = parse(file);
    CHECK(static_cast<const void*>(contents.tensors[1].bytes.data()) == file.text.data() + data + second);
    CHECK(written(contents) == file.text);
  }
}

TEST_CASE("An empty tensor is written if it can be read, however large its other dimensions") {
  const Index largest = std::numeric_limits<Index>::max();
  const std::string text = written({3, {}, {f32("t", {0, largest}, {})}});
  CHECK(parse(text).tensors[0].shape == std::vector<Index>{0, largest});
  CHECK_THROWS_SAYING(std::invalid_argument, written({3, {}, {f32("t", {0, largest, 2}, {})}}), "\"t\"", "can be counted");
}

TEST_CASE("Scalars, empty tensors and single bytes are tensors like others") {
  const Bytes file = header(3, 0).tensor("scalar", {}, 0, 0).tensor("none", {4, 0}, 30, 32).tensor("byte", {1}, 24, 32).pad().zeros(64);
  const GgufContents contents = parse(file);
  CHECK(contents.tensors[0].bytes.size() == 4);
  CHECK(contents.tensors[0].shape.empty());
  CHECK(contents.tensors[1].bytes.empty());
  CHECK(contents.tensors[1].shape == std::vector<Index>{0, 4});
  CHECK(contents.tensors[2].view()->dtype == DType::I8);
}

TEST_CASE("The sizes of ggml's blocks") {
  struct Size {
    std::uint32_t number;
    std::size_t elements, bytes;
  };
  // From the fields of the block structs: scales of two bytes, Q8_K one of four and 16 sums of two.
  const std::vector<Size> sizes{{0, 1, 4},
                                {1, 1, 2},
                                {2, 32, 2 + 16},
                                {3, 32, 4 + 16},
                                {6, 32, 2 + 4 + 16},
                                {7, 32, 8 + 16},
                                {8, 32, 2 + 32},
                                {9, 32, 4 + 32},
                                {10, 256, 16 + 64 + 4},
                                {11, 256, 32 + 64 + 12 + 2},
                                {12, 256, 4 + 12 + 128},
                                {13, 256, 4 + 12 + 32 + 128},
                                {14, 256, 128 + 64 + 16 + 2},
                                {15, 256, 4 + 256 + 32},
                                {24, 1, 1},
                                {25, 1, 2},
                                {26, 1, 4},
                                {27, 1, 8},
                                {28, 1, 8},
                                {30, 1, 2}};
  for (const Size& size : sizes) {
    INFO(size.number);
    const std::size_t padded = (size.bytes + 31) / 32 * 32;
    const Bytes file = one_tensor("a", {size.elements}, size.number, padded);
    CHECK(parse(file).tensors[0].bytes.size() == size.bytes);
    CHECK_THROWS_SAYING(FormatError, parse(one_tensor("a", {size.elements}, size.number, size.bytes - 1)), "was it cut short?");
  }
  CHECK(sizes.size() == ggml_types.size());
}

TEST_CASE("The writer's bytes are pinned") {
  const std::array<float, 6> values{1, 2, 3, 4, 5, 6};
  GgufContents contents;
  contents.metadata = {{"general.type", std::string("adapter")},
                       {"alpha", 16.0F},
                       {"flags", GgufArray(std::vector<bool>{true, false})},
                       {"names", GgufArray(std::vector<std::string>{"a", "bc"})}};
  contents.tensors = {f32("w", {2, 3}, bytes_of(values)), f32("s", {1}, bytes_of(values).first(4))};
  const auto zeros = [](std::size_t count) { return std::string(count, '\0'); };
  // clang-format off
  const std::string header(
      "GGUF" "\3\0\0\0" "\2\0\0\0\0\0\0\0" "\4\0\0\0\0\0\0\0"
      "\14\0\0\0\0\0\0\0" "general.type" "\10\0\0\0" "\7\0\0\0\0\0\0\0" "adapter"
      "\5\0\0\0\0\0\0\0" "alpha" "\6\0\0\0" "\0\0\200\101"
      "\5\0\0\0\0\0\0\0" "flags" "\11\0\0\0" "\7\0\0\0" "\2\0\0\0\0\0\0\0" "\1\0"
      "\5\0\0\0\0\0\0\0" "names" "\11\0\0\0" "\10\0\0\0" "\2\0\0\0\0\0\0\0" "\1\0\0\0\0\0\0\0" "a" "\2\0\0\0\0\0\0\0" "bc"
      "\1\0\0\0\0\0\0\0" "w" "\2\0\0\0" "\3\0\0\0\0\0\0\0" "\2\0\0\0\0\0\0\0" "\0\0\0\0" "\0\0\0\0\0\0\0\0"
      "\1\0\0\0\0\0\0\0" "s" "\1\0\0\0" "\1\0\0\0\0\0\0\0" "\0\0\0\0" "\40\0\0\0\0\0\0\0",
      237);
  const std::string w("\0\0\200\77" "\0\0\0\100" "\0\0\100\100" "\0\0\200\100" "\0\0\240\100" "\0\0\300\100", 24), s("\0\0\200\77", 4);
  // clang-format on
  const std::string expected = header + zeros(19) + w + zeros(8) + s + zeros(28);
  CHECK(written(contents) == expected);
  CHECK(written(parse(written(contents))) == expected);
}

TEST_CASE("What the reader would refuse, the writer does") {
  const std::array<float, 6> values{};
  const auto refuses = [](const GgufContents& contents, std::string_view message) {
    CHECK_THROWS_SAYING(std::invalid_argument, written(contents), "GGUF: ", message);
  };
  const auto tensors = [](std::vector<GgufTensor> list) { return GgufContents{3, {}, std::move(list)}; };
  const auto all = bytes_of(values);
  refuses({3, {{"", 1.0F}}, {}}, "key \"\": expected one that is not empty and occurs once");
  refuses({3, {{"k", 1.0F}, {"k", 1.0F}}, {}}, "key \"k\": expected one that is not empty and occurs once");
  refuses({3, {{"general.alignment", std::uint32_t{3}}}, {}}, "general.alignment: expected a power of two");
  refuses({3, {{"general.alignment", 32.0F}}, {}}, "general.alignment: expected a power of two");
  refuses(tensors({f32(std::string(64, 'n'), {6}, all)}), "name: expected at most 63 bytes, got 64");
  refuses(tensors({f32("a", {6}, all), f32("a", {6}, all)}), "tensor \"a\": name: expected once, got it twice");
  refuses(tensors({f32("a", {1, 1, 1, 1, 6}, all)}), "tensor \"a\": expected at most 4 dimensions, got 5");
  refuses(tensors({f32("a", {5}, all)}), "tensor \"a\": expected the bytes of 5 elements of type F32, got 24");
  refuses(tensors({f32("a", {-2, -3}, all)}), "tensor \"a\": expected dimensions of at least 0, got -2 × -3");
  refuses(tensors({f32("a", {0, -3}, {})}), "tensor \"a\": expected dimensions of at least 0, got 0 × -3");
  const Index many = Index{1} << 32;  // whose square is 0 in 64 bits, and 2⁶² · 4 bytes, too
  for (const std::vector<Index>& shape : {std::vector<Index>{many, many}, {many, many, 0}, {many, many / 4}})
    refuses(tensors({f32("a", shape, {})}), "tensor \"a\": expected ");
  refuses(tensors({{"a", ggml_type(8), {16}, all.first(17)}}), "expected the bytes of 16 elements of type Q8_0, got 17");
  CHECK_THROWS_SAYING(std::invalid_argument, written({3, {{"k", GgufArray(std::monostate())}}, {}}), "got an array of nothing");
  CHECK_THROWS_SAYING(std::invalid_argument, gguf_tensor({"a", DType::BOOL, {6}, all.first(6)}),
                      "tensor \"a\": expected a type that GGUF has, got BOOL");
}

TEST_CASE("A file is mapped under its name, and a malformed one is refused with it") {
  const TemporaryFolder folder;
  const auto path = folder / "a.gguf";
  const std::array<float, 2> values{0.5, -0.5};
  GgufContents contents;
  contents.tensors = {f32("w", {2}, bytes_of(values))};
  AtomicFile file(path);
  write_gguf(file, contents);
  file.commit();
  const GgufFile read(path);
  CHECK(read.name() == path.string());
  const GgufTensor* w = read.contents().find_tensor("w");
  REQUIRE(w != nullptr);
  std::array<float, 2> got{};
  copy_elements(*w->view(), got.data(), read.name());
  CHECK(got == values);

  put(path, "GGUF");
  CHECK_THROWS_SAYING(FormatError, GgufFile(path), path.string());
  std::filesystem::remove(path);
  CHECK_THROWS_SAYING(FileError, GgufFile(path), path.string());
}
