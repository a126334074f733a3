#include "dylora/io/checkpoint/archive.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "dylora/adapters/dropout.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/adapters/none.hpp"
#include "dylora/adapters/stacked.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/io/checkpoint/file.hpp"
#include "dylora/layers/attention/attention.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/methods/nola/nola.hpp"
#include "dylora/methods/pissa/offset_low_rank.hpp"
#include "dylora/ranks/scale.hpp"
#include "dylora/ranks/truncate.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/sgd.hpp"
#include "support/catch.hpp"
#include "support/make.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

template <class State>
void read_text(const std::string& bytes, State&& state) {
  read_checkpoint(std::as_bytes(std::span(bytes)), "run/file", state);
}

/// Writes one value and reads it into another.
template <class T>
T through_file(T value, T into) {
  const std::string bytes = checkpoint_bytes(0, [&](auto& archive) { archive("value", value); });
  read_text(bytes, [&](auto& archive) { archive("value", into); });
  return into;
}

/// What a run says that reads what another wrote; empty if it reads it.
template <class Write, class Read>
std::string difference(Write&& write, Read&& read) {
  const std::string bytes = checkpoint_bytes(0, write);
  try {
    read_text(bytes, read);
  } catch (const FormatError& error) {
    return error.what();
  }
  return "";
}

const std::string differs = "run/file: expected a checkpoint of this run, got one that differs:";

/// The least that has every kind of parameter: by rows, by columns, and a vector.
struct Mixed {
  using Scalar = float;
  struct Gradients {
    Gradient<RowMatrix<float>> rows;
    Gradient<MatrixX<float>> cols;
    VectorX<double> gate;
  };
  RowMatrix<float> rows;
  MatrixX<float> cols;
  VectorX<double> gate;

  explicit Mixed(std::uint64_t seed, Index components = 3, Index gates = 2)
      : rows(noise<float>(components, 4, seed)), cols(noise<float>(5, components, seed + 1)), gate(noise<double>(gates, 1, seed + 2)) {}

  static void members(const auto& f, auto&... t) {
    f(Parameter{"rows", RankAxis::rows}, t.rows...);
    f(Parameter{"cols", RankAxis::cols}, t.cols...);
    f(Parameter{"gate"}, t.gate...);
  }

  bool operator==(const Mixed& other) const { return rows == other.rows && cols == other.cols && gate == other.gate; }
};

struct Inner {
  Index count = 0;
  void state(auto& archive) { archive("count", count); }
};

struct Outer {
  Inner first, second;
  Index count = 0;
  void state(auto& archive) {
    archive("first", first);
    archive("second", second);
    archive("count", count);
  }
};

struct Everything {
  Index step = 1;
  double loss = 0.5;
  bool on = false;
  std::string text = "a";
  Rng rng{1};
  std::vector<Index> order{1, 2};
  Mixed model{1};
  void state(auto& archive) {
    archive("step", step);
    archive("loss", loss);
    archive("on", on);
    archive("text", text);
    archive("rng", rng);
    archive("order", order);
    archive.parameters("model", model);
  }
};

}  // namespace

TEST_CASE("every double comes back bit for bit") {
  Rng rng(1);
  std::vector<double> values{0.0, -0.0, 0.1, 1e22, 5e-324, -5e-324, 2.2250738585072011e-308, 1 / 3.0, 1.0, -1e300, 9007199254740993.0};
  values.insert(values.end(),
                {std::numeric_limits<double>::max(), std::numeric_limits<double>::lowest(), 0x1p-1022, 0x1.fffffffffffffp-1023});
  while (values.size() < 3000) {
    const double value = std::bit_cast<double>(rng.next());
    if (std::isfinite(value)) values.push_back(value);
  }
  for (const double value : values) {
    const double back = through_file(value, 7.0);
    if (std::bit_cast<std::uint64_t>(back) != std::bit_cast<std::uint64_t>(value)) FAIL(value << " became " << back);
  }
  CHECK(through_file(values, {}) == values);
}

