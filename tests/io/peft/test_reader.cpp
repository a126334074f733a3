#include "dylora/io/peft/reader.hpp"

#include <Eigen/SVD>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dylora/io/peft/peft.hpp"
#include "dylora/ranks/order.hpp"
#include "dylora/ranks/truncate.hpp"
#include "io/peft_model.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

/// A tensor with values of its own.
struct Tensor {
  std::string name;
  std::vector<Index> shape;
  DType dtype = DType::F32;
  std::vector<std::byte> bytes = {};
};

template <class S>
Tensor tensor(std::string name, const MatrixX<S>& values, DType dtype = dtype_v<S>) {
  const RowMatrix<S> rows = values;
  const auto bytes = std::as_bytes(std::span(rows.data(), static_cast<std::size_t>(rows.size())));
  return {std::move(name), {rows.rows(), rows.cols()}, dtype, {bytes.begin(), bytes.end()}};
}

using Files = std::pair<std::string, std::vector<Tensor>>;

/// What PEFT would have saved for the layer below.
MatrixX<float> A() { return noise<float>(2, 5, 3); }
MatrixX<float> B() { return noise<float>(6, 2, 4); }
Tensor lora_A() { return tensor<float>("base_model.model.h.0.fc.lora_A.weight", A()); }
Tensor lora_B() { return tensor<float>("base_model.model.h.0.fc.lora_B.weight", B()); }
std::string config(const std::string& fields = R"("r": 2, "lora_alpha": 3)") {
  return R"({"peft_type": "LORA", "target_modules": ["fc"], )" + fields + "}";
}

void write(const std::filesystem::path& folder, const std::string& config_text, const std::vector<Tensor>& tensors,
           const std::map<std::string, std::string>& metadata = {}) {
  std::filesystem::create_directories(folder);
  put(folder / "adapter_config.json", config_text);
  std::vector<TensorView> views;
  for (const Tensor& t : tensors) views.push_back({t.name, t.dtype, t.shape, t.bytes});
  std::string file = safetensors_beginning(views, metadata);  // which writes NaNs and nothing at all, too
  for (const Tensor& t : tensors) file.append(reinterpret_cast<const char*>(t.bytes.data()), t.bytes.size());
  put(folder / "adapter_model.safetensors", file);
}

template <class S = float>
Linear<S> fc(LowRankOptions options = {.max_rank = 4}) {
  Rng rng(1);
  Linear<S> layer(MatrixX<S>(noise<S>(6, 5, 1)), options, rng);
  randomize<Linear<S>>(layer, 2);
  return layer;
}

const LoadPeftOptions in_h0{.prefix = "h.0.fc"};

template <class S>
bool same_adapter(const LowRank<S>& a, const LowRank<S>& b) {
  return same_bits(MatrixX<S>(a.A), MatrixX<S>(b.A)) && same_bits(a.B, b.B) && a.options.max_rank == b.options.max_rank &&
         a.options.alpha == b.options.alpha && a.options.scale == b.options.scale;
}

/// Loads the folder into a layer, and says what is wrong with what is thrown.
template <class Error>
std::string wrong_refusal(const std::filesystem::path& folder, std::initializer_list<std::string_view> parts, bool strict = true) {
  Linear<float> layer = fc();
  const Linear<float> before = layer;
  const std::string wrong = wrong_throw<Error>([&] { load_peft(folder, layer, {.prefix = "h.0.fc", .strict = strict}); }, parts);
  return same_adapter(layer.adapter, before.adapter) ? wrong : "the layer was changed";
}

}  // namespace

