#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/adapters/none.hpp"
#include "dylora/adapters/stacked.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/io/bytes/atomic_file.hpp"
#include "dylora/io/gguf/adapter.hpp"
#include "dylora/io/gguf/gguf.hpp"
#include "dylora/io/gguf/writer.hpp"
#include "dylora/layers/attention/attention.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/ranks/scale.hpp"
#include "dylora/ranks/truncate.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

using namespace dylora;
using namespace dylora::test;

namespace {

/// Layers under names of one's choice.
template <class L>
struct Modules {
  using Scalar = typename L::Scalar;
  struct Gradients {
    std::vector<typename L::Gradients> layers;
  };
  std::vector<std::string> names;
  std::vector<L> layers;

  static void members(const auto& f, auto&... t) {
    const auto& first = std::get<0>(std::tie(t...));
    for (std::size_t i = 0; i < first.layers.size(); ++i) f(Child<L>{first.names[i]}, t.layers[i]...);
  }
};

/// A block of a Llama, as far as adapters go.
struct Block {
  using Scalar = float;
  struct Gradients {
    Attention<float>::Gradients attention;
    Linear<float>::Gradients up;
  };
  Attention<float> attention;
  Linear<float> up;

  MatrixX<float> forward(const MatrixX<float>& x, Index rank) const { return up.forward(attention.forward(x, rank), rank); }

  static void members(const auto& f, auto&... t) {
    f(Child<Attention<float>>{"model.layers.0.self_attn"}, t.attention...);
    f(Child<Linear<float>>{"model.layers.0.mlp.up_proj"}, t.up...);
  }
};

constexpr Index heads = 2, key_value_heads = 1, max_rank = 6;  // of 12 features, so that the order of rows is not its own inverse

/// A Linear with a trained adapter.
template <class S = float>
Linear<S> linear(Index in, Index out, LowRankOptions options, std::uint64_t seed) {
  Rng rng(seed);
  Linear<S> layer(MatrixX<S>(noise<S>(out, in, seed)), options, rng);
  randomize<Linear<S>>(layer, seed + 1);
  return layer;
}

Block block(LowRankOptions options, std::uint64_t seed) {
  return {{linear(10, 24, options, seed),
           linear(10, 12, options, seed + 10),
           linear(10, 12, options, seed + 20),
           linear(24, 10, options, seed + 30),
           {.heads = heads, .key_value_heads = key_value_heads}},
          linear(10, 12, options, seed + 40)};
}

Block fresh_block(LowRankOptions options) {
  Block other = block(options, 1);
  randomize<Block>(other, 2000);
  return other;
}

Modules<Linear<float>> modules(std::vector<LowRankOptions> options) {
  Modules<Linear<float>> result;
  for (std::size_t i = 0; i < options.size(); ++i) {
    result.names.push_back("w" + std::to_string(i));
    result.layers.push_back(linear(5 + static_cast<Index>(i), 7, options[i], 100 * i + 1));
  }
  return result;
}

std::string same_name(std::string_view module) { return module.empty() ? "w" : std::string(module); }

const GgufOptions llama{.architecture = "llama", .name = gguf_llama_name, .heads = heads, .key_value_heads = key_value_heads};
const GgufOptions plain{.architecture = "test", .name = same_name};

GgufOptions baked(GgufOptions options) {
  options.baked = true;
  return options;
}

RowMatrix<float> matrix_in(const GgufFile& file, const std::string& tensor) {
  const GgufTensor* found = file.contents().find_tensor(tensor);
  REQUIRE(found != nullptr);
  return matrix_of<float>(*found->view(), file.name());
}

/// Δ as llama.cpp computes it from the file, in double.
MatrixX<double> delta_in(const GgufFile& file, const std::string& module) {
  const MatrixX<double> A = matrix_in(file, module + ".weight.lora_a").cast<double>();
  const MatrixX<double> B = matrix_in(file, module + ".weight.lora_b").cast<double>();
  const float* alpha = file.contents().find_as<float>("adapter.lora.alpha");
  return (alpha == nullptr || *alpha == 0 ? 1.0F : *alpha / static_cast<float>(A.rows())) * B * A;
}

/// What Hugging Face's weights of q and k become: reshaped to heads × 2 × head_dim/2, the last two dimensions exchanged.
template <class M>
M permuted(const M& weight, Index head_count) {
  M result = weight;
  const Index half = weight.rows() / head_count / 2;
  Index row = 0;
  for (Index head = 0; head < head_count; ++head) {
    for (Index i = 0; i < half; ++i) {
      for (Index part = 0; part < 2; ++part) result.row(row++) = weight.row((head * 2 + part) * half + i);
    }
  }
  return result;
}

/// A file of an adapter in F32, for one module "w" of 3 inputs and 2 outputs, to be made wrong.
struct AdapterFile {
  std::vector<float> a{1, 2, 3}, b{4, 5};  // rank 1
  GgufContents contents;

  AdapterFile() {
    contents.metadata = {{"general.architecture", std::string("test")},
                         {"general.type", std::string("adapter")},
                         {"adapter.type", std::string("lora")},
                         {"adapter.lora.alpha", 2.0F}};
    contents.tensors = {{"w.weight.lora_a", ggml_type(DType::F32), {1, 3}, std::as_bytes(std::span(a))},
                        {"w.weight.lora_b", ggml_type(DType::F32), {2, 1}, std::as_bytes(std::span(b))}};
  }
  AdapterFile(const AdapterFile&) = delete;
  AdapterFile& operator=(const AdapterFile&) = delete;

  GgufValue& value(std::string_view key) {
    for (GgufEntry& entry : contents.metadata) {
      if (entry.key == key) return entry.value;
    }
    return contents.metadata.emplace_back(GgufEntry{std::string(key), 0.0F}).value;
  }
  GgufTensor& lora_a() { return contents.tensors[0]; }
  GgufTensor& lora_b() { return contents.tensors[1]; }
};

/// The adapter that it is for.
Linear<float> for_adapter_file() { return linear(3, 2, {.max_rank = 2}, 7); }

}  // namespace

