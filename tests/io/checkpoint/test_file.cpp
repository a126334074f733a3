#include "dylora/io/checkpoint/file.hpp"

#include <cstddef>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/random.hpp"
#include "dylora/io/safetensors/safetensors.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

/// A little of everything.
struct Small {
  Index count = 0;
  double loss = 0;
  bool on = false;
  std::string text;
  Rng rng;
  std::vector<Index> order;
  std::vector<double> losses;
  LowRank<float> adapter;

  explicit Small(std::uint64_t seed)
      : count(static_cast<Index>(seed)),
        loss(static_cast<double>(seed) / 3),
        on(seed % 2 == 1),
        text(seed, 't'),
        rng(seed),
        order(seed, 1),
        losses(seed, 0.5),
        adapter(noise<float>(2, 3, seed), noise<float>(4, 2, seed + 1), {}) {}

  void state(auto& archive) {
    archive("count", count);
    archive("loss", loss);
    archive("on", on);
    archive("text", text);
    archive("rng", rng);
    archive("order", order);
    archive("losses", losses);
    archive.parameters("adapter", adapter);
    archive.same("options", "as they were");
  }
};

std::string bytes_of(Small small, Index step = 12) {
  return checkpoint_bytes(step, [&](auto& archive) { small.state(archive); });
}

Index read_into(Small& small, std::string_view bytes) {
  return read_checkpoint(std::as_bytes(std::span(bytes)), "file", [&](auto& archive) { small.state(archive); });
}

std::string with_checksum(std::string bytes) {
  return bytes.replace(detail::checksum_position, 16, detail::checkpoint_checksum(std::as_bytes(std::span(bytes))));
}

std::string replaced(std::string bytes, std::string_view from, std::string_view to) {
  REQUIRE(from.size() == to.size());
  const std::size_t at = bytes.find(from);
  REQUIRE(at != std::string::npos);
  return bytes.replace(at, from.size(), to);
}

}  // namespace

TEST_CASE("one state has one sequence of bytes, which gives it back") {
  const std::string bytes = bytes_of(Small(5));
  CHECK(bytes == bytes_of(Small(5)));
  CHECK(bytes != bytes_of(Small(5), 13));
  Small other(8);
  CHECK(bytes_of(other) != bytes);
  CHECK(read_into(other, bytes) == 12);
  CHECK(bytes_of(other) == bytes);
}

TEST_CASE("the order of a description does not matter") {
  Index a = 1, b = 2;
  std::vector<double> x{1}, y{2};
  const std::string forward = checkpoint_bytes(0, [&](auto& archive) {
    archive("a", a);
    archive("b", b);
    archive("x", x);
    archive("y", y);
  });
  const std::string backward = checkpoint_bytes(0, [&](auto& archive) {
    archive("y", y);
    archive("x", x);
    archive("b", b);
    archive("a", a);
  });
  CHECK(forward == backward);
}

TEST_CASE("a checkpoint is a safetensors file, its matrices row by row and its values in JSON") {
  const std::string bytes = bytes_of(Small(5));
  const SafetensorsContents contents = parse_safetensors(std::as_bytes(std::span(bytes)), "file");
  const LowRank<float> adapter = Small(5).adapter;
  const TensorView* A = contents.find("adapter.lora_A");
  const TensorView* B = contents.find("adapter.lora_B");
  REQUIRE((A != nullptr && B != nullptr));
  CHECK(matrix_of<float>(*A, "file") == adapter.A);
  CHECK(matrix_of<float>(*B, "file") == adapter.B);
  CHECK(contents.metadata == std::map<std::string, std::string>{{"checksum", contents.metadata.at("checksum")},
                                                                {"dylora", "checkpoint 1"},
                                                                {"format", "pt"},
                                                                {"same.adapter.max_rank", "2"},
                                                                {"same.adapter.scale at max_rank", "8.0"},
                                                                {"same.adapter.scale at rank 1", "16.0"},
                                                                {"same.options", "\"as they were\""},
                                                                {"state.count", "5"},
                                                                {"state.loss", "1.6666666666666667"},
                                                                {"state.on", "true"},
                                                                {"state.rng", "5"},
                                                                {"state.text", "\"ttttt\""},
                                                                {"step", "12"}});
}

TEST_CASE("a state of nothing but values is a checkpoint, and so is none") {
  Index count = 3, other = 4;
  const std::string bytes = checkpoint_bytes(7, [&](auto& archive) { archive("count", count); });
  CHECK(read_checkpoint(std::as_bytes(std::span(bytes)), "file", [&](auto& archive) { archive("count", other); }) == 7);
  CHECK(other == 3);
  const std::string none = checkpoint_bytes(8, [](auto&) {});
  CHECK(read_checkpoint(std::as_bytes(std::span(none)), "file", [](auto&) {}) == 8);
}

TEST_CASE("a file with any one bit changed is refused and changes nothing") {
  const std::string whole = bytes_of(Small(5)), untouched = bytes_of(Small(8));
  Small small(8);
  std::string damaged = whole;
  for (std::size_t i = 0; i < whole.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      damaged[i] = static_cast<char>(whole[i] ^ (1 << bit));
      const std::string wrong = wrong_throw<FormatError>([&] { read_into(small, damaged); }, {"file: expected"});
      if (wrong != "") FAIL("byte " << i << ", bit " << bit << ": " << wrong);
    }
    damaged[i] = whole[i];
  }
  CHECK(bytes_of(small) == untouched);
  read_into(small, damaged);
  CHECK(bytes_of(small) == whole);
}