TEST_CASE("every other kind of value comes back as it was") {
  for (const Index value : {Index{0}, Index{-1}, std::numeric_limits<Index>::max(), std::numeric_limits<Index>::min()}) {
    CHECK(through_file(value, Index{7}) == value);
  }
  CHECK(through_file(UINT64_MAX, std::uint64_t{7}) == UINT64_MAX);
  CHECK(through_file(-5, 7) == -5);
  CHECK(through_file(true, false));
  CHECK_FALSE(through_file(false, true));
  for (const std::string& text :
       {std::string(), std::string("1"), std::string("\"\\\n\t\x7f"), std::string("a\0b", 3), std::string("h\u00fc \u00d7")}) {
    CHECK(through_file(text, std::string("before")) == text);
  }
  for (const std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{1} << 63, UINT64_MAX}) {
    CHECK(through_file(Rng(seed), Rng(7)).state() == seed);
  }
  CHECK(through_file(std::vector<Index>{3, -4, 5}, {1}) == std::vector<Index>{3, -4, 5});
  CHECK(through_file(std::vector<Index>{}, {1}).empty());
  CHECK(through_file(std::vector<std::uint64_t>{UINT64_MAX}, {}) == std::vector<std::uint64_t>{UINT64_MAX});
  CHECK(through_file(std::vector<float>{0.1f, -0.f}, {}) == std::vector<float>{0.1f, -0.f});
}

TEST_CASE("parameters and their snapshots come back as they were") {
  Mixed model(1), other(10);
  auto snapshot = zeros_like(model), into = zeros_like(model);
  take_snapshot(Mixed(20), snapshot);
  const auto state = [](Mixed& trained, Mixed::Gradients& kept) {
    return [&](auto& archive) {
      archive.parameters("model", trained);
      archive.template parameters<Mixed>("good", kept);
    };
  };
  read_text(checkpoint_bytes(0, state(model, snapshot)), state(other, into));
  CHECK(other == model);
  CHECK(other == Mixed(1));
  restore_snapshot(other, into);
  CHECK(other == Mixed(20));
}

TEST_CASE("what describes itself has names of its own") {
  Outer outer{{1}, {2}, 3}, into;
  Index count = 4, other_count = 0;
  const std::string bytes = checkpoint_bytes(0, [&](auto& archive) {
    archive("outer", outer);
    archive("count", count);
  });
  for (const char* name : {"\"state.outer.first.count\":\"1\"", "\"state.outer.second.count\":\"2\"", "\"state.outer.count\":\"3\"",
                           "\"state.count\":\"4\""}) {
    CHECK(bytes.find(name) != std::string::npos);
  }
  read_text(bytes, [&](auto& archive) {
    archive("count", other_count);
    archive("outer", into);
  });
  CHECK(into.first.count == 1);
  CHECK(into.second.count == 2);
  CHECK(into.count == 3);
  CHECK(other_count == 4);
}

TEST_CASE("two parts of one name are refused, written or read") {
  Index one = 1;
  std::vector<double> many{1};
  const auto twice = [](auto first, auto second) {
    return [=](auto& archive) {
      first(archive);
      second(archive);
    };
  };
  const auto value = [&](auto& archive) { archive("x", one); };
  const auto tensor = [&](auto& archive) { archive("x", many); };
  const auto same = [&](auto& archive) { archive.same("x", 1); };
  const std::string says = "checkpoint: expected names that differ, got two of \"x\"";
  CHECK_THROWS_SAYING(std::invalid_argument, checkpoint_bytes(0, twice(value, value)), says);
  CHECK_THROWS_SAYING(std::invalid_argument, checkpoint_bytes(0, twice(value, tensor)), says);
  CHECK_THROWS_SAYING(std::invalid_argument, checkpoint_bytes(0, twice(tensor, same)), says);
  CHECK_THROWS_SAYING(std::invalid_argument, read_text(checkpoint_bytes(0, value), twice(value, same)), says);
}

TEST_CASE("text that is not UTF-8 is refused by name") {
  std::string text = "\xff";
  CHECK_THROWS_SAYING(std::invalid_argument, checkpoint_bytes(0, [&](auto& archive) { archive("path", text); }),
                      "path: expected text in UTF-8");
  CHECK_THROWS_SAYING(std::invalid_argument, checkpoint_bytes(0, [&](auto& archive) { archive.same("path", text); }),
                      "path: expected text in UTF-8");
  CHECK_THROWS_SAYING(std::invalid_argument, checkpoint_bytes(0, [&](auto& archive) { archive.same("\xff", 1); }), "UTF-8", "\\xff");
}