TEST_CASE("A model saved at any rank and loaded into another computes the same bits") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  const MatrixX<float> x = noise<float>(10, 5, 3);
  for (const ScaleRule rule : {alpha_over_rank, alpha_over_max_rank}) {
    const LowRankOptions options{.max_rank = max_rank, .alpha = 9, .scale = rule};
    const Block model = block(options, 1);
    for (Index rank = 1; rank <= max_rank; ++rank) {
      INFO("rank " << rank);
      save_gguf(path, model, rank, llama);
      Block other = fresh_block({.max_rank = 3, .alpha = 1, .scale = rule});
      REQUIRE_FALSE(same_bits(other.forward(x, 1), model.forward(x, 1)));
      const LoadReport report = load_gguf(path, other, llama);
      CHECK(same_bits(other.forward(x, rank), model.forward(x, rank)));
      CHECK(other.up.max_rank() == rank);
      CHECK(report.adapters.size() == 5);
      CHECK(report.adapters[1] ==
            AdapterScale{"blk.0.attn_k", rank, rule(9, rank, max_rank) * static_cast<double>(rank), rule(9, rank, max_rank)});
      CHECK(report.missing_modules.empty());
      CHECK(report.unmatched_tensors.empty());
      CHECK(report.notes.empty());
    }
  }
}

TEST_CASE("A file that is loaded and saved again has the same bytes") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  const auto check = [&](const auto& saved, const std::vector<Index>& ranks, const GgufOptions& options) {
    save_gguf(path, saved, ranks, options);
    const std::string bytes = contents_of(path);
    auto other = saved;
    randomize<std::decay_t<decltype(saved)>>(other, 77);
    load_gguf(path, other, options);
    save_gguf(path, other, ranks, options);
    CHECK(contents_of(path) == bytes);
  };
  for (Index rank = 1; rank <= max_rank; ++rank) {
    for (const double alpha : {16.0, 7.0, 0.1, 1e-3}) {
      for (const ScaleRule rule : {alpha_over_rank, alpha_over_sqrt_rank, alpha_over_max_rank}) {
        const Block model = block({.max_rank = max_rank, .alpha = alpha, .scale = rule}, 1);
        check(model, std::vector<Index>(5, rank), llama);
        check(model, std::vector<Index>(5, rank), baked(llama));
        check(model, {rank, 1, 0, 2, 3}, llama);
        check(model, {rank, 1, 0, 2, 3}, baked(llama));
      }
    }
  }
}

TEST_CASE("The bytes of an adapter are pinned") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  RowMatrix<float> A(2, 3);
  A << 1, 2, 3, 4, 5, 6;
  MatrixX<float> B(2, 2);
  B << 7, 8, 9, 10;
  Modules<Linear<float>> model{{"lm_head", "layers.0.mlp.up_proj"}, {}};
  for (int i = 0; i < 2; ++i)
    model.layers.emplace_back(DenseWeight<float>(MatrixX<float>(noise<float>(2, 3, 1))), LowRank<float>(A, B, {.alpha = 16}));
  save_gguf(path, model, {2, 0}, llama);
  const auto zeros = [](std::size_t count) { return std::string(count, '\0'); };
  // clang-format off
  const std::string header(
      "GGUF" "\3\0\0\0" "\2\0\0\0\0\0\0\0" "\5\0\0\0\0\0\0\0"
      "\24\0\0\0\0\0\0\0" "general.architecture" "\10\0\0\0" "\5\0\0\0\0\0\0\0" "llama"
      "\14\0\0\0\0\0\0\0" "general.type" "\10\0\0\0" "\7\0\0\0\0\0\0\0" "adapter"
      "\14\0\0\0\0\0\0\0" "adapter.type" "\10\0\0\0" "\4\0\0\0\0\0\0\0" "lora"
      "\22\0\0\0\0\0\0\0" "adapter.lora.alpha" "\6\0\0\0" "\0\0\200\101"
      "\15\0\0\0\0\0\0\0" "dylora.rank_0" "\11\0\0\0" "\10\0\0\0" "\1\0\0\0\0\0\0\0" "\14\0\0\0\0\0\0\0" "blk.0.ffn_up"
      "\24\0\0\0\0\0\0\0" "output.weight.lora_a" "\2\0\0\0" "\3\0\0\0\0\0\0\0" "\2\0\0\0\0\0\0\0" "\0\0\0\0" "\0\0\0\0\0\0\0\0"
      "\24\0\0\0\0\0\0\0" "output.weight.lora_b" "\2\0\0\0" "\2\0\0\0\0\0\0\0" "\2\0\0\0\0\0\0\0" "\0\0\0\0" "\40\0\0\0\0\0\0\0",
      24 + 45 + 39 + 36 + 34 + 57 + 60 + 60);
  // clang-format on
  const std::array<float, 6> a{1, 2, 3, 4, 5, 6};  // r × in, row by row
  const std::array<float, 4> b{7, 8, 9, 10};       // out × r, row by row
  const auto text = [](const auto& values) { return std::string(reinterpret_cast<const char*>(values.data()), sizeof values); };
  CHECK(contents_of(path) == header + zeros(29) + text(a) + zeros(8) + text(b) + zeros(16));
}