TEST_CASE("an adapter of PEFT computes W + lora_alpha / r · B · A, or with √r under use_rslora") {
  const TemporaryFolder folder;
  for (const auto& [fields, scale] : std::vector<std::pair<std::string, double>>{
           {R"("r": 2, "lora_alpha": 3)", 1.5},
           {R"("r": 2, "lora_alpha": 3, "use_rslora": true)", 3 / std::sqrt(2.0)},
           {R"("r": 2, "lora_alpha": 0.25, "use_rslora": false)", 0.125},
           {R"("r": 2, "lora_alpha": -3)", -1.5},
           {R"("r": 2)", 4},
           {R"("r": 2, "lora_alpha": 3, "alpha_pattern": {"fc": 5})", 2.5},
           {R"("r": 7, "lora_alpha": 3, "rank_pattern": {"fc": 2}, "alpha_pattern": {"other": 5})", 1.5},
           {R"("r": 7, "lora_alpha": 3, "use_rslora": true, "rank_pattern": {"fc": 2})", 3 / std::sqrt(2.0)},
           {R"("r": 7, "lora_alpha": 1, "rank_pattern": {"fcc": 1, "h.1.fc": 1, "h.\\d+.fc": 2, "fc": 3},
               "alpha_pattern": {"z$": 1, "^h\\.0\\.fc": 3, "a": 2})",
            1.5},
           {R"("r": 7, "lora_alpha": 1, "rank_pattern": {"z|fc": 2}, "alpha_pattern": {"fc": 4, "^h\\.0\\.fc": 3})", 2},
       }) {
    INFO(fields);
    write(folder.path(), config(fields), {lora_A(), lora_B()});
    for (const ScaleRule rule : {alpha_over_rank, alpha_over_sqrt_rank, alpha_over_max_rank}) {
      Linear<float> layer = fc<float>({.max_rank = 3, .alpha = 1, .scale = rule});
      const LoadReport report = load_peft(folder.path(), layer, in_h0);
      CHECK(layer.max_rank() == 2);
      CHECK(layer.adapter.options.scale == rule);
      const MatrixX<double> delta = scale * in_double(B()) * in_double(A());
      CHECK(gap(in_double(layer.adapter.delta(2)), delta) < rounding<float>);
      REQUIRE(report.adapters.size() == 1);
      CHECK(report.adapters[0].name == "h.0.fc");
      CHECK(report.adapters[0].rank == 2);
      CHECK(report.adapters[0].scale == Approx(std::abs(scale)).epsilon(1e-15));
      CHECK(report.adapters[0].scale == layer.adapter.factors(2).scale);
      CHECK((report.adapters[0].alpha < 0) == (scale < 0));
    }
  }
}

TEST_CASE("the report of a load tells what was assumed or changed") {
  const TemporaryFolder folder;
  const auto notes = [&](const std::string& fields, std::vector<Tensor> tensors) {
    write(folder.path(), config(fields), tensors);
    Linear<float> layer = fc();
    return load_peft(folder.path(), layer, in_h0).notes;
  };
  CHECK(notes(R"("r": 2, "lora_alpha": 3)", {lora_A(), lora_B()}).empty());
  CHECK(notes(R"("r": 2, "lora_alpha": -3)", {lora_A(), lora_B()}) ==
        std::vector<std::string>{"the lora_alpha of module \"h.0.fc\" is negative: its sign is now in B"});
  CHECK(notes(R"("r": 2)", {lora_A(), lora_B()}) ==
        std::vector<std::string>{"adapter_config.json: it does not say lora_alpha, so that PEFT's default counts: 8"});
  CHECK(notes(R"("r": 2, "lora_alpha": 3, "invented": 1)", {lora_A(), lora_B()}).size() == 1);
  Tensor a = lora_A(), b = lora_B();
  a.name = "base_model.model.h.0.fc.lora_A.default.weight";
  b.name = "base_model.model.h.0.fc.lora_B.default.weight";
  CHECK(notes(R"("r": 2, "lora_alpha": 3)", {a, b}) ==
        std::vector<std::string>{"the names of its tensors have the adapter's name in them: \"default\""});
}

TEMPLATE_TEST_CASE("factors may be F16, BF16, F32 or F64", "", float, double) {
  using S = TestType;
  const TemporaryFolder folder;
  const MatrixX<float> small = (16 * noise<float>(2, 5, 3)).array().round() / 16;  // exact in all of them
  const MatrixX<float> b = (16 * noise<float>(6, 2, 4)).array().round() / 16;
  const auto check = [&](const Tensor& first, const Tensor& second) {
    write(folder.path(), config(), {first, second});
    Linear<S> layer = fc<S>();
    load_peft(folder.path(), layer, in_h0);
    CHECK(same_bits(MatrixX<S>(layer.adapter.A), MatrixX<S>(small.cast<S>())));
    CHECK(same_bits(layer.adapter.B, MatrixX<S>(b.cast<S>())));
  };
  const std::string a_name = lora_A().name, b_name = lora_B().name;
  check(tensor<float>(a_name, small), tensor<float>(b_name, b));
  check(tensor<double>(a_name, small.cast<double>()), tensor<float>(b_name, b));
  check(tensor<Eigen::half>(a_name, small.cast<Eigen::half>(), DType::F16), tensor<double>(b_name, b.cast<double>()));
  check(tensor<Eigen::bfloat16>(a_name, small.cast<Eigen::bfloat16>(), DType::BF16),
        tensor<Eigen::half>(b_name, b.cast<Eigen::half>(), DType::F16));
}