TEST_CASE("numbers that are not finite are refused by name") {
  for (double bad : {nan<double>, std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()}) {
    std::vector<double> values{1, bad};
    std::vector<float> floats{static_cast<float>(bad)};
    CHECK_THROWS_SAYING(NonFiniteError, checkpoint_bytes(0, [&](auto& archive) { archive("loss", bad); }),
                        "checkpoint: loss: expected a finite number, got");
    CHECK_THROWS_SAYING(NonFiniteError, checkpoint_bytes(0, [&](auto& archive) { archive("losses", values); }),
                        "checkpoint: losses: expected finite numbers, got a NaN or an infinity");
    CHECK_THROWS_SAYING(NonFiniteError, checkpoint_bytes(0, [&](auto& archive) { archive("losses", floats); }), "checkpoint: losses: ");
    for (const bool column : {false, true}) {
      Mixed model(1);
      (column ? model.cols(4, 2) : model.rows(2, 3)) = static_cast<float>(bad);
      CHECK_THROWS_SAYING(NonFiniteError, checkpoint_bytes(0, [&](auto& archive) { archive.parameters("model", model); }),
                          column ? "checkpoint: model.cols: expected finite numbers" : "checkpoint: model.rows: expected finite numbers");
    }
  }
}

TEST_CASE("all that differs is listed, and nothing is changed") {
  Everything written{2, 0.25, true, "b", Rng(2), {3}, Mixed(2)}, read;
  const std::string found = difference(
      [&](auto& archive) {
        archive("run", written);
        archive.same("lr", 0.001);
        archive.same("batch", 32);
        archive.same("gone", "it");
        archive("left over", written.step);
      },
      [&](auto& archive) {
        archive("run", read);
        archive.same("lr", 0.002);
        archive.same("batch", 32);
        archive.same("new", true);
        archive("missing", read.step);
      });
  CHECK(found == differs +
                     "\n  lr: the checkpoint has 0.001, this run 0.002"
                     "\n  new: the checkpoint has none, this run true"
                     "\n  missing: the checkpoint has none, this run an integer of 64 bits"
                     "\n  gone: the checkpoint has \"it\", this run none"
                     "\n  left over: the checkpoint has 2, this run none");
  CHECK((read.step == 1 && read.loss == 0.5 && !read.on && read.text == "a" && read.rng.state() == 1));
  CHECK(read.order == std::vector<Index>{1, 2});
  CHECK(read.model == Mixed(1));
}

TEST_CASE("of many differences ten are named and the rest counted") {
  const auto said = [](Index differing) {
    std::string named = differs;
    for (Index i = 0; i < std::min<Index>(differing, 10); ++i) named += "\n  " + std::to_string(i) + ": the checkpoint has 1, this run 2";
    if (differing > 10) named += "\n  and " + std::to_string(differing - 10) + " more";
    const auto run = [&](Index value) {
      return [=](auto& archive) {
        for (Index i = 0; i < differing; ++i) archive.same(std::to_string(i), value);
      };
    };
    return difference(run(1), run(2)) == named;
  };
  for (const Index differing : {1, 9, 10, 11, 1000}) CHECK(said(differing));
}

TEST_CASE("a value of more than 1 MiB is refused, written or read") {
  std::string text((std::size_t{1} << 20) - 2, 'a');  // and its quotes
  CHECK(through_file(text, std::string()) == text);
  const auto state = [&](auto& archive) { archive("text", text); };
  text += 'a';
  CHECK_THROWS_SAYING(std::invalid_argument, checkpoint_bytes(0, state),
                      "checkpoint: text: expected a value of at most 1048576 bytes in JSON, got 1048577");
  CHECK(detail::archived_value<std::string>('"' + text + '"') == std::nullopt);
  CHECK(detail::archived_value<Index>(std::string(std::size_t{1} << 20, ' ') + '1') == std::nullopt);
}