TEST_CASE("One alpha serves all modules where it can, and what it cannot say is in B") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  struct Case {
    std::vector<LowRankOptions> modules;
    std::vector<Index> ranks;
    double alpha;
    std::vector<double> scales;
    bool exact;  // whether B is the model's own
  };
  const auto rank = [](Index highest, double alpha, ScaleRule rule = alpha_over_rank) {
    return LowRankOptions{.max_rank = highest, .alpha = alpha, .scale = rule};
  };
  const std::vector<Case> cases{
      {{rank(4, 16), rank(4, 16)}, {4, 4}, 16, {4, 4}, true},
      {{rank(4, 16), rank(4, 16)}, {4, 1}, 16, {4, 16}, true},        // under α/b, mixed ranks have one α
      {{rank(4, 16), rank(4, 16)}, {3, 2}, 16, {16 / 3.0, 8}, true},  // and not a neighbour of 16
      {{rank(5, 0.7F), rank(4, 0.7F)}, {5, 3}, 0.7F, {0.7F / 5.0, 0.7F / 3.0}, true},
      {{rank(4, 6, alpha_over_max_rank)}, {2}, 3, {1.5}, true},  // s · r, whatever the rule
      {{rank(4, 8, alpha_over_sqrt_rank)}, {4}, 16, {4}, true},
      {{rank(4, 16), rank(4, 8)}, {4, 2}, 4, {1, 2}, false},  // two alphas: the largest rank
      {{rank(4, 6, alpha_over_max_rank), rank(4, 6, alpha_over_max_rank)}, {4, 2}, 4, {1, 2}, false},
  };
  for (const Case& c : cases) {
    const auto model = modules(c.modules);
    const std::vector<AdapterScale> report = save_gguf(path, model, c.ranks, plain);
    const GgufFile file(path);
    CHECK(*file.contents().find_as<float>("adapter.lora.alpha") == static_cast<float>(c.alpha));
    for (std::size_t i = 0; i < c.ranks.size(); ++i) {
      const std::string name = model.names[i];
      INFO(name << " of ranks " << c.ranks[0] << " and " << c.ranks.back());
      CHECK(report[i] == AdapterScale{name, c.ranks[i], static_cast<float>(c.alpha), static_cast<float>(c.scales[i])});
      const auto& adapter = model.layers[i].adapter;
      CHECK(gap(delta_in(file, name), in_double(adapter.delta(c.ranks[i]))) < rounding<float>);
      CHECK((MatrixX<float>(matrix_in(file, name + ".weight.lora_b")) == adapter.B.leftCols(c.ranks[i])) == c.exact);
    }
  }
}

TEST_CASE("Alpha is the one that was chosen, not a neighbour that rounds to the same scale") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  for (const float alpha : {1.0F, 3.0F, 5.0F, 16.0F, 0.7F}) {
    for (const Index rank : {7, 21, 39, 41, 43, 47, 61}) {  // where α / r · r is not α in float
      const auto layer = [&](double chosen) {
        return Linear<float>(DenseWeight<float>(MatrixX<float>(noise<float>(2, 3, 1))),
                             LowRank<float>(noise<float>(rank, 3, 2), noise<float>(2, rank, 3), {.alpha = chosen}));
      };
      save_gguf(path, layer(alpha), rank, plain);
      CHECK(*GgufFile(path).contents().find_as<float>("adapter.lora.alpha") == alpha);
      Linear<float> other = layer(1);
      load_gguf(path, other, plain);
      save_gguf(path, other, rank, plain);
      CHECK(*GgufFile(path).contents().find_as<float>("adapter.lora.alpha") == alpha);
    }
  }
}

TEST_CASE("A scale that no positive alpha gives is in B") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  const ScaleRule negative = [](double alpha, Index rank, Index) { return -alpha / static_cast<double>(rank); };
  const Linear<float> subtracted = linear(3, 2, {.max_rank = 2, .alpha = 5, .scale = negative}, 1);
  CHECK(save_gguf(path, subtracted, 2, plain) == std::vector<AdapterScale>{{"w", 2, 5, 2.5}});
  CHECK(gap(delta_in(GgufFile(path), "w"), in_double(subtracted.adapter.delta(2))) < rounding<float>);
}

TEST_CASE("Alpha survives being loaded at every rank, in float and in double") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  for (Index rank = 1; rank <= 61; ++rank) {
    const Linear<float> layer(DenseWeight<float>(MatrixX<float>(noise<float>(2, 3, 1))),
                              LowRank<float>(noise<float>(rank, 3, 2), noise<float>(2, rank, 3), {.alpha = 16}));
    save_gguf(path, layer, rank, plain);
    Linear<float> in_float = linear(3, 2, {.max_rank = 1}, 4);
    Linear<double> doubled = linear<double>(3, 2, {.max_rank = 1}, 4);
    load_gguf(path, in_float, plain);
    load_gguf(path, doubled, plain);
    CHECK(in_float.adapter.options.alpha == 16);
    CHECK(doubled.adapter.options.alpha == 16);
    CHECK(same_bits(in_float.adapter.delta(rank), layer.adapter.delta(rank)));
  }
}

namespace {

/// The attention of a block of GPT-2, as far as adapters go.
struct MergedBlock {
  using Scalar = float;
  using Sliced = Linear<float, Stacked<LowRank<float>>>;
  struct Gradients {
    Sliced::Gradients c_attn;
    Linear<float>::Gradients c_proj;
  };
  Sliced c_attn;
  Linear<float> c_proj;

  static void members(const auto& f, auto&... t) {
    f(Child<Sliced>{"h.0.attn.c_attn"}, t.c_attn...);
    f(Child<Linear<float>>{"h.0.attn.c_proj"}, t.c_proj...);
  }
};

}  // namespace

TEST_CASE("An adapter of slices is one pair, and slices again after loading") {
  const auto make = [](std::uint64_t seed) {
    Rng rng(seed);
    MergedBlock model{
        MergedBlock::Sliced(MatrixX<float>(noise<float>(12, 4, 1)), {.adapters = {{.max_rank = 3}, {.max_rank = 3}, {.max_rank = 3}}}, rng),
        linear(4, 4, {.max_rank = 3}, 2)};
    randomize<MergedBlock>(model, seed);
    return model;
  };
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  const GgufOptions gpt2{.architecture = "gpt2", .name = gguf_gpt2_name};
  const MergedBlock model = make(5);
  const std::vector<AdapterScale> saved = save_gguf(path, model, 2, gpt2);  // α/b at b = 2, and α/r at r = 6 and 2: no α for both
  CHECK(saved == std::vector<AdapterScale>{{"blk.0.attn_qkv", 6, 6, 1}, {"blk.0.attn_output", 2, 6, 3}});
  CHECK(gap(delta_in(GgufFile(path), "blk.0.attn_qkv"), in_double(model.c_attn.adapter.delta(2))) < rounding<float>);
  MergedBlock other = make(6);
  load_gguf(path, other, gpt2);
  for (const auto& slice : other.c_attn.adapter.slices) CHECK(slice.max_rank() == 2);
  CHECK(gap(in_double(other.c_attn.adapter.delta(2)), in_double(model.c_attn.adapter.delta(2))) < rounding<float>);
  CHECK(gap(in_double(other.c_proj.adapter.delta(2)), in_double(model.c_proj.adapter.delta(2))) < rounding<float>);
}