TEST_CASE("a file cut short anywhere, or with bytes added, is refused and changes nothing") {
  const std::string whole = bytes_of(Small(5)), untouched = bytes_of(Small(8));
  Small small(8);
  for (std::size_t size = 0; size < whole.size(); ++size) {
    // In memory of its own, so that reading past its end is found out.
    const std::vector<char> cut(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size));
    const std::string wrong = wrong_throw<FormatError>([&] { read_into(small, {cut.data(), cut.size()}); }, {"file: expected"});
    if (wrong != "") FAIL(size << " bytes: " << wrong);
  }
  for (const std::size_t added : {1u, 7u, 8u, 4096u}) {
    CHECK_THROWS_SAYING(FormatError, read_into(small, whole + std::string(added, '\0')), "file: expected bytes with the checksum",
                        "damaged");
  }
  CHECK(bytes_of(small) == untouched);
}

TEST_CASE("blocks that are lost, zeroed or exchanged are seen") {
  const std::string whole = bytes_of(Small(5));
  Small small(8);
  const auto refused = [&](const std::string& bytes) {
    return wrong_throw<FormatError>([&] { read_into(small, bytes); }, {"file: expected"});
  };
  for (std::size_t begin = 0; begin + 64 <= whole.size(); begin += 8) {
    std::string lost = whole, zeroed = whole, exchanged = whole;
    CHECK(refused(lost.erase(begin, 32)) == "");
    zeroed.replace(begin, 32, 32, '\0');
    if (zeroed != whole) CHECK(refused(zeroed) == "");
    exchanged.replace(begin, 32, whole.substr(begin + 32, 32)).replace(begin + 32, 32, whole.substr(begin, 32));
    if (exchanged != whole) CHECK(refused(exchanged) == "");
  }
}

TEST_CASE("files of other kinds and versions are refused for what they are") {
  Small small(8);
  const auto says = [&](const std::string& bytes, std::string_view what) {
    CHECK_THROWS_SAYING(FormatError, read_into(small, bytes), what);
  };
  const std::string whole = bytes_of(Small(5)), other = "file: expected the beginning of a checkpoint, got other bytes";
  says("", other);
  says("version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef0123456789abcdef\n", other);
  const std::vector<float> values(64);
  const std::vector<TensorView> tensors{tensor_view("values", values)};
  says(safetensors_beginning(tensors, {{"format", "pt"}}) + std::string(256, '\0'), other);
  says(with_checksum(replaced(whole, "checkpoint 1", "checkpoint 2")), "file: expected a checkpoint 1, got \"checkpoint 2\"");
  says(with_checksum(replaced(whole, "\"step\":\"12\"", "\"step\":\"-2\"")), "file: expected the number of a step, got \"-2\"");
  says(with_checksum(replaced(whole, "\"step\":\"12\"", "\"stop\":\"12\"")), "file: expected the number of a step, got \"\"");
  says(replaced(whole, "checkpoint 1", "checkpoint 2"), "damaged");
}

TEST_CASE("values that no run writes are refused by name, whatever the checksum says") {
  Small small(8);
  const std::string whole = bytes_of(Small(5)), untouched = bytes_of(Small(8));
  const auto says = [&](std::string_view from, std::string_view to, std::string_view what) {
    CHECK_THROWS_SAYING(FormatError, read_into(small, with_checksum(replaced(whole, from, to))), "file: expected a checkpoint of this run",
                        what);
    CHECK(bytes_of(small) == untouched);
  };
  says("\"state.count\":\"5\"", "\"state.count\":\"x\"", "count: the checkpoint has x, this run an integer of 64 bits");
  says("\"state.count\":\"5\"", "\"state.count\":\"[\"", "count: the checkpoint has [, this run an integer of 64 bits");
  says("\"state.count\":\"5\"", "\"state.count\":\" \"", "count: the checkpoint has  , this run an integer of 64 bits");
  says("\"1.6666666666666667\"", "\"1.66666666666e9999\"", "loss: the checkpoint has 1.66666666666e9999, this run a number");
  says("\"state.on\":\"true\"", "\"state.on\":\"null\"", "on: the checkpoint has null, this run a boolean");
  // The same name twice, for a value and for a tensor.
  says("\"state.text\":\"\\\"ttttt\\\"\"", "\"state.order\":\"\\\"ttt\\\" \"", "order: the checkpoint has \"ttt\" , this run none");
  for (const auto& [name, what] :
       {std::pair("losses", "losses: the checkpoint has F64 5, this run refuses it: it has a NaN or an infinity"),
        std::pair("adapter.lora_B", "adapter.lora_B: the checkpoint has F32 4 × 2, this run refuses it: it has a NaN")}) {
    std::string not_finite = whole;
    const SafetensorsContents contents = parse_safetensors(std::as_bytes(std::span(not_finite)), "file");
    const auto at = reinterpret_cast<const char*>(contents.find(name)->bytes.data()) - not_finite.data();
    std::memset(not_finite.data() + at, 0xff, 8);
    CHECK_THROWS_SAYING(FormatError, read_into(small, with_checksum(not_finite)), what);
    CHECK(bytes_of(small) == untouched);
  }
}

}  // namespace dylora::test