TEST_CASE("what must be the same is, to the last bit and the type") {
  const auto said = [](const auto& then, const auto& now) {
    return difference([&](auto& archive) { archive.same("it", then); }, [&](auto& archive) { archive.same("it", now); });
  };
  const double inf = std::numeric_limits<double>::infinity();
  CHECK(said(0.1, 0.1) == "");
  CHECK(said(inf, inf) == "");
  CHECK(said("text", std::string("text")) == "");
  CHECK(said(std::vector<std::string>{"a", "b"}, std::vector<std::string>{"a", "b"}) == "");
  CHECK(said(UINT64_MAX, UINT64_MAX) == "");
  CHECK(said(0.1, std::nextafter(0.1, 1)) == differs + "\n  it: the checkpoint has 0.1, this run 0.10000000000000002");
  CHECK(said(0.0, -0.0) == differs + "\n  it: the checkpoint has 0.0, this run -0.0");
  CHECK(said(inf, -inf) == differs + "\n  it: the checkpoint has \"inf\", this run \"-inf\"");
  CHECK(said(1.0, 1) == differs + "\n  it: the checkpoint has 1.0, this run 1");
  CHECK(said(1, "1") == differs + "\n  it: the checkpoint has 1, this run \"1\"");
  CHECK(said(true, false) == differs + "\n  it: the checkpoint has true, this run false");
  CHECK(said(std::vector<Index>{1, 2}, std::vector<Index>{2, 1}) == differs + "\n  it: the checkpoint has [1,2], this run [2,1]");
  CHECK(said("\x1b[31m\u00fc", "") == differs + "\n  it: the checkpoint has \"\\u001b[31m\\xc3\\xbc\", this run \"\"");
}

TEST_CASE("a value of another kind is refused by name") {
  const auto said = [](auto then, auto now) {
    const auto before = now;
    const std::string message = difference([&](auto& archive) { archive("it", then); }, [&](auto& archive) { archive("it", now); });
    CHECK(now == before);
    return message.starts_with(differs) ? message.substr(differs.size()) : message;
  };
  CHECK(said(1.0, Index{7}) == "\n  it: the checkpoint has 1.0, this run an integer of 64 bits");
  CHECK(said(Index{1}, 7.0) == "\n  it: the checkpoint has 1, this run a number");
  CHECK(said(true, Index{7}) == "\n  it: the checkpoint has true, this run an integer of 64 bits");
  CHECK(said(Index{1}, false) == "\n  it: the checkpoint has 1, this run a boolean");
  CHECK(said(Index{1}, std::string()) == "\n  it: the checkpoint has 1, this run text");
  CHECK(said(Index{-1}, std::uint64_t{7}) == "\n  it: the checkpoint has -1, this run an integer of 64 bits");
  CHECK(said(UINT64_MAX, Index{7}) == "\n  it: the checkpoint has 18446744073709551615, this run an integer of 64 bits");
  CHECK(said(Index{1} << 31, 7) == "\n  it: the checkpoint has 2147483648, this run an integer of 32 bits");
  CHECK(said(std::vector<double>{1}, std::vector<float>{7}) == "\n  it: the checkpoint has F64 1, this run a vector of F32");
  CHECK(said(std::vector<double>{1}, std::vector<Index>{7}) == "\n  it: the checkpoint has F64 1, this run a vector of I64");
  CHECK(said(std::vector<double>{1}, 7.0) == "\n  it: the checkpoint has F64 1, this run a number");
  Mixed model(1);
  std::vector<float> flat{7};
  CHECK(difference([&](auto& archive) { archive.parameters("model", model); },
                   [&](auto& archive) {
                     archive("model.rows", flat);
                     archive("model.cols", flat);
                     archive("model.gate", model.gate[0]);
                   }) == differs +
                             "\n  model.rows: the checkpoint has F32 3 × 4, this run a vector of F32"
                             "\n  model.cols: the checkpoint has F32 5 × 3, this run a vector of F32"
                             "\n  model.gate: the checkpoint has F64 2, this run a number");
}

TEST_CASE("a value that its owner refuses is not taken") {
  Index before = 3, count = 7;
  std::vector<Index> counts{7};
  const auto positive = [](Index value) { require_in_range(value, 1, 5, "count"); };
  const auto one = [](const std::vector<Index>& values) { require_equal(static_cast<Index>(values.size()), 1, "counts"); };
  const auto read = [&](auto& archive) { archive("count", count, positive); };
  CHECK(difference([&](auto& archive) { archive("count", before); }, read) == "");
  CHECK(count == 3);
  before = 9;
  CHECK(difference([&](auto& archive) { archive("count", before); }, read) ==
        differs + "\n  count: the checkpoint has 9, this run refuses it: count: expected a value in [1, 5], got 9");
  CHECK(count == 3);
  std::vector<Index> two{1, 2};
  CHECK(difference([&](auto& archive) { archive("counts", two); }, [&](auto& archive) { archive("counts", counts, one); }) ==
        differs + "\n  counts: the checkpoint has I64 2, this run refuses it: counts: expected 1, got 2");
  CHECK(counts == std::vector<Index>{7});
}