TEST_CASE("A baked adapter has scale 1 for those who read alpha and for those who do not") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  const auto model = modules({{.max_rank = 4, .alpha = 16}, {.max_rank = 4, .alpha = 5}});
  for (const std::vector<Index>& ranks : {std::vector<Index>{3, 3}, std::vector<Index>{4, 2}}) {
    const std::vector<AdapterScale> report = save_gguf(path, model, ranks, baked(plain));
    const GgufFile file(path);
    const float* alpha = file.contents().find_as<float>("adapter.lora.alpha");
    CHECK((alpha == nullptr) == (ranks[0] != ranks[1]));  // no alpha is its own rank for both
    if (alpha != nullptr) CHECK(*alpha == 3);
    for (std::size_t i = 0; i < 2; ++i) {
      CHECK(report[i].scale == 1);
      const std::string name = model.names[i];
      const MatrixX<double> unscaled =
          matrix_in(file, name + ".weight.lora_b").cast<double>() * matrix_in(file, name + ".weight.lora_a").cast<double>();
      CHECK(gap(unscaled, in_double(model.layers[i].adapter.delta(ranks[i]))) < rounding<float>);
    }
  }
}

TEST_CASE("The rows of Llama's q and k are in llama.cpp's order in the file, and in the model's again after") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  const Block model = block({.max_rank = max_rank, .alpha = 8}, 1);
  save_gguf(path, model, 4, llama);
  const GgufFile file(path);
  const auto check = [&](const std::string& name, const Linear<float>& layer, Index permuted_heads) {
    INFO(name);
    const MatrixX<double> weight = in_double(layer.base.dense()), merged = in_double(layer.merged(4).dense());
    const auto stored = [&](const MatrixX<double>& w) { return permuted_heads == 0 ? w : permuted(w, permuted_heads); };
    CHECK(gap(stored(weight) + delta_in(file, name), stored(merged)) < rounding<float>);
  };
  check("blk.0.attn_q", model.attention.q, heads);
  check("blk.0.attn_k", model.attention.k, key_value_heads);
  check("blk.0.attn_v", model.attention.v, 0);
  check("blk.0.attn_output", model.attention.o, 0);
  check("blk.0.ffn_up", model.up, 0);
  const RowMatrix<float> q = model.attention.q.adapter.B.leftCols(4);
  CHECK(matrix_in(file, "blk.0.attn_q.weight.lora_b") == permuted(q, heads));
  CHECK(matrix_in(file, "blk.0.attn_q.weight.lora_b") != q);

  GgufOptions converted = llama;
  converted.converted = true;
  save_gguf(path, model, 4, converted);
  CHECK(matrix_in(GgufFile(path), "blk.0.attn_q.weight.lora_b") == q);

  GgufOptions one_head_count = llama;
  one_head_count.key_value_heads = 0;
  save_gguf(path, model, 4, one_head_count);
  const RowMatrix<float> k = model.attention.k.adapter.B.leftCols(4);
  CHECK(matrix_in(GgufFile(path), "blk.0.attn_k.weight.lora_b") == permuted(k, heads));
}

TEST_CASE("A and B of GPT-2's square projection are not transposed") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  const Modules<Linear<float>> model{{"transformer.h.3.attn.c_proj"}, {linear(6, 6, {.max_rank = 2}, 1)}};
  save_gguf(path, model, 2, {.architecture = "gpt2", .name = gguf_gpt2_name});
  const GgufFile file(path);
  CHECK(matrix_in(file, "blk.3.attn_output.weight.lora_a") == model.layers[0].adapter.A);
  CHECK(matrix_in(file, "blk.3.attn_output.weight.lora_b") == RowMatrix<float>(model.layers[0].adapter.B));
}

TEST_CASE("Modules have the names of llama.cpp's tensors") {
  using Names = std::vector<std::pair<std::string, std::string>>;
  const Names gpt2{{"h.0.attn.c_attn", "blk.0.attn_qkv"},
                   {"transformer.h.11.attn.c_attn", "blk.11.attn_qkv"},
                   {"h.0.attn.qkv_proj", "blk.0.attn_qkv"},
                   {"h.7.attn.c_proj", "blk.7.attn_output"},
                   {"h.7.attn.o_proj", "blk.7.attn_output"},
                   {"h.0.mlp.c_fc", "blk.0.ffn_up"},
                   {"transformer.h.0.mlp.c_proj", "blk.0.ffn_down"},
                   {"lm_head", "output"},
                   {"wte", "token_embd"},
                   {"h.0.ln_1", "blk.0.attn_norm"},
                   {"h.0.attn.q_proj", ""},
                   {"h.x.attn.c_attn", ""},
                   {"h..attn.c_attn", ""},
                   {"h.0", ""},
                   {"h.0.", ""},
                   {"g.0.attn.c_attn", ""},
                   {"model.h.0.attn.c_attn", ""},
                   {"", ""}};
  for (const auto& [module, tensor] : gpt2) CHECK(gguf_gpt2_name(module) == tensor);
  const Names llama_names{{"model.layers.0.self_attn.q_proj", "blk.0.attn_q"},
                          {"layers.31.self_attn.k_proj", "blk.31.attn_k"},
                          {"model.layers.2.self_attn.v_proj", "blk.2.attn_v"},
                          {"model.layers.2.self_attn.o_proj", "blk.2.attn_output"},
                          {"model.layers.2.mlp.gate_proj", "blk.2.ffn_gate"},
                          {"model.layers.2.mlp.up_proj", "blk.2.ffn_up"},
                          {"model.layers.2.mlp.down_proj", "blk.2.ffn_down"},
                          {"lm_head", "output"},
                          {"model.embed_tokens", "token_embd"},
                          {"model.norm", "output_norm"},
                          {"model.layers.2.mlp", ""},
                          {"model.layers.2.mlp.c_fc", ""},
                          {"q_proj", ""},
                          {"", ""}};
  for (const auto& [module, tensor] : llama_names) CHECK(gguf_llama_name(module) == tensor);
}

