#include "dylora/io/peft/writer.hpp"

#include <sys/resource.h>

#include <array>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <limits>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "dylora/io/peft/peft.hpp"
#include "dylora/layers/attention/attention.hpp"
#include "dylora/layers/attention/merged.hpp"
#include "dylora/ranks/truncate.hpp"
#include "io/peft_model.hpp"
#include "support/catch.hpp"
#include "support/process.hpp"
#include "support/temporary_folder.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

std::set<std::string> names_in(const std::filesystem::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) names.insert(entry.path().filename().string());
  return names;
}

/// An adapter that does not say what its factors are.
struct Closed : LowRank<float> {
  using LowRank<float>::LowRank;
  void factors(Index) const {}
};
static_assert(Adapter<Closed> && !PortableAdapter<Closed>);

/// A model that trains something besides its adapters.
struct Gated {
  using Scalar = float;
  struct Gradients {};
  Linear<float> fc;
  VectorX<float> gate;

  static void members(const auto& f, auto&... t) {
    f(Child<Linear<float>>{"fc"}, t.fc...);
    f(Parameter{"fcgate"}, t.gate...);
  }
};

/// A model of two layers that have one name.
struct Twice {
  using Scalar = float;
  struct Gradients {};
  Linear<float> a, b;

  static void members(const auto& f, auto&... t) {
    f(Child<Linear<float>>{"fc"}, t.a...);
    f(Child<Linear<float>>{"fc"}, t.b...);
  }
};

/// A model of two layers, of which the second has a name of one's choice.
struct Named {
  using Scalar = float;
  struct Gradients {};
  std::string name;
  Linear<float> a, b;

  static void members(const auto& f, auto&... t) {
    f(Child<Linear<float>>{"a"}, t.a...);
    f(Child<Linear<float>>{std::get<0>(std::tie(t...)).name}, t.b...);
  }
};

Linear<float> linear(LowRankOptions options = {.max_rank = 4}) {
  Rng rng(1);
  Linear<float> layer(MatrixX<float>(noise<float>(6, 5, 1)), options, rng);
  randomize<Linear<float>>(layer, 2);
  return layer;
}

}  // namespace

TEST_CASE("saving makes the folder, replaces the two files and leaves all others alone") {
  const TemporaryFolder folder;
  const auto inner = folder / "new" / "folder";
  save_peft(inner, linear(), 4, {.prefix = "fc"});
  CHECK(names_in(inner) == std::set<std::string>{"adapter_config.json", "adapter_model.safetensors"});
  put(inner / "README.md", "mine");
  const std::string before = contents_of(inner / "adapter_config.json");
  save_peft(inner, linear(), 2, {.prefix = "fc"});
  CHECK(names_in(inner) == std::set<std::string>{"README.md", "adapter_config.json", "adapter_model.safetensors"});
  CHECK(contents_of(inner / "README.md") == "mine");
  CHECK(contents_of(inner / "adapter_config.json") != before);
}

