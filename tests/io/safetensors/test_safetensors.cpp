#include "dylora/io/safetensors/safetensors.hpp"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/malformed_safetensors.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

SafetensorsContents parsed(const std::string& bytes) { return parse_safetensors(std::as_bytes(std::span(bytes)), "probe.safetensors"); }
SafetensorsContents parsed(std::string&&) = delete;  // the tensors would point to nothing

/// A tensor of bytes that count up.
struct Counted {
  Counted(std::string name, DType dtype, std::vector<Index> shape, std::size_t size) : bytes(size, '\0') {
    for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>(i);
    view = {std::move(name), dtype, std::move(shape), {}};
  }
  operator TensorView() const {
    TensorView tensor = view;
    tensor.bytes = std::as_bytes(std::span(bytes));
    return tensor;
  }

  std::string bytes;
  TensorView view;
};

/// The bytes of the file that holds these.
std::string saved(const std::vector<TensorView>& tensors, const std::map<std::string, std::string>& metadata = {}) {
  const TemporaryFolder folder;
  save_safetensors(folder / "x", tensors, metadata);
  return contents_of(folder / "x");
}

std::string text_of(const TensorView& tensor) { return {reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size()}; }

/// What is the matter with the refusal to save these; nothing if it is as it should be, and the file that was there is as it was.
template <class Error>
std::string wrong_refusal(const std::vector<TensorView>& tensors, std::initializer_list<std::string_view> says,
                          const std::map<std::string, std::string>& metadata = {}) {
  const TemporaryFolder folder;
  put(folder / "x", "before");
  const std::string wrong = wrong_throw<Error>([&] { save_safetensors(folder / "x", tensors, metadata); }, says);
  if (!wrong.empty()) return wrong;
  if (contents_of(folder / "x") != "before") return "the file was changed";
  return std::filesystem::exists(folder / "x.part") ? "a part was left" : "";
}

}  // namespace

TEST_CASE("a malformed file is refused with its name and what is wrong with it") {
  const std::vector<SafetensorsProbe> probes = malformed_safetensors();
  CHECK(probes.size() >= 148);
  for (const SafetensorsProbe& probe : probes) {
    INFO(probe.name);
    std::string message = "accepted";
    try {
      parsed(probe.bytes);
    } catch (const FormatError& error) {
      message = error.what();
    }
    INFO(message);
    CHECK(message.starts_with("probe.safetensors: "));
    CHECK(message.size() < 300);
    for (const std::string& part : probe.says) CHECK(message.find(part) != std::string::npos);
  }
}

TEST_CASE("no cause is given that nothing speaks for") {
  const auto ends = [](const std::string& bytes, std::string_view end) {
    try {
      parsed(bytes);
    } catch (const FormatError& error) {
      return std::string_view(error.what()).ends_with(end);
    }
    return false;
  };
  const std::string data = safetensors_bytes(good_header(), 16).substr(8);
  CHECK(ends(size_word(0) + data, "expected 1 to 100000000, got 0"));
  CHECK(ends(size_word(UINT64_MAX) + data, "expected 1 to 100000000, got 18446744073709551615"));
  CHECK(ends("hello, world", "got 8583909746840200552"));
  CHECK(ends("hello", "at least 8 bytes, got 5"));
}

TEST_CASE("an unusual file that the format allows is read") {
  for (const UnusualSafetensors& file : unusual_safetensors()) {
    INFO(file.name);
    CHECK(parsed(file.bytes).tensors.size() == file.tensors);
  }
}

TEST_CASE("every beginning of a good file is refused, and says how much is missing where it can") {
  const std::string good = safetensors_bytes(good_header(), 16);
  for (std::size_t size = 0; size < good.size(); ++size) {
    INFO(size);
    const std::string missing = size < 9    ? ""
                                : size < 65 ? "missing of it: " + std::to_string(65 - size)
                                            : std::to_string(81 - size) + " (a tr";
    const std::string beginning = good.substr(0, size);
    CHECK_THROWS_SAYING(FormatError, parsed(beginning), "probe.safetensors: ", missing);
  }
}