TEST_CASE("Modules cut to rank 0 are cut again by loading") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  auto model = modules({{.max_rank = 4}, {.max_rank = 4}, {.max_rank = 4}});
  truncate_each(model, {3, 0, 2});
  const std::vector<AdapterScale> saved = save_gguf(path, model, 4, plain);
  CHECK(saved == std::vector<AdapterScale>{{"w0", 3, 16, 16.0F / 3}, {"w2", 2, 16, 8}, {"w1", 0, 0, 0}});
  auto other = modules({{.max_rank = 4}, {.max_rank = 4}, {.max_rank = 4}});
  const LoadReport report = load_gguf(path, other, plain);
  CHECK(report.adapters == std::vector<AdapterScale>{{"w0", 3, 16, 16.0 / 3}, {"w1", 0, 16, 0}, {"w2", 2, 16, 8}});
  CHECK(other.layers[1].adapter.components() == 0);
  CHECK(same_bits(other.layers[0].adapter.delta(3), model.layers[0].adapter.delta(3)));
  CHECK(same_bits(other.layers[2].adapter.delta(2), model.layers[2].adapter.delta(2)));

  auto smaller = modules({{.max_rank = 4}});  // w1 has no place in it
  CHECK_THROWS_SAYING(FormatError, load_gguf(path, smaller, plain), "dylora.rank_0: w1", "w2.weight.lora_b");
}

TEST_CASE("A module that has no component need not be in the file, nor have a name in it") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  save_gguf(path, modules({{.max_rank = 2}}), 2, plain);
  auto model = modules({{.max_rank = 2}, {.max_rank = 0}});
  const LoadReport report = load_gguf(path, model, plain);
  CHECK(report.adapters.size() == 1);
  CHECK(report.missing_modules.empty());

  GgufOptions first_only = plain;
  first_only.name = [](std::string_view module) { return module == "w0" ? "w0" : ""; };
  CHECK(save_gguf(path, model, 2, first_only).size() == 1);
  CHECK(load_gguf(path, model, first_only).adapters.size() == 1);
}

namespace {

/// Nothing that a file could have.
template <class S>
struct Opaque : LowRank<S> {
  using LowRank<S>::LowRank;
  LowRankFactors<S> factors(Index) const = delete;
};

struct Mixed {
  using Scalar = float;
  struct Gradients {
    Linear<float>::Gradients adapted;
    FrozenLinear<float>::Gradients frozen;
    Linear<float, Opaque<float>>::Gradients opaque;
    Gradient<MatrixX<float>> scale;
  };
  Linear<float> adapted = linear(3, 2, {.max_rank = 2}, 1);
  FrozenLinear<float> frozen{MatrixX<float>(noise<float>(2, 3, 2))};
  Linear<float, Opaque<float>> opaque;
  MatrixX<float> scale;
  bool has_scale = false;

  explicit Mixed(Index opaque_rank)
      : opaque(MatrixX<float>(noise<float>(2, 3, 3)),
               Opaque<float>(RowMatrix<float>::Zero(opaque_rank, 3), MatrixX<float>::Zero(2, opaque_rank), {})) {}

  static void members(const auto& f, auto&... t) {
    f(Child<Linear<float>>{"adapted"}, t.adapted...);
    f(Child<FrozenLinear<float>>{"frozen"}, t.frozen...);
    f(Child<Linear<float, Opaque<float>>>{"opaque"}, t.opaque...);
    if (std::get<0>(std::tie(t...)).has_scale) f(Parameter{"adapted_too.scale"}, t.scale...);
  }
};

}  // namespace

TEST_CASE("Layers without an adapter are passed over, others that cannot be in a file are named") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  Mixed model(0);
  save_gguf(path, model, 2, plain);
  CHECK(GgufFile(path).contents().tensors.size() == 2);
  CHECK(load_gguf(path, model, plain).adapters.size() == 1);

  Mixed opaque(1);
  CHECK_THROWS_SAYING(std::invalid_argument, save_gguf(path, opaque, 2, plain),
                      "module \"opaque\": expected an adapter that is one low-rank");
  CHECK_THROWS_SAYING(std::invalid_argument, load_gguf(path, opaque, plain), "module \"opaque\"");
  model.has_scale = true;
  CHECK_THROWS_SAYING(std::invalid_argument, save_gguf(path, model, 2, plain),
                      "parameter \"adapted_too.scale\": expected one of a layer's");
}

