#include "dylora/io/peft/kinds.hpp"
#include "dylora/methods/dora/dora_linear.hpp"

#include <array>
#include <cstddef>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dylora/io/gguf/adapter.hpp"
#include "dylora/io/peft/peft.hpp"
#include "dylora/methods/chain/chain.hpp"
#include "dylora/methods/multilora.hpp"
#include "dylora/methods/pissa/offset_low_rank.hpp"
#include "dylora/methods/prilora/proportional.hpp"
#include "io/peft_kinds_model.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

constexpr std::array rules{alpha_over_rank, alpha_over_sqrt_rank, alpha_over_max_rank};

LowRankOptions options_of(ScaleRule rule) { return {.max_rank = peft_rank, .alpha = peft_alpha, .scale = rule}; }

/// Tensors of a folder that can be changed and written again.
class Edited {
 public:
  explicit Edited(const std::filesystem::path& folder) : folder_(folder) {
    const SafetensorsFile file(folder / "adapter_model.safetensors");
    for (const TensorView& t : file.tensors()) tensors_.push_back({t.name, t.dtype, t.shape, {t.bytes.begin(), t.bytes.end()}});
  }

  struct Tensor {
    std::string name;
    DType dtype;
    std::vector<Index> shape;
    std::vector<std::byte> bytes;
  };

  Tensor& operator[](const std::string& end) {
    for (Tensor& t : tensors_)
      if (t.name.ends_with(end)) return t;
    throw std::runtime_error("no tensor " + end);
  }
  Edited& rename(const std::string& end, const std::string& name) {
    (*this)[end].name = "base_model.model." + name;
    return *this;
  }
  Edited& remove(const std::string& end) {
    std::erase_if(tensors_, [&](const Tensor& t) { return t.name.ends_with(end); });
    return *this;
  }
  Edited& add(const std::string& name, std::vector<Index> shape) {
    const auto size = static_cast<std::size_t>(element_count(shape));
    tensors_.push_back({"base_model.model." + name, DType::F32, std::move(shape), std::vector<std::byte>(4 * size)});
    return *this;
  }
  Edited& reshape(const std::string& end, std::vector<Index> shape) {
    (*this)[end].shape = std::move(shape);
    return *this;
  }

  void write() const {
    std::vector<TensorView> views;
    for (const Tensor& t : tensors_) views.push_back({t.name, t.dtype, t.shape, t.bytes});
    std::string file = safetensors_beginning(views, {});
    for (const Tensor& t : tensors_) file.append(reinterpret_cast<const char*>(t.bytes.data()), t.bytes.size());
    put(folder_ / "adapter_model.safetensors", file);
  }

 private:
  std::filesystem::path folder_;
  std::vector<Tensor> tensors_;
};

/// A layer with a trained gate.
struct GatedLinear : Linear<float> {
  struct Gradients {};
  VectorX<float> gate = noise<float>(6, 1, 4);

  static void members(const auto& f, auto&... t) {
    f(Child<LowRank<float>>{}, t.adapter...);
    f(Parameter{"gate"}, t.gate...);
  }
};

/// DoRA in some layers only.
struct Mixed {
  using Scalar = float;
  struct Gradients {};
  DoraModel<float> dora;
  KindsModel<float> plain;

  static void members(const auto& f, auto&... t) {
    f(Child<DoraModel<float>>{"dora"}, t.dora...);
    f(Child<KindsModel<float>>{"plain"}, t.plain...);
  }
};

void set_use_dora(const std::filesystem::path& folder, bool use_dora) {
  std::string text = contents_of(folder / "adapter_config.json");
  const std::string before = std::string("\"use_dora\": ") + (use_dora ? "false" : "true");
  text.replace(text.find(before), before.size(), std::string("\"use_dora\": ") + (use_dora ? "true" : "false"));
  put(folder / "adapter_config.json", text);
}

template <class Model>
std::map<std::string, std::vector<Index>> shapes_of_save(Index rank) {
  const TemporaryFolder folder;
  save_peft(folder.path(), Model(), rank);
  const SafetensorsFile file(folder / "adapter_model.safetensors");
  std::map<std::string, std::vector<Index>> shapes;
  for (const TensorView& tensor : file.tensors()) shapes[tensor.name.substr(peft_prefix.size())] = tensor.shape;
  return shapes;
}