TEST_CASE("a file whose tensors are not those of plain, finite, fitting factors is refused by their name") {
  const TemporaryFolder folder;
  const auto refused = [&](const std::vector<Tensor>& tensors, std::initializer_list<std::string_view> parts,
                           const std::string& fields = R"("r": 2, "lora_alpha": 3)", bool strict = false) {
    write(folder.path(), config(fields), tensors);
    return wrong_refusal<FormatError>(folder.path(), parts, strict);
  };
  const Tensor a = lora_A(), b = lora_B();
  const auto named = [](const std::string& name) { return tensor<float>(name, noise<float>(6, 1, 1)); };
  const auto path = (folder / "adapter_model.safetensors").string();

  CHECK(refused({a, b, named("base_model.model.h.0.fc.lora_magnitude_vector")}, {path, "lora_magnitude_vector", "DoRA"}) == "");
  CHECK(refused({a, b, {"base_model.model.wte.lora_embedding_A", {0}}}, {path, "lora_embedding_A", "expected a matrix"}) == "");
  CHECK(refused({a, b, named("base_model.model.h.0.fc.lora_B.bias")}, {path, "lora_B.bias", "lora_bias"}) == "");
  CHECK(refused({a, b, named("base_model.model.h.0.fc.lora_B.default.bias")}, {path, "lora_B.default.bias", "lora_bias"}) == "");
  CHECK(refused({a, b, {"base_model.model.conv.lora_A.weight", {0, 8, 3}}}, {path, "conv.lora_A.weight", "matrix", "0 × 8 × 3,"}) == "");
  CHECK(refused({a, b, {"base_model.model.conv.lora_A.weight", {0, 8, 3, 3, 3}}}, {path, "conv.lora_A.weight", "0 × 8 × 3 × 3 × 3"}) == "");
  CHECK(refused({a, {"base_model.model.h.0.fc.lora_B.weight", {0}}}, {path, "lora_B.weight", "expected a matrix"}) == "");

  CHECK(refused({a}, {path, "module \"h.0.fc\"", "only the first"}) == "");
  CHECK(refused({b}, {path, "module \"h.0.fc\"", "only the second"}) == "");
  CHECK(refused({a, b, named("base_model.model.h.0.fc.lora_A.other.weight")}, {path, "one adapter", "\"\"", "\"other\""}) == "");
  CHECK(refused({named("base_model.model.a.lora_A.one.weight"), named("base_model.model.a.lora_B.two.weight")},
                {path, "one adapter", "\"one\"", "\"two\""}) == "");

  CHECK(refused({a, b}, {path, "lora_A.weight", "expected 8 × 5 (rank × in_features, the rank from adapter_config.json)", "got 2 × 5"},
                R"("lora_alpha": 3)") == "");
  CHECK(refused({a, b}, {path, "expected 3 × 5", "got 2 × 5"}, R"("r": 2, "lora_alpha": 3, "rank_pattern": {"fc": 3})") == "");
  CHECK(refused({tensor<float>(a.name, noise<float>(2, 4, 1)), b}, {path, "lora_A.weight", "expected 2 × 5", "got 2 × 4"}) == "");
  CHECK(refused({a, tensor<float>(b.name, noise<float>(2, 6, 1))},
                {path, "lora_B.weight", "expected 6 × 2", "out_features × rank", "got 2 × 6"}) == "");
  CHECK(refused({a, tensor<float>(b.name, noise<float>(6, 3, 1))}, {path, "lora_B.weight", "expected 6 × 2", "got 6 × 3"}) == "");
  CHECK(refused({{a.name, {2, 5}, DType::U8, std::vector<std::byte>(10)}, b}, {path, "lora_A.weight", "expected F16", "U8"}) == "");

  for (const double bad : {nan<double>, std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()}) {
    MatrixX<double> values = in_double(B());
    values(4, 1) = bad;
    CHECK(refused({a, tensor<double>(b.name, values)}, {path, "lora_B.weight", "finite", "NaN"}) == "");
    CHECK(refused({a, tensor<float>(b.name, values.cast<float>())}, {path, "lora_B.weight", "finite", "NaN"}) == "");
    CHECK(refused({a, tensor<Eigen::half>(b.name, values.cast<Eigen::half>(), DType::F16)}, {path, "lora_B.weight", "NaN"}) == "");
  }
  CHECK(refused({a, tensor<double>(b.name, MatrixX<double>::Constant(6, 2, 1e300))}, {path, "lora_B.weight", "type of numbers"}) == "");
  CHECK(refused({a, b}, {path, "module \"h.0.fc\"", "scale"}, R"("r": 2, "lora_alpha": 1e60)") == "");
  CHECK(refused({a, b}, {path, "module \"h.0.fc\"", "scale"}, R"("r": 2, "lora_alpha": 1e-60)") == "");
}

