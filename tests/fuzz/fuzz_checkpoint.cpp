#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/random.hpp"
#include "dylora/io/checkpoint/file.hpp"
#include "dylora/train/adamw.hpp"

using namespace dylora;

namespace {

void require(bool held) {
  if (!held) std::abort();
}

LowRank<float> small_adapter() {
  Rng rng(1);
  return LowRank<float>(3, 2, {.max_rank = 2}, rng);
}

/// A little of everything that a checkpoint can hold.
struct State {
  LowRank<float> adapter = small_adapter();
  AdamW<LowRank<float>> optimizer{adapter};
  Index step = 3;
  std::uint64_t seed = 4;
  double loss = 0.5;
  bool done = false;
  std::string text = "text";
  Rng rng{5};
  std::vector<Index> order{1, 2};
  std::vector<double> losses{0.5};

  void state(auto& archive) {
    archive.parameters("model", adapter);
    archive("optimizer", optimizer);
    archive("step", step);
    archive("seed", seed);
    archive("loss", loss);
    archive("done", done);
    archive("text", text);
    archive("rng", rng);
    archive("order", order);
    archive("losses", losses);
    archive.same("batch", 32);
  }

  std::string bytes() {
    return checkpoint_bytes(12, [&](auto& archive) { state(archive); });
  }

  /// Whether they were accepted.
  bool read(std::string_view bytes) {
    try {
      read_checkpoint(std::as_bytes(std::span(bytes)), "file", [&](auto& archive) { state(archive); });
      return true;
    } catch (const FormatError&) {
      return false;
    }
  }
};

}  // namespace

/// As it is, the input is refused, or it is what some run wrote. With the right checksum, it either gives a state that can be written and
/// read again, or changes nothing.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::string fresh = State().bytes();
  std::string bytes(reinterpret_cast<const char*>(data), size);
  State state;
  if (!state.read(bytes)) require(state.bytes() == fresh);
  if (size < 64) return 0;
  bytes.replace(detail::checksum_position, detail::checksum_digits, detail::checkpoint_checksum(std::as_bytes(std::span(bytes))));
  State changed, again;
  if (!changed.read(bytes)) {
    require(changed.bytes() == fresh);
  } else {
    const std::string written = changed.bytes();
    require(again.read(written));
    require(again.bytes() == written);
  }
  return 0;
}