/// Saves a model at rank 2, changes its tensors, and says what is wrong with how a load is refused.
template <class Model>
std::string wrong_refusal(const std::function<void(Edited&)>& edit, std::initializer_list<std::string_view> parts) {
  const TemporaryFolder folder;
  save_peft(folder.path(), Model(), 2);
  Edited edited(folder.path());
  edit(edited);
  edited.write();
  Model model({.max_rank = 4}, 3);
  const auto before = values<Model>(model);
  const std::string path = (folder / "adapter_model.safetensors").string();
  std::string wrong = wrong_throw<FormatError>([&] { load_peft(folder.path(), model); }, {path});
  if (wrong.empty()) wrong = wrong_throw<FormatError>([&] { load_peft(folder.path(), model, {.strict = false}); }, parts);
  return same_bits(values<Model>(model), before) ? wrong : "the model was changed";
}

}  // namespace

TEMPLATE_TEST_CASE("embeddings, convolutions and DoRA that were saved at a rank and loaded compute the same bits", "", KindsModel<float>,
                   KindsModel<double>, DoraModel<float>, DoraModel<double>) {
  using Model = TestType;
  const TemporaryFolder folder;
  for (const ScaleRule rule : rules) {
    const Model model(options_of(rule));
    for (Index rank = 1; rank <= peft_rank; ++rank) {
      INFO("rank " << rank);
      const auto saved = save_peft(folder.path(), model, rank);
      Model loaded(options_of(rule), 3);
      REQUIRE_FALSE(same_bits(outputs(loaded, rank), outputs(model, rank)));
      const LoadReport report = load_peft(folder.path(), loaded);
      CHECK(same_bits(outputs(loaded, rank), outputs(model, rank)));
      CHECK(same_bits(outputs(loaded, 0), outputs(model, 0)));
      CHECK(report.adapters == saved);
      CHECK(report.notes.empty());
      const std::string before = contents_of(folder / "adapter_model.safetensors") + contents_of(folder / "adapter_config.json");
      save_peft(folder.path(), loaded, rank);
      CHECK(contents_of(folder / "adapter_model.safetensors") + contents_of(folder / "adapter_config.json") == before);
    }
  }
}

TEMPLATE_TEST_CASE("a module at rank 0 is left out of the file, and loaded as none", "", KindsModel<double>, DoraModel<double>) {
  using Model = TestType;
  const TemporaryFolder folder;
  const Model model;
  for (Index without = 0; without < Model::layers; ++without) {
    std::vector<Index> ranks(Model::layers, 3);
    ranks[static_cast<std::size_t>(without)] = 0;
    const auto saved = save_peft(folder.path(), model, ranks);
    Model loaded({.max_rank = 4}, 3), again = loaded;
    CHECK(load_peft(folder.path(), loaded).adapters == saved);
    CHECK(saved[static_cast<std::size_t>(without)].rank == 0);
    const MatrixX<double> got = outputs(loaded, 3), with = outputs(model, 3), none = outputs(model, 0);
    CHECK(((got.array() == with.array()) || (got.array() == none.array())).all());
    CHECK_FALSE(same_bits(got, with));
    CHECK_FALSE(same_bits(got, none));
    load_peft(folder.path(), again);
    save_peft(folder.path(), again, ranks);  // which has room for it still
  }
}

TEST_CASE("the tensors of embeddings, convolutions and DoRA have PEFT's names and shapes") {
  using Shapes = std::map<std::string, std::vector<Index>>;
  CHECK(shapes_of_save<KindsModel<float>>(3) == Shapes{{"wte.lora_embedding_A", {3, 9}},
                                                       {"wte.lora_embedding_B", {6, 3}},
                                                       {"conv.lora_A.weight", {3, 2, 2, 3}},
                                                       {"conv.lora_B.weight", {6, 3, 1, 1}},
                                                       {"grouped.lora_A.weight", {6, 4, 2, 2}},
                                                       {"grouped.lora_B.weight", {10, 3, 1, 1}},
                                                       {"fc.lora_A.weight", {3, 7}},
                                                       {"fc.lora_B.weight", {6, 3}}});
  CHECK(shapes_of_save<DoraModel<float>>(3) == Shapes{{"q.lora_A.weight", {3, 7}},
                                                      {"q.lora_B.weight", {6, 3}},
                                                      {"q.lora_magnitude_vector", {6}},
                                                      {"v.lora_A.weight", {3, 7}},
                                                      {"v.lora_B.weight", {5, 3}},
                                                      {"v.lora_magnitude_vector", {5}}});
}