TEST_CASE("a pattern that is not understood is refused where it matters, and only there") {
  const TemporaryFolder folder;
  const auto pattern = [](const std::string& keys) { return config(R"("r": 2, "lora_alpha": 3, "rank_pattern": )" + keys); };
  write(folder.path(), pattern(R"({"(?i)FC": 2, "fc": 2})"), {lora_A(), lora_B()});
  CHECK(wrong_refusal<FormatError>(folder.path(), {(folder / "adapter_config.json").string() + ": rank_pattern: key \"(?i)FC\"",
                                                   "a group with (?", "module \"h.0.fc\""}) == "");
  write(folder.path(), config(R"("r": 2, "lora_alpha": 3, "alpha_pattern": {"f{1}c": 2})"), {lora_A(), lora_B()});
  CHECK(wrong_refusal<FormatError>(folder.path(), {"alpha_pattern: key \"f{1}c\"", "braces"}) == "");
  for (const char* keys : {R"({"fc": 2, "(?i)FC": 7})", R"({"h.0.fc": 2, "(?i)FC": 7})"}) {
    write(folder.path(), pattern(keys), {lora_A(), lora_B()});
    Linear<float> layer = fc();
    CHECK_NOTHROW(load_peft(folder.path(), layer, in_h0));
  }
}

TEST_CASE("a load that leaves something out is an error, or reported where that is asked for") {
  const TemporaryFolder folder;
  PeftModel<float> source;
  save_peft(folder / "all", source, 2, {.prefix = "m"});
  const auto values_of = [](const PeftModel<float>& model) { return values<PeftModel<float>>(model); };

  const SafetensorsFile all(folder / "all/adapter_model.safetensors");
  std::vector<Tensor> some;
  for (const TensorView& t : all.tensors()) {
    if (t.name.find("head") == t.name.npos) some.push_back({t.name, t.shape, t.dtype, {t.bytes.begin(), t.bytes.end()}});
  }
  for (const char* name : {"base_model.model.m.lm_head.weight", "base_model.model.m.other.lora_A.weight", "transformer.head.lora_A.weight",
                           "base_model.model.lora_A.weight", "base_model.model.m.head.lora_C.weight",
                           "base_model.model.m.head.lora_A..weight", "base_model.model.m.head.lora_A"}) {
    some.push_back(tensor<float>(name, noise<float>(2, 2, 1)));
  }
  write(folder / "some", contents_of(folder / "all/adapter_config.json"), some, {{"dylora.rank_0", R"(["m.gone"])"}});

  PeftModel<float> model({.max_rank = 5, .alpha = 2}, 3);
  const VectorX<float> before = values_of(model);
  CHECK_THROWS_SAYING(FormatError, load_peft(folder / "some", model, {.prefix = "m"}), (folder / "some/adapter_model.safetensors").string(),
                      "modules of the model that got nothing: \"m.head\";",
                      "tensors that belong to no module of the model:", "\"base_model.model.m.lm_head.weight\"",
                      "\"base_model.model.m.other.lora_A.weight\"", "\"transformer.head.lora_A.weight\"", "\"dylora.rank_0: m.gone\"");
  CHECK(same_bits(values_of(model), before));

  const LoadReport report = load_peft(folder / "some", model, {.prefix = "m", .strict = false});
  CHECK(report.adapters.size() == 6);
  CHECK(report.missing_modules == std::vector<std::string>{"m.head"});
  CHECK(report.unmatched_tensors == std::vector<std::string>{"base_model.model.lora_A.weight", "base_model.model.m.head.lora_A",
                                                             "base_model.model.m.head.lora_A..weight",
                                                             "base_model.model.m.head.lora_C.weight", "base_model.model.m.lm_head.weight",
                                                             "base_model.model.m.other.lora_A.weight", "dylora.rank_0: m.gone",
                                                             "transformer.head.lora_A.weight"});
  CHECK(model.head.max_rank() == 5);
  CHECK(model.h[0].q_proj.max_rank() == 2);

  PeftModel<float> again({.max_rank = 5, .alpha = 2}, 3);
  CHECK_THROWS_SAYING(FormatError, load_peft(folder / "all", again), "are the names right, and the prefix?", "\"head\"",
                      "\"base_model.model.m.h.0.attn.c_attn.lora_A.weight\"", "and 4 more");
  CHECK(same_bits(values_of(again), before));
  CHECK(load_peft(folder / "all", again, {.strict = false}).adapters.empty());
  CHECK(same_bits(values_of(again), before));
}