TEST_CASE("models with other names, shapes, types, ranks or scales are refused by name") {
  const auto written_by = [](auto model) { return [model](auto& archive) mutable { archive.parameters("model", model); }; };
  const auto said = [&](const auto& then, const auto& now) {
    auto reading = now;
    const std::string message = difference(written_by(then), [&](auto& archive) { archive.parameters("model", reading); });
    CHECK(checkpoint_bytes(0, written_by(reading)) == checkpoint_bytes(0, written_by(now)));
    return message.starts_with(differs) ? message.substr(differs.size()) : message;
  };
  const auto linear = [](LowRankOptions options, std::uint64_t seed = 1) {
    Rng rng(seed);
    return Linear<float>(DenseWeight<float>{noise<float>(5, 4, 1), VectorX<float>()}, options, rng);
  };
  const auto alone = [](LowRankOptions options) {
    Rng rng(1);
    return LowRank<float>(4, 5, options, rng);
  };
  const LowRankOptions plain{.max_rank = 3, .alpha = 6};

  CHECK(said(Mixed(1), Mixed(1, 3, 5)) == "\n  model.gate: the checkpoint has F64 2, this run F64 5");
  CHECK(said(Mixed(1), Mixed(1, 2)) ==
        "\n  model.rows: the checkpoint has F32 3 × 4, this run F32 2 × 4\n  model.cols: the checkpoint has F32 5 × 3, this run F32 5 × 2");
  CHECK(
      said(linear(plain), linear({.max_rank = 3, .alpha = 12})) ==
      "\n  model.scale at rank 1: the checkpoint has 6.0, this run 12.0\n  model.scale at max_rank: the checkpoint has 2.0, this run 4.0");
  CHECK(said(linear(plain), linear({.max_rank = 3, .alpha = 6, .scale = alpha_over_max_rank})) ==
        "\n  model.scale at rank 1: the checkpoint has 6.0, this run 2.0");
  CHECK(said(alone(plain), alone({.max_rank = 3, .alpha = 6, .scale = alpha_over_max_rank})) ==
        "\n  model.scale at rank 1: the checkpoint has 6.0, this run 2.0");
  CHECK(said(linear(plain), linear({.max_rank = 4, .alpha = 8}))
            .starts_with("\n  model.lora_A: the checkpoint has F32 3 × 4, this run F32 4 × 4"));
  CHECK(said(linear(plain), linear({.max_rank = 0})) != "");
  CHECK(said(linear({.max_rank = 0}), linear({.max_rank = 0})) == "");
  Linear<float> cut = linear({.max_rank = 4, .alpha = 6});
  truncate(cut, 3);
  CHECK(said(linear({.max_rank = 3, .alpha = 6, .scale = alpha_over_rank}), cut) ==
        "\n  model.max_rank: the checkpoint has 3, this run 4\n  model.scale at max_rank: the checkpoint has 2.0, this run 1.5");

  using Layer = Attention<double, Linear<double>, FrozenLinear<double>, Linear<double>, Linear<double, Dropout<LowRank<double>>>>;
  const auto attention = [](double alpha) {
    Rng rng(1);
    const auto weight = [](std::uint64_t seed) { return DenseWeight<double>{noise<double>(6, 6, seed), VectorX<double>()}; };
    const LowRankOptions options{.max_rank = 2, .alpha = alpha};
    return Layer(Linear<double>(weight(1), {.max_rank = 2}, rng), FrozenLinear<double>(weight(2)), Linear<double>(weight(3), options, rng),
                 Linear<double, Dropout<LowRank<double>>>(weight(4), {.adapter = options}, rng), {.heads = 2});
  };
  CHECK(said(attention(4), attention(4)) == "");
  CHECK(said(attention(4), attention(2)) ==
        "\n  model.v_proj.scale at rank 1: the checkpoint has 4.0, this run 2.0"
        "\n  model.v_proj.scale at max_rank: the checkpoint has 2.0, this run 1.0"
        "\n  model.o_proj.scale at rank 1: the checkpoint has 4.0, this run 2.0"
        "\n  model.o_proj.scale at max_rank: the checkpoint has 2.0, this run 1.0");
  CHECK(said(linear(plain), attention(4)) != "");

  // What the slices of a stack and a dropout do besides their parameters.
  using Stack = Stacked<LowRank<float>>;
  const auto stack = [](double alpha, ScaleRule scale = alpha_over_rank) {
    Rng rng(1);
    const LowRankOptions first{.max_rank = 3, .alpha = 6}, last{.max_rank = 2, .alpha = alpha, .scale = scale};
    return Stack(4, 15, {.adapters = {first, {.max_rank = 0}, last}}, rng);
  };
  const std::string other_alpha =
      "2.scale at rank 1: the checkpoint has 4.0, this run 2.0\n  model.2.scale at max_rank: the checkpoint has 2.0, this run 1.0";
  CHECK(said(stack(4), stack(4)) == "");
  CHECK(said(stack(4), stack(2)) == "\n  model." + other_alpha);
  CHECK(said(stack(4), stack(4, alpha_over_max_rank)) == "\n  model.2.scale at rank 1: the checkpoint has 4.0, this run 2.0");
  const auto dropping = [&](double probability, double alpha) {
    return Linear<float, Dropout<Stack>>(DenseWeight<float>{noise<float>(15, 4, 1), VectorX<float>()},
                                         Dropout<Stack>(stack(alpha), probability));
  };
  CHECK(said(dropping(0.5, 4), dropping(0.5, 4)) == "");
  CHECK(said(dropping(0.5, 4), dropping(0.25, 4)) == "\n  model.dropout probability: the checkpoint has 0.5, this run 0.25");
  CHECK(said(dropping(0.5, 4), dropping(0.5, 2)) == "\n  model." + other_alpha);

  Rng rng(1);
  const Linear<double> in_double(DenseWeight<double>{noise<double>(5, 4, 1), VectorX<double>()}, plain, rng);
  CHECK(said(linear(plain), in_double) ==
        "\n  model.lora_A: the checkpoint has F32 3 × 4, this run F64 3 × 4\n  model.lora_B: the checkpoint has F32 5 × 3, this run F64 5 "
        "× 3");
}