TEST_CASE("a magnitude for each rank is saved as what it is at the saved one, and loaded as the same at every rank") {
  const TemporaryFolder folder;
  const DoraModel<double> model;
  for (Index rank = 1; rank <= peft_rank; ++rank) {
    save_peft(folder.path(), model, rank);
    DoraModel<double> loaded;
    load_peft(folder.path(), loaded);
    const auto& length = loaded.v.magnitude;
    CHECK(length.cols() == rank);
    CHECK(gap(length.col(0), model.v.magnitude.leftCols(rank).rowwise().sum()) < rounding<double>);
    CHECK(length.rightCols(rank - 1).isZero(0));
    CHECK(same_bits(loaded.q.magnitude, model.q.magnitude));
  }
}

TEST_CASE("the names of a magnitude and of an embedding's factors may end as those of a model in memory do") {
  const TemporaryFolder folder;
  const auto load_renamed = [&]<class Model>(const Model& model, const std::function<void(Edited&)>& rename) {
    save_peft(folder.path(), model, 2);
    Edited edited(folder.path());
    rename(edited);
    edited.write();
    Model loaded({.max_rank = 3}, 3);
    load_peft(folder.path(), loaded);
    CHECK(same_bits(outputs(loaded, 2), outputs(model, 2)));
  };
  const DoraModel<float> dora;
  load_renamed(dora, [](Edited& file) { file.rename("q.lora_magnitude_vector", "q.lora_magnitude_vector.weight"); });
  for (const char* end : {"", ".weight"}) {
    load_renamed(dora, [&](Edited& file) {
      for (const std::string module : {"q", "v"}) {
        file.rename(module + ".lora_A.weight", module + ".lora_A.default.weight")
            .rename(module + ".lora_B.weight", module + ".lora_B.default.weight");
        file.rename(module + ".lora_magnitude_vector", module + ".lora_magnitude_vector.default" + end);
      }
    });
  }
  load_renamed(KindsModel<float>(), [&](Edited& file) {
    for (const std::string module : {"conv", "grouped", "fc"})
      file.rename(module + ".lora_A.weight", module + ".lora_A.default.weight")
          .rename(module + ".lora_B.weight", module + ".lora_B.default.weight");
    file.rename("wte.lora_embedding_A", "wte.lora_embedding_A.default").rename("wte.lora_embedding_B", "wte.lora_embedding_B.default");
  });
}

TEST_CASE("DoRA in some modules only is not saved, and a file of one is not loaded as the other") {
  const TemporaryFolder folder;
  const Mixed mixed{DoraModel<float>(), KindsModel<float>()};
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), mixed, 2), "module \"plain.wte\"", "use_dora",
                      "all modules or in none");
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), mixed, {0, 2, 0, 0, 1, 0}), "module \"plain.grouped\"", "use_dora");
  CHECK(std::filesystem::is_empty(folder.path()));
  CHECK_NOTHROW(save_peft(folder / "dora", mixed, {2, 2, 0, 0, 0, 0}));
  CHECK_NOTHROW(save_peft(folder / "plain", mixed, {0, 0, 1, 2, 2, 5}));

  Linear<float> linear(MatrixX<float>(noise<float>(6, 7, 1)), LowRank<float>(noise<float>(2, 7, 2), noise<float>(6, 2, 3), {}));
  DoraLinear<float> dora(MatrixX<float>(noise<float>(6, 7, 1)), linear.adapter);
  save_peft(folder / "of_dora", dora, 2, {.prefix = "fc"});
  save_peft(folder / "of_linear", linear, 2, {.prefix = "fc"});
  CHECK_THROWS_SAYING(FormatError, load_peft(folder / "of_dora", linear, {.prefix = "fc"}), (folder / "of_dora").string(), "module \"fc\"",
                      "use_dora: expected false", "got true");
  CHECK_THROWS_SAYING(FormatError, load_peft(folder / "of_linear", dora, {.prefix = "fc"}), (folder / "of_linear").string(),
                      "module \"fc\"", "use_dora: expected true", "got false");
  set_use_dora(folder / "of_dora", false);
  CHECK_THROWS_SAYING(FormatError, load_peft(folder / "of_dora", linear, {.prefix = "fc"}), "fc.lora_magnitude_vector", "without use_dora");
  set_use_dora(folder / "of_linear", true);
  CHECK_THROWS_SAYING(FormatError, load_peft(folder / "of_linear", dora, {.prefix = "fc"}), "module \"fc\"", "lora_magnitude_vector",
                      "none");
}