TEST_CASE("a module at rank 0 is known from one that is missing") {
  const TemporaryFolder folder;
  write(folder.path(), config(), {}, {{"dylora.rank_0", R"(["h.0.fc"])"}});
  Linear<float> layer = fc();
  const LoadReport report = load_peft(folder.path(), layer, in_h0);
  CHECK(report.adapters == std::vector<AdapterScale>{{.name = "h.0.fc"}});
  CHECK(layer.max_rank() == 0);
  write(folder.path(), config(), {});
  CHECK(wrong_refusal<FormatError>(folder.path(), {"got nothing: \"h.0.fc\""}) == "");
  CHECK_NOTHROW(load_peft(folder.path(), layer, in_h0));  // it has no adapter to miss
  Linear<float> cut = fc();
  truncate_each(cut, {0});
  CHECK(load_peft(folder.path(), cut, in_h0).missing_modules.empty());  // nor has this, though it accepts ranks
  CHECK(cut.max_rank() == 4);
  write(folder.path(), config(), {lora_A(), lora_B()});
  CHECK_NOTHROW(load_peft(folder.path(), layer, in_h0));  // it gets one again
  CHECK(layer.max_rank() == 2);

  write(folder.path(), config(), {lora_A(), lora_B()}, {{"dylora.rank_0", R"(["h.0.fc"])"}});
  CHECK(wrong_refusal<FormatError>(folder.path(), {"dylora.rank_0", "without tensors", "\"h.0.fc\""}) == "");
  for (const char* bad : {"{}", "[1]", "\"h.0.fc\"", "null"}) {
    write(folder.path(), config(), {lora_A(), lora_B()}, {{"dylora.rank_0", bad}});
    CHECK(wrong_refusal<FormatError>(folder.path(), {"dylora.rank_0: expected a list of strings"}) == "");
  }
  write(folder.path(), config(), {lora_A(), lora_B()}, {{"dylora.rank_0", "["}});
  CHECK(wrong_refusal<FormatError>(folder.path(), {"dylora.rank_0", "expected JSON"}) == "");
}