TEST_CASE("What llama.cpp would not load is not saved, and the file that was there stays") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  const Linear<float> layer = linear(3, 2, {.max_rank = 2}, 1);
  save_gguf(path, layer, 2, plain);
  const std::string before = contents_of(path);
  const auto refuses = [&](const Modules<Linear<float>>& model, const std::vector<Index>& ranks, const GgufOptions& options,
                           auto... parts) {
    CHECK_THROWS_SAYING(std::invalid_argument, save_gguf(path, model, ranks, options), parts...);
    CHECK(contents_of(path) == before);
  };
  const auto one = [&](std::string name) { return Modules<Linear<float>>{{std::move(name)}, {linear(3, 4, {.max_rank = 2}, 1)}}; };
  const GgufOptions gpt2{.architecture = "gpt2", .name = gguf_gpt2_name};

  refuses(one("w"), {2}, {.name = same_name}, "GgufOptions: architecture");
  refuses(one("w"), {2}, {.architecture = "test"}, "GgufOptions: name");
  refuses(one("h.0.attn.q_proj"), {2}, gpt2, "module \"h.0.attn.q_proj\"", "expected a name");
  refuses(one("wte"), {2}, gpt2, "module \"wte\"", "token_embd", "got an embedding");
  refuses(one("wpe"), {2}, gpt2, "module \"wpe\"", "position_embd", "got an embedding");
  refuses(one("h.1.ln_2"), {2}, gpt2, "module \"h.1.ln_2\"", "blk.1.ffn_norm", "got a norm");
  refuses(one(std::string(50, 'n')), {2}, plain, "name: expected at most 63 bytes, got 64");
  GgufOptions one_name = plain;
  one_name.name = [](std::string_view) { return "w"; };
  refuses(modules({{.max_rank = 2}, {.max_rank = 2}}), {2, 2}, one_name, "module \"w1\": expected a tensor of its own", "\"w0\"");
  refuses(one("model.layers.0.self_attn.k_proj"), {2}, {.architecture = "llama", .name = gguf_llama_name}, "blk.0.attn_k",
          "expected the number of heads, got 0");
  for (const Index wrong : {-1, 3, 4}) {
    GgufOptions options = llama;
    options.key_value_heads = 0;
    options.heads = wrong;
    refuses(one("layers.0.self_attn.k_proj"), {2}, options, "expected a number of heads that divides its 4 rows into even parts");
  }
  refuses(one("w"), {3}, plain, "module \"w\": rank: expected a value in [0, 2], got 3");
  refuses(one("w"), {-1}, plain, "module \"w\": rank: expected a value in [0, 2], got -1");
  refuses(one("w"), {0}, plain, "save_gguf: expected a model with an adapter that has a component, got none");
  refuses(one("w"), {}, plain, "expected a rank for each of 1 adapters, got 0");
  refuses(one("w"), {1, 1}, plain, "expected a rank for each of 1 adapters, got 2");
  refuses({}, {}, plain, "save_gguf: expected a model with an adapter that has a component, got none");
  CHECK_THROWS_SAYING(std::invalid_argument, save_gguf(path, layer, 0, plain), "save_gguf: rank: expected a value in [1, 2], got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, save_gguf(path, layer, 3, plain), "save_gguf: rank: expected a value in [1, 2], got 3");

  const auto infinite = [&](auto change) {
    Modules<Linear<double>> model{{"w"}, {linear<double>(3, 2, {.max_rank = 2}, 1)}};
    change(model.layers[0].adapter);
    CHECK_THROWS_SAYING(NonFiniteError, save_gguf(path, model, 2, plain), "module \"w\": expected values that are finite as F32");
    CHECK(contents_of(path) == before);
  };
  infinite([](auto& adapter) { adapter.A(1, 2) = dylora::test::nan<double>; });
  infinite([](auto& adapter) { adapter.B(1, 1) = std::numeric_limits<double>::infinity(); });
  infinite([](auto& adapter) { adapter.A(0, 0) = 1e39; });  // not in F32
  const auto with_alpha = [&](double alpha) {
    Linear<float> scaled = layer;
    scaled.adapter.options.alpha = alpha;
    return scaled;
  };
  const std::string_view module = "save_gguf: module \"\": expected a";
  for (const double alpha : {HUGE_VAL, 1e60, dylora::test::nan<double>})
    CHECK_THROWS_SAYING(NonFiniteError, save_gguf(path, with_alpha(alpha), 2, plain), module, "a finite scale");
  CHECK_THROWS_SAYING(std::invalid_argument, save_gguf(path, with_alpha(1e-60), 2, plain), module, "a scale other than 0");  // 0 in float
  CHECK(contents_of(path) == before);
  CHECK_THROWS_SAYING(FileError, save_gguf("/nowhere/at/all.gguf", layer, 2, plain), "/nowhere/at/all.gguf");
}