TEST_CASE("constants come back with the parameters, and what an adapter names itself must be the same") {
  const MatrixX<float> W = noise<float>(4, 5, 1);
  const auto started_at = [&](std::uint64_t seed) {
    Linear<float, OffsetLowRank<float>> layer(W, OffsetLowRank<float>(noise<float>(2, 5, seed), noise<float>(4, 2, seed + 1), {}));
    randomize<Linear<float, OffsetLowRank<float>>>(layer, seed + 2);
    return layer;
  };
  const auto describing = [](auto& model) { return [&](auto& archive) { archive.parameters("model", model); }; };
  auto written = started_at(3), read = started_at(7);
  read_text(checkpoint_bytes(0, describing(written)), describing(read));
  for (const Index rank : {1, 2}) CHECK(same_bits(read.adapter.delta(rank), written.adapter.delta(rank)));

  Rng rng(1);
  Linear<float, Nola<float>> nola(W, {.max_rank = 2, .bases = 3}, rng), other = nola;
  CHECK(difference(describing(nola), describing(other)).empty());
  ++other.adapter.seed;
  CHECK(difference(describing(nola), describing(other)).find("model.seed") != std::string::npos);
}

TEST_CASE("an optimiser that is set up differently is refused by the option's name") {
  const Mixed model(1);
  const auto of = [&](auto optimizer) { return [optimizer](auto& archive) mutable { archive("optimizer", optimizer); }; };
  const AdamWOptions plain{.lr = 0.1, .beta1 = 0.5, .beta2 = 0.75, .eps = 1e-6, .weight_decay = 0.5, .max_norm = 1};
  const auto said = [&](auto AdamWOptions::*option, auto value) {
    AdamWOptions options = plain;
    options.*option = value;
    const std::string message = difference(of(AdamW(model, plain)), of(AdamW(model, options)));
    return message.starts_with(differs) ? message.substr(differs.size()) : message;
  };
  CHECK(said(&AdamWOptions::lr, 0.2) == "");  // a schedule's to set
  CHECK(said(&AdamWOptions::beta1, 0.25) == "\n  optimizer.beta1: the checkpoint has 0.5, this run 0.25");
  CHECK(said(&AdamWOptions::beta2, 0.25) == "\n  optimizer.beta2: the checkpoint has 0.75, this run 0.25");
  CHECK(said(&AdamWOptions::eps, 1e-7) == "\n  optimizer.eps: the checkpoint has 1e-06, this run 1e-07");
  CHECK(said(&AdamWOptions::weight_decay, 0.0) == "\n  optimizer.weight_decay: the checkpoint has 0.5, this run 0.0");
  CHECK(said(&AdamWOptions::max_norm, std::numeric_limits<double>::infinity()) ==
        "\n  optimizer.max_norm: the checkpoint has 1.0, this run \"inf\"");
  CHECK(said(&AdamWOptions::update, Update::dense) ==
        "\n  optimizer.update: the checkpoint has \"active_only\", this run \"dense\""
        "\n  optimizer.counters.rows: the checkpoint has I64 3, this run refuses it: counters: expected 1, got 3"
        "\n  optimizer.counters.cols: the checkpoint has I64 3, this run refuses it: counters: expected 1, got 3");
  const std::string sgd = difference(of(AdamW(model, plain)), of(Sgd(model, {.momentum = 0.5})));
  CHECK(sgd.find("\n  optimizer.method: the checkpoint has \"AdamW\", this run \"Sgd\"") != std::string::npos);
  for (const auto& [option, value, text] :
       {std::tuple(&SgdOptions::momentum, 0.25, "momentum: the checkpoint has 0.5, this run 0.25"),
        std::tuple(&SgdOptions::weight_decay, 0.25, "weight_decay: the checkpoint has 0.0, this run 0.25"),
        std::tuple(&SgdOptions::max_norm, 0.25, "max_norm: the checkpoint has 0.0, this run 0.25")}) {
    SgdOptions options{.momentum = 0.5};
    options.*option = value;
    CHECK(difference(of(Sgd(model, {.momentum = 0.5})), of(Sgd(model, options))) == differs + "\n  optimizer." + text);
  }
}