TEST_CASE("what is not the folder of an adapter says what is there instead") {
  const TemporaryFolder folder;
  CHECK(wrong_refusal<FileError>(folder / "none", {(folder / "none/adapter_config.json").string(), "cannot read"}) == "");
  CHECK(wrong_refusal<FileError>(folder.path(), {"adapter_config.json", "for the scale, and there is none"}) == "");
  write(folder / "sub/inner", config(), {lora_A(), lora_B()});
  write(folder / "sub/default", config(), {lora_A(), lora_B()});
  CHECK(wrong_refusal<FileError>(folder / "sub", {"there is one in the folder \"default\" in it"}) == "");

  put(folder / "adapter_config.json", config());
  CHECK(wrong_refusal<FileError>(folder.path(), {(folder / "adapter_model.safetensors").string(), "cannot read"}) == "");
  put(folder / "adapter_model.bin", "PK");
  CHECK(wrong_refusal<FileError>(folder.path(),
                                 {(folder / "adapter_model.safetensors").string(), "adapter_model.bin", "pickle", "safetensors"}) == "");
  put(folder / "adapter_model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 134\n");
  CHECK(wrong_refusal<FormatError>(folder.path(), {(folder / "adapter_model.safetensors").string(), "Git LFS"}) == "");
  put(folder / "adapter_config.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 134\n");
  CHECK(wrong_refusal<FormatError>(folder.path(), {(folder / "adapter_config.json").string(), "Git LFS"}) == "");
  put(folder / "adapter_config.json", R"({"peft_type": "LOHA"})");
  CHECK(wrong_refusal<FormatError>(folder.path(), {(folder / "adapter_config.json").string(), "LOHA"}) == "");
}

TEST_CASE("a new config beside old weights, as a crash between the two leaves them, is refused unless it says the same") {
  const TemporaryFolder folder;
  const auto beside_old = [&](const std::string& config_text) {
    save_peft(folder / "old", fc<float>({.max_rank = 4, .alpha = 1}), 4, {.prefix = "h.0.fc"});
    put(folder / "old/adapter_config.json", config_text);
  };
  const auto of_save = [&](double alpha, Index rank, const std::string& base = "") {
    save_peft(folder / "new", fc<float>({.max_rank = 4, .alpha = alpha}), rank, {.prefix = "h.0.fc", .base_model_name_or_path = base});
    return contents_of(folder / "new/adapter_config.json");
  };
  const std::string weights = (folder / "old/adapter_model.safetensors").string();
  const std::initializer_list<std::string_view> of_two{weights, "dylora.config", "of one save"};
  for (const auto& [alpha, rank] : {std::pair(10.0, 4), {1.0, 2}, {-1.0, 4}, {std::nextafter(1.0, 2.0), 4}}) {
    beside_old(alpha > 0 ? of_save(alpha, rank) : config(R"("r": 4, "lora_alpha": -1)"));
    CHECK(wrong_refusal<FormatError>(folder / "old", of_two) == "");
  }
  for (const char* fields : {R"("use_rslora": true)", R"("rank_pattern": {"x": 3})", R"("alpha_pattern": {"h.0.fc": 10})"}) {
    beside_old(config(R"("r": 4, "lora_alpha": 1, )" + std::string(fields)));
    CHECK(wrong_refusal<FormatError>(folder / "old", of_two) == "");
  }

  for (const std::string& same : {of_save(1, 4, "openai-community/gpt2"), config(R"("lora_alpha": 1.0, "r": 4)"),
                                  config(R"("r": 4, "lora_alpha": 1, "use_rslora": false, "rank_pattern": null, "alpha_pattern": {})")}) {
    beside_old(same);
    Linear<float> layer = fc();
    CHECK(load_peft(folder / "old", layer, in_h0).adapters == std::vector<AdapterScale>{{"h.0.fc", 4, 1, 0.25}});
  }
}

TEST_CASE("the order of a pattern's keys, of which the first that matches counts, is of one save with the weights") {
  const auto sum = [](std::vector<std::pair<std::string, Index>> pattern) {
    return peft_config_checksum({.r = 4, .rank_pattern = std::move(pattern)});
  };
  CHECK(sum({{"a", 1}, {"b", 2}}) == sum({{"a", 1}, {"b", 2}}));
  CHECK(sum({{"a", 1}, {"b", 2}}) != sum({{"b", 2}, {"a", 1}}));
  CHECK(sum({{"a", 1}}) != peft_config_checksum({.r = 4, .alpha_pattern = {{"a", 1}}}));
}