TEST_CASE("what cannot be saved is refused by name before anything is touched") {
  const TemporaryFolder folder;
  save_peft(folder.path(), linear(), 4, {.prefix = "fc"});
  const auto files = [&] { return contents_of(folder / "adapter_config.json") + contents_of(folder / "adapter_model.safetensors"); };
  const std::string before = files();
  const SavePeftOptions fc{.prefix = "fc"};
  Rng rng(1);

  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), linear(), 0, fc), "save_peft: rank", "[1, 4]", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), linear(), 5, fc), "save_peft: rank", "[1, 4]", "got 5");
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), linear(), std::vector<Index>{5}, fc), "module \"fc\": rank", "[0, 4]",
                      "got 5");
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), linear(), std::vector<Index>{-1}, fc), "module \"fc\": rank",
                      "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), linear(), {1, 2}, fc), "a rank for each of 1 adapters, got 2");
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), linear(), std::vector<Index>{}, fc), "each of 1 adapters, got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), linear(), std::vector<Index>{0}, fc), "a component, got none");
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), linear({.max_rank = 0}), 1, fc), "a component, got none");
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), FrozenLinear<float>(MatrixX<float>(noise<float>(6, 5, 1))), 1, fc),
                      "a component, got none");

  for (const char* prefix : {"", ".", ".fc", "a..b", "fc.."}) {
    CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), linear(), 1, {.prefix = prefix}), "PEFT: prefix",
                        '"' + std::string(prefix) + '"');
  }
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), linear(), 1, {.prefix = "f\xff"}), "UTF-8");

  const Linear<float, Closed> closed(MatrixX<float>(noise<float>(6, 5, 1)), LowRankOptions{.max_rank = 4}, rng);
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), closed, 1, fc), "module \"fc\"", "PortableAdapter");
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), Gated{linear(), VectorX<float>::Zero(3)}, 1, fc), "\"fcgate\"",
                      "no place for");

  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), Twice{linear(), linear()}, 1, {}), "module \"fc\"",
                      "a name of its own");

  for (const float bad : {nan<float>, std::numeric_limits<float>::infinity()}) {
    Linear<float> in_a = linear(), in_b = linear();
    in_a.adapter.A(1, 2) = bad;
    in_b.adapter.B(2, 1) = bad;
    CHECK_THROWS_SAYING(NonFiniteError, save_peft(folder.path(), in_a, 2, fc), "module \"fc\"", "finite");
    CHECK_THROWS_SAYING(NonFiniteError, save_peft(folder.path(), in_b, 2, fc), "module \"fc\"", "finite");
  }
  Linear<float> large = linear();
  large.adapter.B.setConstant(1e30F);
  large.adapter.options.alpha = 1e30;
  CHECK_THROWS_SAYING(NonFiniteError, save_peft(folder.path(), large, 2, {.prefix = "fc", .baked = true}), "module \"fc\"", "finite");
  const auto with_rule = [](ScaleRule rule) { return linear({.max_rank = 4, .alpha = 1, .scale = rule}); };
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), with_rule([](double, Index, Index) { return 0.0; }), 2, fc),
                      "module \"fc\"", "a scale other than 0");
  CHECK_THROWS_SAYING(NonFiniteError, save_peft(folder.path(), with_rule([](double, Index, Index) { return HUGE_VAL; }), 2, fc),
                      "module \"fc\"", "a finite scale");
  for (const bool baked : {false, true}) {  // in double they are neither 0 nor infinite
    const SavePeftOptions options{.prefix = "fc", .baked = baked};
    CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), linear({.max_rank = 4, .alpha = 1e-60}), 2, options),
                        "module \"fc\"", "a scale other than 0");
    CHECK_THROWS_SAYING(NonFiniteError, save_peft(folder.path(), linear({.max_rank = 4, .alpha = 1e60}), 2, options), "module \"fc\"",
                        "a finite scale");
  }

  CHECK(names_in(folder.path()) == std::set<std::string>{"adapter_config.json", "adapter_model.safetensors"});
  CHECK(files() == before);
}

TEST_CASE("a value that is not finite above the saved rank does not matter") {
  const TemporaryFolder folder;
  Linear<float> layer = linear();
  layer.adapter.A.row(3).setConstant(nan<float>);
  CHECK_NOTHROW(save_peft(folder.path(), layer, 3, {.prefix = "fc"}));
}

TEST_CASE("where a folder cannot be written, nothing is") {
  const TemporaryFolder folder;
  const SavePeftOptions fc{.prefix = "fc"};
  put(folder / "file", "mine");
  CHECK_THROWS_SAYING(FileError, save_peft(folder / "file", linear(), 2, fc), (folder / "file").string());
  CHECK(contents_of(folder / "file") == "mine");

  for (const char* name : {"adapter_config.json", "adapter_model.safetensors"}) {
    const auto inner = folder / name;
    std::filesystem::create_directories(inner / name);
    CHECK_THROWS_SAYING(FileError, save_peft(inner, linear(), 2, fc), (inner / name).string(), "cannot write");
    CHECK(names_in(inner) == std::set<std::string>{name});
  }
}

TEST_CASE("a path that is too long for a pattern is refused where it needs one, and only there") {
  const TemporaryFolder folder;
  const std::string limit(PeftPattern::longest_key - 1, 'n');  // and the ^ of its pattern
  for (const std::string& name : {limit, limit + 'n'}) {
    const Named model{name, linear(), linear()};
    Named loaded = model;
    save_peft(folder.path(), model, {2, 2});
    CHECK(load_peft(folder.path(), loaded).adapters[1].rank == 2);
    if (name == limit) {
      save_peft(folder.path(), model, {2, 3});
      CHECK(load_peft(folder.path(), loaded).adapters[1].rank == 3);
    } else {
      CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), model, {2, 3}), "save_peft: module \"nnn", "at most 1000 bytes",
                          "got one of 1001");
      CHECK(load_peft(folder.path(), loaded).adapters[1].rank == 2);
    }
  }
}

TEST_CASE("names that fill more than a reader takes of a config are refused") {
  const TemporaryFolder folder;
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), linear(), 2, {.prefix = std::string(largest_json_config, 'n')}),
                      "save_peft: expected modules whose names", "at most 1048576 bytes");
  CHECK(names_in(folder.path()).empty());
}