TEST_CASE("what a file says of its tensors is what is read") {
  const std::string bytes =
      safetensors_bytes(R"({"b":{"dtype":"F32","shape":[2,1],"data_offsets":[3,11]},"__metadata__":{"k":"v","":"\u00fc"},)"
                        R"("a\u0000":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
                        R"("s":{"dtype":"BF16","shape":[],"data_offsets":[11,13]}})",
                        13);
  const SafetensorsContents contents = parsed(bytes);
  CHECK(contents.metadata == std::map<std::string, std::string>{{"", "\xc3\xbc"}, {"k", "v"}});
  REQUIRE(contents.tensors.size() == 3);
  const std::byte* data = std::as_bytes(std::span(bytes)).data() + bytes.size() - 13;
  const TensorView &a = contents.tensors[0], &b = contents.tensors[1], &s = contents.tensors[2];
  CHECK((a.name == std::string("a\0", 2) && a.dtype == DType::U8 && a.shape == std::vector<Index>{3}));
  CHECK((a.bytes.data() == data && a.bytes.size() == 3 && a.size() == 3));
  CHECK((b.name == "b" && b.dtype == DType::F32 && b.shape == std::vector<Index>{2, 1}));
  CHECK((b.bytes.data() == data + 3 && b.bytes.size() == 8 && b.size() == 2));
  CHECK((s.name == "s" && s.dtype == DType::BF16 && s.shape.empty()));
  CHECK((s.bytes.data() == data + 11 && s.bytes.size() == 2 && s.size() == 1));
  for (const TensorView& tensor : contents.tensors) CHECK(contents.find(tensor.name) == &tensor);
  for (const char* none : {"", "a", "B", "c", "__metadata__"}) CHECK(contents.find(none) == nullptr);
}

TEST_CASE("a file begins with its length, metadata and tensors in a compact text padded to 8 bytes") {
  const Counted tensor("test", DType::I32, {2, 2}, 16);
  CHECK(saved({tensor}) == std::string("\x60\0\0\0\0\0\0\0", 8) +
                               R"({"__metadata__":{"format":"pt"},"test":{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]}})" + "     " +
                               std::string("\0\1\2\3\4\5\6\7\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f", 16));
}

TEST_CASE("what the reference writes is read") {
  const std::string bytes =
      std::string("\x40\0\0\0\0\0\0\0", 8) + R"({"test":{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]}}    )" + std::string(16, '\0');
  const SafetensorsContents contents = parsed(bytes);
  CHECK(contents.metadata.empty());
  REQUIRE(contents.tensors.size() == 1);
  CHECK(contents.tensors[0].name == "test");
  CHECK(text_of(contents.tensors[0]) == std::string(16, '\0'));
}

TEST_CASE("tensors lie by the alignment of their types, the largest first, then by name") {
  const Counted a("a", DType::U8, {3}, 3), b("b", DType::F32, {1, 1}, 4), c("c", DType::F32, {}, 4), d("d", DType::F16, {1}, 2),
      e("e", DType::BF16, {1}, 2), f("f", DType::F64, {0}, 0), g("A", DType::I64, {1}, 8);
  const std::vector<TensorView> tensors{a, b, c, d, e, f, g};
  const std::string expected =
      R"({"__metadata__":{"a":"1","b\n":"","format":"pt"},"A":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
      R"("f":{"dtype":"F64","shape":[0],"data_offsets":[8,8]},"b":{"dtype":"F32","shape":[1,1],"data_offsets":[8,12]},)"
      R"("c":{"dtype":"F32","shape":[],"data_offsets":[12,16]},"e":{"dtype":"BF16","shape":[1],"data_offsets":[16,18]},)"
      R"("d":{"dtype":"F16","shape":[1],"data_offsets":[18,20]},"a":{"dtype":"U8","shape":[3],"data_offsets":[20,23]}})";
  const std::string data = g.bytes + b.bytes + c.bytes + e.bytes + d.bytes + a.bytes;
  const std::string got = saved(tensors, {{"b\n", ""}, {"a", "1"}});
  CHECK(got.substr(8, expected.size()) == expected);
  const std::size_t padding = (8 - expected.size() % 8) % 8;
  CHECK(got == size_word(expected.size() + padding) + expected + std::string(padding, ' ') + data);

  CHECK(saved({g, f, e, d, c, b, a}, {{"a", "1"}, {"b\n", ""}}) == got);  // in another order, too
}

TEST_CASE("every length of name leaves the data at a multiple of 8") {
  for (std::size_t length = 0; length < 17; ++length) {
    const Counted tensor(std::string(length, 'n'), DType::F64, {1}, 8);
    const std::string file = saved({tensor});
    CHECK(file.size() % 8 == 0);
    CHECK(text_of(parsed(file).tensors.at(0)) == tensor.bytes);
  }
}