TEST_CASE("a file of DoRA whose magnitudes do not fit is refused by their name") {
  using Model = DoraModel<float>;
  CHECK(wrong_refusal<Model>([](Edited& f) { f.remove("q.lora_magnitude_vector"); },
                             {"module \"q\"", "lora_magnitude_vector", "got none"}) == "");
  CHECK(wrong_refusal<Model>([](Edited& f) { f.remove("q.lora_A.weight"); }, {"module \"q\"", "only the second"}) == "");
  CHECK(wrong_refusal<Model>([](Edited& f) { f.remove("q.lora_A.weight").remove("q.lora_B.weight"); }, {"module \"q\"", "neither"}) == "");
  CHECK(wrong_refusal<Model>([](Edited& f) { f.remove("q.lora_magnitude_vector").add("q.lora_magnitude_vector", {5}); },
                             {"q.lora_magnitude_vector", "expected 6", "got 5"}) == "");
  CHECK(wrong_refusal<Model>(
            [](Edited& f) {
              f.reshape("q.lora_magnitude_vector", {1, 6});
            },
            {"q.lora_magnitude_vector", "expected 6", "got 1 × 6"}) == "");
  CHECK(wrong_refusal<Model>([](Edited& f) { f.add("q.lora_magnitude_vector.weight", {6}); },
                             {"q.lora_magnitude_vector.weight", "expected one of its kind"}) == "");
  CHECK(wrong_refusal<Model>([](Edited& f) { f.add("q.lora_magnitude_vector.other", {6}); }, {"one adapter", "\"other\""}) == "");
  CHECK(wrong_refusal<Model>([](Edited& f) { std::fill_n((f["v.lora_magnitude_vector"].bytes.begin() + 4), 4, std::byte{0xff}); },
                             {"v.lora_magnitude_vector", "NaN"}) == "");
}