TEST_CASE("a full disk leaves both files as they were, and is said") {
  const TemporaryFolder folder;
  const SavePeftOptions fc{.prefix = "fc"};
  save_peft(folder.path(), linear(), 1, fc);
  const auto files = [&] { return contents_of(folder / "adapter_config.json") + contents_of(folder / "adapter_model.safetensors"); };
  const std::string before = files();
  const auto refusal = [&](rlim_t largest, const SavePeftOptions& options, const std::string& file) {
    return in_child([&] {
      std::signal(SIGXFSZ, SIG_IGN);
      const rlimit limit{largest, largest};
      if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return std::string("cannot set a limit");
      return wrong_throw<FileError>([&] { save_peft(folder.path(), linear(), 4, options); },
                                    {(folder / file).string() + ".part: cannot write: File too large"});
    });
  };
  CHECK(refusal(300, fc, "adapter_model.safetensors") == "");
  const std::string long_text(3000, 'x');  // so that the second file is the larger one
  CHECK(refusal(2000, {.prefix = "fc", .base_model_name_or_path = long_text}, "adapter_config.json") == "");
  CHECK(files() == before);
  Linear<float> loaded = linear();
  CHECK(load_peft(folder.path(), loaded, {.prefix = "fc"}).adapters[0].rank == 1);
}

TEST_CASE("a folder that may not be written to is said, and its adapter stays") {
  namespace fs = std::filesystem;
  const TemporaryFolder folder;
  const auto inner = folder / "adapter";
  save_peft(inner, linear(), 3, {.prefix = "fc"});
  fs::permissions(folder.path(), fs::perms::all);
  fs::permissions(inner, fs::perms::owner_read | fs::perms::owner_exec | fs::perms::others_read | fs::perms::others_exec);
  for (const auto& entry : fs::directory_iterator(inner)) fs::permissions(entry.path(), fs::perms::owner_read | fs::perms::others_read);
  CHECK(in_child([&] {
          drop_privileges();
          const std::string wrong =
              wrong_throw<FileError>([&] { save_peft(inner, linear(), 2, {.prefix = "fc"}); },
                                     {(inner / "adapter_model.safetensors").string(), "cannot write: Permission denied"});
          Linear<float> loaded = linear();
          const Index rank = load_peft(inner, loaded, {.prefix = "fc"}).adapters[0].rank;
          return wrong + (rank == 3 ? "" : "loaded at rank " + std::to_string(rank));
        }) == "");
  fs::permissions(inner, fs::perms::owner_all);
  CHECK(names_in(inner) == std::set<std::string>{"adapter_config.json", "adapter_model.safetensors"});
}

TEST_CASE("while one process saves to a folder, another is refused and harms nothing") {
  const TemporaryFolder folder;
  save_peft(folder.path(), linear(), 4, {.prefix = "fc"});
  AtomicFile first(folder / "adapter_model.safetensors");
  const std::string answer = in_child([&] {
    return wrong_throw<FileError>([&] { save_peft(folder.path(), linear(), 2, {.prefix = "fc"}); },
                                  {"adapter_model.safetensors", "somebody else"});
  });
  CHECK(answer == "");
  Linear<float> loaded = linear();
  CHECK(load_peft(folder.path(), loaded, {.prefix = "fc"}).adapters[0].rank == 4);
}

TEST_CASE("a prefix may end with its dot, and a layer by itself is called what the prefix says") {
  const TemporaryFolder folder;
  for (const char* prefix : {"h.0.fc", "h.0.fc."}) {
    save_peft(folder.path(), linear(), 2, {.prefix = prefix});
    CHECK(SafetensorsFile(folder / "adapter_model.safetensors").find("base_model.model.h.0.fc.lora_A.weight") != nullptr);
  }
  for (const char* prefix : {"", "transformer", "transformer."}) {
    const std::string path = std::string(*prefix == 0 ? "" : "transformer.") + "head";
    CHECK(save_peft(folder.path(), PeftModel<float>(), 2, {.prefix = prefix}).back().name == path);
    CHECK(SafetensorsFile(folder / "adapter_model.safetensors").find("base_model.model." + path + ".lora_B.weight") != nullptr);
  }
}