TEST_CASE("What is no adapter for the model is refused, and nothing of it loaded") {
  struct Case {
    const char* name;
    std::function<void(AdapterFile&)> change;
    const char* message;
  };
  const auto text = [](const char* value) { return GgufValue(std::string(value)); };
  const std::vector<Case> cases{
      {"a model", [&](AdapterFile& f) { f.value("general.type") = text("model"); }, "general.type: expected \"adapter\", got \"model\""},
      {"no type", [&](AdapterFile& f) { f.contents.metadata.erase(f.contents.metadata.begin() + 1); },
       "general.type: expected \"adapter\", got none"},
      {"a control vector", [&](AdapterFile& f) { f.value("adapter.type") = text("control"); },
       "adapter.type: expected \"lora\", got \"control\""},
      {"another base", [&](AdapterFile& f) { f.value("general.architecture") = text("gpt2"); },
       "general.architecture: expected \"test\", got \"gpt2\""},
      {"an activated LoRA", [&](AdapterFile& f) { f.value("adapter.alora.invocation_tokens") = GgufArray(std::vector<std::uint32_t>{1}); },
       "adapter.alora.invocation_tokens"},
      {"alpha as f64", [&](AdapterFile& f) { f.value("adapter.lora.alpha") = 2.0; }, "adapter.lora.alpha: expected a finite number as f32"},
      {"alpha is NaN", [&](AdapterFile& f) { f.value("adapter.lora.alpha") = dylora::test::nan<float>; },
       "adapter.lora.alpha: expected a finite number"},
      {"alpha is infinite", [&](AdapterFile& f) { f.value("adapter.lora.alpha") = HUGE_VALF; },
       "adapter.lora.alpha: expected a finite number"},
      {"rank_0 is no list", [&](AdapterFile& f) { f.value("dylora.rank_0") = text("w"); }, "dylora.rank_0: expected an array of strings"},
      {"rank_0 is a list of numbers", [&](AdapterFile& f) { f.value("dylora.rank_0") = GgufArray(std::vector<float>{1}); },
       "dylora.rank_0: expected an array of strings"},
      {"rank 0 and 1", [&](AdapterFile& f) { f.value("dylora.rank_0") = GgufArray(std::vector<std::string>{"w"}); },
       "tensor \"w\": expected either factors or a place in dylora.rank_0, got both"},
      {"no B", [&](AdapterFile& f) { f.contents.tensors.pop_back(); }, "tensor \"w.weight.lora_b\": expected it beside its other half"},
      {"no A", [&](AdapterFile& f) { f.contents.tensors.erase(f.contents.tensors.begin()); },
       "tensor \"w.weight.lora_a\": expected it beside"},
      {"A for another input",
       [&](AdapterFile& f) {
         f.lora_a().shape = {3, 1};
       },
       "tensor \"w.weight.lora_a\": expected a matrix of 3 × 3, got 3 × 1"},
      {"B for another output",
       [&](AdapterFile& f) {
         f.lora_b().shape = {1, 2};
       },
       "tensor \"w.weight.lora_b\": expected a matrix of 2 × 1, got 1 × 2"},
      {"rank 0",
       [&](AdapterFile& f) {
         f.lora_a().shape = {0, 3}, f.lora_a().bytes = {};
         f.lora_b().shape = {2, 0}, f.lora_b().bytes = {};
       },
       "tensor \"w.weight.lora_a\": expected a matrix of 1 × 3, got 0 × 3"},
      {"B of no elements, each of many columns",
       [&](AdapterFile& f) {
         f.lora_b().shape = {0, Index{1} << 40}, f.lora_b().bytes = {};
       },
       "tensor \"w.weight.lora_b\": expected a matrix of 2 × 1, got 0 × 1099511627776"},
      {"alpha of no scale",
       [&](AdapterFile& f) {
         f.value("adapter.lora.alpha") = std::numeric_limits<float>::denorm_min();
         f.a.resize(6), f.b.resize(4);
         f.lora_a() = {"w.weight.lora_a", ggml_type(DType::F32), {2, 3}, std::as_bytes(std::span(f.a))};
         f.lora_b() = {"w.weight.lora_b", ggml_type(DType::F32), {2, 2}, std::as_bytes(std::span(f.b))};
       },
       "adapter.lora.alpha: expected one that is not 0 when divided by a rank of 2"},
      {"three dimensions",
       [&](AdapterFile& f) {
         f.lora_a().shape = {3, 1, 1};
       },
       "tensor \"w.weight.lora_a\": expected a matrix of 3 × 3, got 3 × 1 × 1"},
      {"integers", [&](AdapterFile& f) { f.lora_a().type = ggml_type(DType::I32); },
       "tensor \"w.weight.lora_a\": expected F32, F16, BF16 or F64, got I32"},
      {"A with a NaN", [&](AdapterFile& f) { f.a[1] = dylora::test::nan<float>; },
       "tensor \"w.weight.lora_a\": expected finite values, got a NaN or an infinity"},
      {"B infinite", [&](AdapterFile& f) { f.b[1] = -HUGE_VALF; },
       "tensor \"w.weight.lora_b\": expected finite values, got a NaN or an infinity"},
      {"a tensor for another module",
       [&](AdapterFile& f) {
         f.contents.tensors.push_back({"v.weight.lora_a", ggml_type(DType::F32), {0}, {}});
       },
       "no fewer and no others; tensors that belong to no module of the model: \"v.weight.lora_a\""},
      {"a tensor that is no factor",
       [&](AdapterFile& f) {
         f.contents.tensors.push_back({"w.weight", ggml_type(DType::F32), {0}, {}});
       },
       "tensors that belong to no module of the model: \"w.weight\""},
      {"no tensors for the module", [&](AdapterFile& f) { f.contents.tensors.clear(); }, "modules of the model that got nothing: \"\""},
      {"another name", [&](AdapterFile& f) { f.lora_a().name = "x.weight.lora_a", f.lora_b().name = "x.weight.lora_b"; },
       "got nothing: \"\"; tensors that belong to no module of the model: \"x.weight.lora_a\", \"x.weight.lora_b\""},
  };
  for (const Case& refused : cases) {
    INFO(refused.name);
    AdapterFile file;
    refused.change(file);
    Linear<float> layer = for_adapter_file();
    const Linear<float> before = layer;
    CHECK_THROWS_SAYING(FormatError, load_gguf(file.contents, "a.gguf", layer, plain), "a.gguf: ", refused.message);
    CHECK(same_bits(layer.adapter.delta(2), before.adapter.delta(2)));
  }
}

TEST_CASE("A quantised adapter is refused by the name of its type") {
  const std::vector<std::byte> blocks(34);
  const std::vector<float> b(2);
  GgufContents contents = AdapterFile().contents;
  contents.tensors = {{"w.weight.lora_a", ggml_type(8), {1, 32}, blocks},
                      {"w.weight.lora_b", ggml_type(DType::F32), {2, 1}, std::as_bytes(std::span(b))}};
  Linear<float> layer = linear(32, 2, {.max_rank = 1}, 1);
  CHECK_THROWS_SAYING(FormatError, load_gguf(contents, "a.gguf", layer, plain),
                      "\"w.weight.lora_a\": expected F32, F16, BF16 or F64, got Q8_0");
}

TEST_CASE("If one module does not fit, none is changed") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  const auto saved = modules({{.max_rank = 2}, {.max_rank = 2}});
  save_gguf(path, saved, 2, plain);
  Modules<Linear<float>> other{{"w0", "w1"}, {linear(5, 7, {.max_rank = 2}, 50), linear(6, 8, {.max_rank = 2}, 60)}};
  const Modules<Linear<float>> before = other;
  CHECK_THROWS_SAYING(FormatError, load_gguf(path, other, plain), path.string(), "\"w1.weight.lora_b\"");
  for (std::size_t i = 0; i < 2; ++i) CHECK(same_bits(other.layers[i].adapter.delta(2), before.layers[i].adapter.delta(2)));

  const ScaleRule constant = [](double, Index, Index) { return 2.0; };  // takes no scale from a file
  other.layers[1] = linear(6, 7, {.max_rank = 2, .scale = constant}, 60);
  CHECK_THROWS_SAYING(std::invalid_argument, load_gguf(path, other, plain), "load_gguf: module \"w1\"", "scale rule");
  CHECK(same_bits(other.layers[0].adapter.delta(2), before.layers[0].adapter.delta(2)));
}