TEST_CASE("factors of another kind of layer, or of other shapes, are refused by their name") {
  using Model = KindsModel<float>;
  const auto refused = wrong_refusal<Model>;
  CHECK(refused(
            [](Edited& f) {
              f.reshape("wte.lora_embedding_A", {9, 2});
            },
            {"wte.lora_embedding_A", "expected 2 × 9", "got 9 × 2"}) == "");
  CHECK(refused(
            [](Edited& f) {
              f.reshape("wte.lora_embedding_B", {2, 6});
            },
            {"wte.lora_embedding_B", "expected 6 × 2", "got 2 × 6"}) == "");
  CHECK(refused([](Edited& f) { f.remove("wte.lora_embedding_B"); }, {"module \"wte\"", "only the first"}) == "");
  CHECK(refused([](Edited& f) { f.rename("wte.lora_embedding_B", "wte.lora_B.weight"); },
                {"wte.lora_", "an embedding", "a linear layer"}) == "");
  CHECK(
      refused([](Edited& f) { f.rename("wte.lora_embedding_A", "wte.lora_A.weight").rename("wte.lora_embedding_B", "wte.lora_B.weight"); },
              {"module \"wte\"", "expected the factors of an embedding, got those of a linear layer"}) == "");
  CHECK(refused([](Edited& f) { f.rename("fc.lora_A.weight", "fc.lora_embedding_A").rename("fc.lora_B.weight", "fc.lora_embedding_B"); },
                {"module \"fc\"", "expected the factors of a linear layer, got those of an embedding"}) == "");
  CHECK(refused(
            [](Edited& f) {
              f.reshape("conv.lora_A.weight", {2, 12}).reshape("conv.lora_B.weight", {6, 2});
            },
            {"module \"conv\"", "expected the factors of a two-dimensional convolution, got those of a linear layer"}) == "");
  CHECK(refused([](Edited& f) { f.reshape("conv.lora_A.weight", {2, 12}); }, {"conv.lora_", "a linear layer", "convolution"}) == "");
  CHECK(refused(
            [](Edited& f) {
              f.reshape("conv.lora_A.weight", {2, 2, 3, 2});
            },
            {"conv.lora_A.weight", "expected 2 × 2 × 2 × 3", "got 2 × 2 × 3 × 2"}) == "");
  CHECK(refused([](Edited& f) { f.reshape("conv.lora_B.weight", {2, 6, 1, 1}); }, {"conv.lora_B.weight", "expected 6 × 2 × 1 × 1"}) == "");
  CHECK(refused([](Edited& f) { f.reshape("conv.lora_A.weight", {2, 2, 6}); }, {"conv.lora_A.weight", "not supported"}) == "");
  CHECK(refused([](Edited& f) { f.reshape("conv.lora_A.weight", {2, 2, 2, 3, 1}); }, {"conv.lora_A.weight", "not supported"}) == "");
  CHECK(refused([](Edited& f) { f.add("fc.lora_magnitude_vector", {6}); }, {"fc.lora_magnitude_vector", "without use_dora"}) == "");
  CHECK(refused(  // the first component, which is of the first group, gets the channels of the second
            [](Edited& f) { std::fill_n(f["grouped.lora_A.weight"].bytes.begin() + 4 * 9, 4, std::byte{0x3f}); },
            {"grouped.lora_A.weight", "one of 2 groups", "row 0"}) == "");
}

TEST_CASE("a convolution that PEFT cannot have is refused by name") {
  const TemporaryFolder folder;
  Rng rng(1);
  const SavePeftOptions options{.prefix = "conv"};
  const auto conv = [&](Conv2dOptions o) {
    return Conv2d<float>(noise<float>(4, o.in_channels / o.groups * o.kernel.height * o.kernel.width, 2), o, {.max_rank = 2}, rng);
  };
  const Conv2d<float> dilated = conv({.in_channels = 2, .image = {5, 5}, .kernel = {2, 1}, .dilation = {3, 1}});
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), dilated, 2, options), "module \"conv\"", "dilation", "3 × 1");
  const Conv2d<float> pointwise = conv({.in_channels = 2, .image = {5, 5}, .dilation = {3, 1}});
  CHECK_NOTHROW(save_peft(folder.path(), pointwise, 2, options));

  Conv2d<float> grouped = conv({.in_channels = 4, .image = {5, 5}, .groups = 2});
  truncate_each(grouped, {2, 1});
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), grouped, 2, options), "module \"conv\"", "group 1 of rank 1");
  CHECK_NOTHROW(save_peft(folder.path(), grouped, 1, options));
  truncate_each(grouped, {0, 0});
  CHECK_NOTHROW(load_peft(folder.path(), grouped, {.prefix = "conv"}));
  grouped.groups[1].adapter.options.alpha = 1;
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), grouped, 1, options), "module \"conv\"",
                      "groups of one rank and scale");

  std::string config = contents_of(folder / "adapter_config.json");
  config.replace(config.find("\"r\": 2"), 6, "\"r\": 3");
  put(folder / "adapter_config.json", config);
  Edited(folder.path()).write();  // without the checksum of the config
  CHECK_THROWS_SAYING(FormatError, load_peft(folder.path(), grouped, {.prefix = "conv"}), "module \"conv\"", "2 groups divide, got 3");
}