TEST_CASE("what is written is read back, of every type") {
  std::vector<Counted> all;
  for (std::size_t i = 0; i < dtype_infos.size(); ++i) {
    const auto bytes = static_cast<std::size_t>(dtype_infos[i].bits);  // of 8 elements
    all.emplace_back("tensor " + std::to_string(i), static_cast<DType>(i), std::vector<Index>{2, 1, 4}, bytes);
  }
  const std::map<std::string, std::string> metadata{{"format", "mlx"}, {"", "\0"}, {"\xc3\xbc", "\"\\/\b\x7f"}};
  const std::string file = saved({all.begin(), all.end()}, metadata);
  const SafetensorsContents contents = parsed(file);
  CHECK(contents.metadata == metadata);
  CHECK(contents.tensors.size() == all.size());
  for (const TensorView written : all) {
    const TensorView* read = contents.find(written.name);
    REQUIRE(read != nullptr);
    CHECK(read->dtype == written.dtype);
    CHECK(read->shape == written.shape);
    CHECK(text_of(*read) == text_of(written));
  }
}

TEST_CASE("a saved matrix is mapped and read as it was, under any name") {
  const TemporaryFolder folder;
  const RowMatrix<float> A = noise<float>(5, 7, 1);
  const RowMatrix<double> B = noise<double>(3, 4, 2);
  const std::string odd("/ \\ \" \0 \n ../\xf0\x9f\xa4\x97 \x7f", 19);
  save_safetensors(folder / "x.safetensors", {tensor_view(odd, A), tensor_view("", B)}, {{"key", odd}});
  const SafetensorsFile file(folder / "x.safetensors");
  CHECK(file.name() == (folder / "x.safetensors").string());
  CHECK(file.metadata() == std::map<std::string, std::string>{{"format", "pt"}, {"key", odd}});
  REQUIRE(file.find(odd) != nullptr);
  REQUIRE(file.find("") != nullptr);
  CHECK(file.find("A") == nullptr);
  CHECK(matrix_of<float>(*file.find(odd), file.name()) == A);
  CHECK(matrix_of<double>(*file.find(""), file.name()) == B);
  CHECK(elements_in_place<float>(*file.find(odd)) != nullptr);
  CHECK(elements_in_place<double>(*file.find("")) != nullptr);
}

TEST_CASE("a file that cannot be read, or is malformed, is named") {
  const TemporaryFolder folder;
  const std::string missing = (folder / "missing.safetensors").string();
  CHECK_THROWS_SAYING(FileError, SafetensorsFile(missing), missing + ": cannot read: No such file or directory");
  put(folder / "bad.safetensors", "version https://git-lfs.github.com/spec/v1\n");
  const std::string bad = (folder / "bad.safetensors").string();
  CHECK_THROWS_SAYING(FormatError, SafetensorsFile(bad), bad + ": byte 0: ", "a Git LFS pointer");
}

TEST_CASE("what no reader should get is not written, and leaves the file as it was") {
  const Counted good("w", DType::I32, {2, 2}, 16), same("w", DType::U8, {1}, 1), bad_name("a\xff", DType::U8, {1}, 1);
  const Counted reserved("__metadata__", DType::U8, {1}, 1), short_by_one("w", DType::I32, {2, 2}, 15),
      long_by_one("w", DType::I32, {2, 2}, 17);
  const Counted negative("w", DType::I32, {-2, -2}, 16), deep("w", DType::U8, std::vector<Index>(65, 1), 1),
      wide("w", DType::U8, {0, (Index{1} << 48) + 1}, 0);
  const Counted overflow("w", DType::I32, {Index{1} << 48, Index{1} << 48}, 0), half_byte("w", DType::F4, {3}, 1);
  using Invalid = std::invalid_argument;
  CHECK(wrong_refusal<Invalid>({}, {"safetensors: expected at least one tensor, got none"}) == "");
  CHECK(wrong_refusal<Invalid>({good, same}, {"safetensors: tensor \"w\": expected once, got it twice"}) == "");
  CHECK(wrong_refusal<Invalid>({good, bad_name}, {"expected names and metadata in UTF-8, got \"a\\xff\""}) == "");
  CHECK(wrong_refusal<Invalid>({good}, {"expected names and metadata in UTF-8, got \"\\xc0\\x80\""}, {{"\xc0\x80", ""}}) == "");
  CHECK(wrong_refusal<Invalid>({good}, {"expected names and metadata in UTF-8, got \"\\xed\\xa0\\x80\""}, {{"a", "\xed\xa0\x80"}}) == "");
  CHECK(wrong_refusal<Invalid>({good, reserved}, {"tensor \"__metadata__\": expected another name"}) == "");
  CHECK(wrong_refusal<Invalid>({short_by_one}, {"tensor \"w\": expected the bytes of I32, 2 × 2, got 15"}) == "");
  CHECK(wrong_refusal<Invalid>({long_by_one}, {"tensor \"w\": expected the bytes of I32, 2 × 2, got 17"}) == "");
  CHECK(wrong_refusal<Invalid>({negative}, {"tensor \"w\": expected extents in [0, 2^48], got -2"}) == "");
  CHECK(wrong_refusal<Invalid>({wide}, {"tensor \"w\": expected extents in [0, 2^48], got 281474976710657"}) == "");
  CHECK(wrong_refusal<Invalid>({deep}, {"tensor \"w\": expected at most 64 dimensions, got 65"}) == "");
  CHECK(wrong_refusal<Invalid>({overflow}, {"tensor \"w\": expected the bytes of I32"}) == "");
  CHECK(wrong_refusal<Invalid>({half_byte}, {"tensor \"w\": expected the bytes of F4, 3, got 1"}) == "");
  CHECK(wrong_refusal<Invalid>({good}, {"expected a header of at most 100000000 bytes, got 1000000"},
                               {{"a", std::string(100'000'000, 'a')}}) == "");
}