TEST_CASE("Without alpha or at alpha 0 the scale is 1, and a negative alpha goes into B") {
  const MatrixX<float> product = (MatrixX<float>(2, 3) << 4, 8, 12, 5, 10, 15).finished();
  const auto check = [&](auto change, double alpha, float scale, std::size_t notes) {
    AdapterFile file;
    change(file);
    Linear<float> layer = for_adapter_file();
    const LoadReport report = load_gguf(file.contents, "a.gguf", layer, plain);
    CHECK(same_bits(layer.adapter.delta(1), MatrixX<float>(scale * product)));
    CHECK(report.adapters == std::vector<AdapterScale>{{"w", 1, alpha, std::abs(scale)}});
    CHECK(report.notes.size() == notes);
  };
  check([](AdapterFile&) {}, 2, 2, 0);
  check([](AdapterFile& f) { f.contents.metadata.pop_back(); }, 0, 1, 1);
  check([](AdapterFile& f) { f.value("adapter.lora.alpha") = 0.0F; }, 0, 1, 1);
  check([](AdapterFile& f) { f.value("adapter.lora.alpha") = -0.5F; }, -0.5, -0.5, 1);
}

TEST_CASE("Factors of every floating-point type are read, whatever dimensions of 1 a writer leaves out or adds") {
  const MatrixX<float> delta = 2 * (MatrixX<float>(2, 3) << 4, 8, 12, 5, 10, 15).finished();
  const auto check = [&]<class T>(DType dtype, T, const std::vector<std::vector<Index>>& shapes) {
    for (const std::vector<Index>& shape : shapes) {
      AdapterFile file;
      const std::vector<T> a{T(1), T(2), T(3)}, b{T(4), T(5)};
      file.lora_a() = {"w.weight.lora_a", ggml_type(dtype), shape, std::as_bytes(std::span(a))};
      file.lora_b() = {"w.weight.lora_b", ggml_type(dtype), {2, 1}, std::as_bytes(std::span(b))};
      Linear<float> layer = for_adapter_file();
      load_gguf(file.contents, "a.gguf", layer, plain);
      CHECK(same_bits(layer.adapter.delta(1), delta));
    }
  };
  check(DType::F32, float(), {{1, 3}, {3}, {1, 1, 3}, {1, 1, 1, 3}});
  check(DType::F64, double(), {{1, 3}});
  check(DType::F16, Eigen::half(), {{1, 3}});
  check(DType::BF16, Eigen::bfloat16(), {{1, 3}});
}

TEST_CASE("Unless strict, what has no counterpart is reported and left as it is") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  const auto saved = modules({{.max_rank = 2}, {.max_rank = 2}});
  save_gguf(path, saved, 2, plain);
  Modules<Linear<float>> other{{"w1", "w2"}, {linear(6, 7, {.max_rank = 2}, 50), linear(6, 8, {.max_rank = 2}, 60)}};
  const Modules<Linear<float>> before = other;
  GgufOptions lenient = plain;
  lenient.strict = false;
  const LoadReport report = load_gguf(path, other, lenient);
  CHECK(report.adapters.size() == 1);
  CHECK(report.missing_modules == std::vector<std::string>{"w2"});
  CHECK(report.unmatched_tensors == std::vector<std::string>{"w0.weight.lora_a", "w0.weight.lora_b"});
  CHECK(same_bits(other.layers[0].adapter.delta(2), saved.layers[1].adapter.delta(2)));
  CHECK(same_bits(other.layers[1].adapter.delta(2), before.layers[1].adapter.delta(2)));
}

TEST_CASE("A double model goes through F32") {
  const TemporaryFolder folder;
  const auto path = folder / "adapter.gguf";
  const Linear<double> layer = linear<double>(5, 4, {.max_rank = 3, .alpha = 0.3}, 1);
  save_gguf(path, layer, 2, plain);
  Linear<double> other = linear<double>(5, 4, {.max_rank = 3, .alpha = 1}, 9);
  load_gguf(path, other, plain);
  CHECK(gap(other.adapter.delta(2), layer.adapter.delta(2)) < rounding<float>);
  CHECK(gap(other.adapter.delta(2), layer.adapter.delta(2)) > 0);
}

// Writes what gguf_reader.py compares into the folder in which it is run: adapter.gguf, baked.gguf, mixed.gguf and mixed_baked.gguf, and
// with each NAME_base.gguf and NAME_merged.gguf, the weights as llama.cpp would have them.
TEST_CASE("Files for gguf_reader.py", "[.gguf_reader]") {
  Block model = block({.max_rank = max_rank, .alpha = 7}, 1);
  const auto write = [&](const std::string& name, const std::vector<Index>& ranks) {
    std::vector<RowMatrix<float>> base, merged;
    std::vector<std::string> names;
    std::size_t i = 0;
    for_each_layer(model, [&](std::string_view module, const auto& layer) {
      const std::string tensor = gguf_llama_name(module);
      const Index permuted_heads = tensor.ends_with("attn_q") ? heads : tensor.ends_with("attn_k") ? key_value_heads : 0;
      const auto stored = [&](const RowMatrix<float>& w) { return permuted_heads == 0 ? w : permuted(w, permuted_heads); };
      names.push_back(tensor + ".weight");
      base.push_back(stored(layer.base.dense()));
      merged.push_back(ranks[i] == 0 ? base.back() : stored(layer.merged(ranks[i]).dense()));
      ++i;
    });
    const auto save = [&](const std::string& path, const std::vector<RowMatrix<float>>& weights) {
      GgufContents contents;
      for (std::size_t w = 0; w < weights.size(); ++w) contents.tensors.push_back(gguf_tensor(tensor_view(names[w], weights[w])));
      AtomicFile file(path);
      write_gguf(file, contents);
      file.commit();
    };
    save(name + "_base.gguf", base);
    save(name + "_merged.gguf", merged);
  };
  const std::vector<Index> even(5, 4), uneven{5, 3, 0, 1, 6};
  write("adapter", even);
  save_gguf("adapter.gguf", model, even, llama);
  write("baked", even);
  save_gguf("baked.gguf", model, even, baked(llama));
  model.up.adapter.options.alpha = 3;  // no alpha for all
  write("mixed", uneven);
  save_gguf("mixed.gguf", model, uneven, llama);
  write("mixed_baked", uneven);
  save_gguf("mixed_baked.gguf", model, uneven, baked(llama));
}