TEMPLATE_TEST_CASE("what no optimiser comes to is refused, whatever the checksum says", "", AdamW<Mixed>, Sgd<Mixed>) {
  Mixed model(1);
  TestType optimizer(model, {.lr = 0.25});
  auto gradients = zeros_like(model);
  gradients.rows.components.insert(3);
  gradients.cols.components.insert(3);
  for (int step = 0; step < 10; ++step) optimizer.step(model, gradients);
  const auto state = [&](auto& archive) { archive("optimizer", optimizer); };
  const std::string whole = checkpoint_bytes(0, state);
  const auto refused = [&](std::string bytes, std::string_view what) {
    bytes.replace(detail::checksum_position, 16, detail::checkpoint_checksum(std::as_bytes(std::span(bytes))));
    CHECK_THROWS_SAYING(FormatError, read_text(bytes, state), what);
    CHECK(checkpoint_bytes(0, state) == whole);
  };
  std::string bytes = whole;
  refused(bytes.replace(bytes.find("0.25\",\"state.optimizer.steps"), 4, "-2.5"),
          "optimizer.lr: the checkpoint has -2.5, this run refuses it: ");
  bytes = whole;
  refused(bytes.replace(bytes.find("10\",\"step\""), 2, "-1"),
          "optimizer.steps: the checkpoint has -1, this run refuses it: number of steps: ");
  for (const std::int64_t count : {std::int64_t{-1}, (std::int64_t{1} << 53) + 1, std::numeric_limits<std::int64_t>::max()}) {
    bytes = whole;
    const SafetensorsContents contents = parse_safetensors(std::as_bytes(std::span(bytes)), "file");
    const auto at = reinterpret_cast<const char*>(contents.find("optimizer.counters.cols")->bytes.data()) - bytes.data();
    std::memcpy(bytes.data() + at + 8, &count, 8);
    refused(bytes, "optimizer.counters.cols: the checkpoint has I64 3, this run refuses it: number of steps: expected a value in [0, ");
  }
}

}  // namespace dylora::test