TEST_CASE("an adapter of the model that cannot take the factors is named, and nothing is set") {
  const TemporaryFolder folder;
  struct Closed : LowRank<float> {
    using LowRank<float>::LowRank;
    void set_factors(int) {}
  };
  static_assert(!PortableAdapter<Closed>);
  write(folder.path(), config(), {lora_A(), lora_B()});
  Rng rng(1);
  Linear<float, Closed> closed(MatrixX<float>(noise<float>(6, 5, 1)), LowRankOptions{.max_rank = 4}, rng);
  CHECK_THROWS_SAYING(std::invalid_argument, load_peft(folder.path(), closed, in_h0), "load_peft: module \"h.0.fc\"", "PortableAdapter");
  CHECK_THROWS_SAYING(std::invalid_argument, load_peft(folder.path(), closed, {.prefix = "other"}), "module \"other\"", "PortableAdapter");
  closed.adapter = Closed(RowMatrix<float>(0, 5), MatrixX<float>(6, 0), {});
  CHECK_THROWS_SAYING(FormatError, load_peft(folder.path(), closed, in_h0), "no module of the model", "h.0.fc.lora_A.weight");

  FrozenLinear<float> frozen(MatrixX<float>(noise<float>(6, 5, 1)));
  CHECK_THROWS_SAYING(FormatError, load_peft(folder.path(), frozen, in_h0), "no module of the model", "h.0.fc.lora_A.weight");

  Linear<float> fixed = fc<float>({.max_rank = 4, .alpha = 1, .scale = [](double, Index, Index) { return 7.0; }});
  const Linear<float> before = fixed;
  CHECK_THROWS_SAYING(std::invalid_argument, load_peft(folder.path(), fixed, in_h0), "load_peft: module \"h.0.fc\"", "scale rule");
  CHECK(same_adapter(fixed.adapter, before.adapter));
  CHECK_THROWS_SAYING(std::invalid_argument, load_peft(folder.path(), fixed), "PEFT: prefix");
}

TEST_CASE("an error in the last module leaves the first as it was") {
  const TemporaryFolder folder;
  const PeftModel<float> source;
  save_peft(folder / "good", source, 2);
  std::vector<Tensor> tensors;
  const SafetensorsFile good(folder / "good/adapter_model.safetensors");
  for (const TensorView& t : good.tensors()) tensors.push_back({t.name, t.shape, t.dtype, {t.bytes.begin(), t.bytes.end()}});
  for (Tensor& t : tensors) {
    if (t.name == "base_model.model.head.lora_B.weight") std::fill(t.bytes.begin(), t.bytes.end(), std::byte{0xff});
  }
  write(folder / "bad", contents_of(folder / "good/adapter_config.json"), tensors);
  PeftModel<float> model({.max_rank = 5, .alpha = 2}, 3);
  const VectorX<float> before = values<PeftModel<float>>(model);
  CHECK_THROWS_SAYING(FormatError, load_peft(folder / "bad", model), "head.lora_B.weight", "NaN");
  CHECK(same_bits(values<PeftModel<float>>(model), before));
}

TEMPLATE_TEST_CASE("a plain LoRA that was loaded can have its components ordered, and is then cut as well as can be", "", float, double) {
  using S = TestType;
  const TemporaryFolder folder;
  write(folder.path(), config(R"("r": 4, "lora_alpha": 8)"),
        {tensor<float>(lora_A().name, noise<float>(4, 5, 3)), tensor<float>(lora_B().name, noise<float>(6, 4, 4))});
  Linear<S> plain = fc<S>({.max_rank = 1, .alpha = 1, .scale = alpha_over_max_rank}), ordered = plain;
  load_peft(folder.path(), plain, in_h0);
  load_peft(folder.path(), ordered, in_h0);
  order_components(ordered);
  const MatrixX<double> whole = in_double(plain.adapter.delta(4));
  CHECK(gap(in_double(ordered.adapter.delta(4)), whole) < rounding<S>);
  const Eigen::JacobiSVD<MatrixX<double>> svd(whole, Eigen::ComputeThinU | Eigen::ComputeThinV);
  for (Index rank = 1; rank < 4; ++rank) {
    const MatrixX<double> best =
        svd.matrixU().leftCols(rank) * svd.singularValues().head(rank).asDiagonal() * svd.matrixV().leftCols(rank).transpose();
    const MatrixX<double> cut = in_double(ordered.adapter.delta(rank));
    CHECK(gap(cut, best) < 10 * rounding<S>);
    CHECK((cut - whole).norm() <= (in_double(plain.adapter.delta(rank)) - whole).norm());
  }
}

}  // namespace dylora::test