TEST_CASE("what a layer trains besides its adapter is not left out in silence") {
  const TemporaryFolder folder;
  const GatedLinear layer{
      Linear<float>(MatrixX<float>(noise<float>(6, 7, 1)), LowRank<float>(noise<float>(2, 7, 2), noise<float>(6, 2, 3), {}))};
  CHECK_THROWS_SAYING(std::invalid_argument, save_peft(folder.path(), layer, 1, {.prefix = "fc"}), "layer \"\"", "its adapter alone",
                      "6 parameters");
  CHECK(std::filesystem::is_empty(folder.path()));
}

TEST_CASE("a GGUF file has no place for embeddings, convolutions and DoRA, and says so") {
  const TemporaryFolder folder;
  const auto refused = [&](const auto& model, std::initializer_list<std::string_view> parts) {
    const GgufOptions options{.architecture = "gpt2", .name = [](std::string_view) { return "blk.0.ffn_up"; }};
    return wrong_throw<std::invalid_argument>([&] { save_gguf(folder / "adapter.gguf", model, 1, options); }, parts);
  };
  const KindsModel<float> kinds;
  const DoraModel<float> dora;
  CHECK(refused(kinds.wte, {"save_gguf: module", "an embedding"}) == "");
  CHECK(refused(kinds.conv, {"save_gguf: module", "a convolution"}) == "");
  CHECK(refused(kinds.grouped, {"save_gguf: module", "a convolution"}) == "");
  CHECK(refused(dora.q, {"save_gguf: module", "got one with a magnitude"}) == "");
  CHECK(std::filesystem::is_empty(folder.path()));
}

TEMPLATE_TEST_CASE("adapters of other methods are exported as a plain LoRA of the same function", "", float, double) {
  using S = TestType;
  const TemporaryFolder folder;
  const MatrixX<S> W = noise<S>(6, 7, 1), x = noise<S>(7, 3, 4);
  const auto check = [&](const auto& layer, double tolerance) {
    using Layer = std::remove_cvref_t<decltype(layer)>;
    for (Index rank = 1; rank <= layer.max_rank(); ++rank) {
      save_peft(folder.path(), layer, rank, {.prefix = "fc"});
      Linear<S> plain(W, LowRank<S>(RowMatrix<S>(0, 7), MatrixX<S>(6, 0), {}));
      load_peft(folder.path(), plain, {.prefix = "fc"});
      const MatrixX<S> expected = layer.forward(x, rank);
      CHECK(gap(in_double(plain.forward(x, plain.max_rank())), in_double(expected)) <= tolerance);
      Layer same = layer;
      load_peft(folder.path(), same, {.prefix = "fc"});
      CHECK(gap(in_double(same.forward(x, slice(same.max_rank()))), in_double(expected)) <= tolerance);
      CHECK(gap(in_double(layer.forward(x, RankSlice::none())), in_double(expected)) > 0.01);
    }
  };
  Rng rng(5);
  for (const ScaleRule rule : rules) {
    for (const GainShape gain : {GainShape::per_output, GainShape::scalar}) {
      Linear<S, MultiLora<S>> multi(W, {.max_rank = 3, .modules = 2, .alpha = 2, .scale = rule, .gain = gain}, rng);
      randomize<Linear<S, MultiLora<S>>>(multi, 2);
      check(multi, rounding<S>);  // the gains are multiplied into B
    }
    const LowRankOptions options{.max_rank = 3, .alpha = 2, .scale = rule};
    Linear<S, OffsetLowRank<S>> initialized(W, OffsetLowRank<S>(noise<S>(3, 7, 2), noise<S>(6, 3, 3), options));
    randomize<Linear<S, OffsetLowRank<S>>>(initialized, 2);
    check(initialized, rounding<S>);
    Linear<S, Chain<LowRank<S>>> chain(W, options, rng);
    randomize<Linear<S, Chain<LowRank<S>>>>(chain, 2);
    chain.adapter.extend(rng);
    randomize<Linear<S, Chain<LowRank<S>>>>(chain, 3);
    check(chain, rounding<S>);
    Linear<S, Proportional<LowRank<S>>> proportional(W, {.adapter = options, .max_rank = 5}, rng);
    randomize<Linear<S, Proportional<LowRank<S>>>>(proportional, 2);
    check(proportional, 0);
  }
}

}  // namespace dylora::test