TEST_CASE("a NaN or an infinity is not written, in any floating-point type") {
  const Counted before("a", DType::U8, {3}, 3);
  const auto refusal = [&](DType dtype, const auto& values) {
    const auto bytes = std::as_bytes(std::span(values));
    return wrong_refusal<NonFiniteError>({before, TensorView{"w", dtype, {static_cast<Index>(values.size())}, bytes}},
                                         {"safetensors: tensor \"w\": expected finite values, got a NaN or an infinity"});
  };
  const std::string written = "nothing was thrown";
  const auto max_float = std::numeric_limits<float>::max();
  const auto max_double = std::numeric_limits<double>::max();
  for (const bool negative : {false, true}) {
    const std::uint16_t sign = negative ? 0x8000 : 0;
    const auto half = [&](int bits) { return std::vector<std::uint16_t>{0, 1, static_cast<std::uint16_t>(sign | bits)}; };
    for (const int bits : {0x7c00, 0x7c01, 0x7e00, 0x7fff}) CHECK(refusal(DType::F16, half(bits)) == "");
    for (const int bits : {0x7f80, 0x7f81, 0x7fc0, 0x7fff}) CHECK(refusal(DType::BF16, half(bits)) == "");
    for (const int bits : {0x7bff, 0x0400, 0x03ff}) CHECK(refusal(DType::F16, half(bits)) == written);
    for (const int bits : {0x7f7f, 0x7c00, 0x0001}) CHECK(refusal(DType::BF16, half(bits)) == written);
    const float f = negative ? -1.0f : 1.0f;
    const double d = negative ? -1.0 : 1.0;
    for (const float bad : {f * std::numeric_limits<float>::infinity(), f * nan<float>})
      CHECK(refusal(DType::F32, std::vector<float>{1, bad, 1}) == "");
    for (const double bad : {d * std::numeric_limits<double>::infinity(), d * nan<double>})
      CHECK(refusal(DType::F64, std::vector<double>{bad, 1}) == "");
    CHECK(refusal(DType::F32, std::vector<float>{f * max_float, f * std::numeric_limits<float>::denorm_min()}) == written);
    CHECK(refusal(DType::F64, std::vector<double>{d * max_double, d * std::numeric_limits<double>::denorm_min()}) == written);
  }
  CHECK(refusal(DType::U16, std::vector<std::uint16_t>{0x7c00, 0xffff}) == written);  // no number can be wrong there
  CHECK(refusal(DType::I64, std::vector<std::int64_t>{-1}) == written);
}

TEST_CASE("100 000 tensors are written, read and found by name") {
  const std::vector<std::uint8_t> one{7};
  std::vector<TensorView> tensors;
  for (int i = 0; i < 100'000; ++i) tensors.push_back(tensor_view("tensor " + std::to_string(i), one));
  const TemporaryFolder folder;
  save_safetensors(folder / "x", tensors);
  const SafetensorsFile file(folder / "x");
  std::size_t found = 0;
  for (const TensorView& tensor : tensors) {
    const TensorView* read = file.find(tensor.name);
    if (read != nullptr && read->name == tensor.name) ++found;
    if (file.find(tensor.name + "x") != nullptr) --found;
  }
  CHECK(found == tensors.size());
}

}  // namespace dylora::test