TEST_CASE("the ranks of a save are those that the adapters were cut to") {
  const TemporaryFolder folder;
  PeftModel<double> model;
  const auto saved = save_peft(folder / "a", model, {3, 2, 1, 0, 4, 3, 5});
  const auto cut = adapter_ranks(model);
  REQUIRE(cut.size() == 11);  // each of the three slices of a c_attn is an adapter of its own there
  truncate_each(model, {3, 2, 0, 2, 1, 0, 4, 0, 4, 3, 5});
  CHECK(save_peft(folder / "b", model, 5) == saved);
  CHECK(save_peft(folder / "c", model, {3, 2, 1, 0, 4, 3, 5}) == saved);
  for (const char* file : {"adapter_config.json", "adapter_model.safetensors"}) {
    CHECK(contents_of(folder / "a" / file) == contents_of(folder / "b" / file));
    CHECK(contents_of(folder / "a" / file) == contents_of(folder / "c" / file));
  }
}

TEST_CASE("modules of several scales say theirs in an alpha_pattern, and the most common is the default") {
  const TemporaryFolder folder;
  PeftModel<float> model({.max_rank = 5, .alpha = 16});
  model.head.adapter.options.alpha = 0.3;
  model.h[1].q_proj.adapter.options.alpha = 1e-9;
  save_peft(folder.path(), model, {2, 0, 2, 2, 0, 2, 3});
  const PeftConfig config = parse_peft_config(contents_of(folder / "adapter_config.json"), "");
  CHECK(config.lora_alpha == 16);
  CHECK(config.alpha_pattern == std::vector<std::pair<std::string, double>>{{R"(^h\.1\.attn\.q_proj)", 1e-9}, {"^head", 0.3}});
  CHECK(config.r == 2);
  CHECK(config.rank_pattern == std::vector<std::pair<std::string, Index>>{{"^head", 3}});

  save_peft(folder.path(), model, {1, 0, 3, 3, 0, 1, 2});  // as many of 1 as of 3
  CHECK(parse_peft_config(contents_of(folder / "adapter_config.json"), "").r == 1);
}

TEST_CASE("a module is saved and loaded by the name that the options give it") {
  const TemporaryFolder folder;
  using Projection = Linear<float, Stacked<LowRank<float>>>;
  using Merged = MergedAttention<float, Projection>;
  Rng rng(1);
  const auto merged = [&](std::uint64_t seed) {
    const LowRankOptions options{.max_rank = 2};
    Merged attention{Projection(MatrixX<float>(noise<float>(24, 8, 1)), {.adapters = {options, options, options}}, rng),
                     Linear<float>(MatrixX<float>(noise<float>(8, 8, 1)), options, rng),
                     {.heads = 2}};
    randomize<Merged>(attention, seed);
    return attention;
  };
  const auto gpt2_name = [](std::string_view module) { return std::string(module == "qkv_proj" ? "c_attn" : "c_proj"); };
  std::vector<std::string> names;
  const auto model = merged(2);
  for (const AdapterScale& adapter : save_peft(folder.path(), model, 2, {.prefix = "h.0.attn", .name = gpt2_name}))
    names.push_back(adapter.name);
  CHECK(names == std::vector<std::string>{"h.0.attn.c_attn", "h.0.attn.c_proj"});
  CHECK(SafetensorsFile(folder / "adapter_model.safetensors").find("base_model.model.h.0.attn.c_attn.lora_A.weight") != nullptr);

  auto loaded = merged(3);
  CHECK_THROWS_SAYING(FormatError, load_peft(folder.path(), loaded, {.prefix = "h.0.attn"}), "\"h.0.attn.qkv_proj\"", "c_attn");
  load_peft(folder.path(), loaded, {.prefix = "h.0.attn", .name = gpt2_name});
  const auto values_of = [](const Merged& m) { return values<Merged>(m); };
  CHECK(same_bits(values_of(loaded), values_of(model)));

  const auto one_name = [](std::string_view) { return std::string("c_attn"); };
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), model, 2, {.name = one_name}), "module \"c_attn\"",
                      "a name of its own");
}

TEST_CASE("the layers of an attention are modules by their names") {
  Rng rng(1);
  const auto projection = [&] { return Linear<float>(MatrixX<float>(noise<float>(8, 8, 1)), {.max_rank = 2}, rng); };
  const Attention<float> attention{projection(), projection(), projection(), projection(), {.heads = 2}};
  const TemporaryFolder folder;
  std::vector<std::string> names;
  for (const AdapterScale& adapter : save_peft(folder.path(), attention, 2, {.prefix = "h.0.attn"})) names.push_back(adapter.name);
  CHECK(names == std::vector<std::string>{"h.0.attn.q_proj", "h.0.attn.k_proj", "h.0.attn.v_proj", "h.0.attn.o_proj"});
}

}  // namespace dylora::test
