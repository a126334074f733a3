#include "dylora/io/parameters_file.hpp"
#include "dylora/methods/dora/dora_linear.hpp"
#include "dylora/methods/lora_flow/gated_adapters.hpp"
#include "dylora/methods/nola/factors.hpp"
#include "dylora/methods/reslora/shortcut.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dylora/adapters/dropout.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/adapters/stacked.hpp"
#include "dylora/methods/chain/chain.hpp"
#include "dylora/methods/lora_flow/flow.hpp"
#include "dylora/methods/multilora.hpp"
#include "dylora/methods/nola/nola.hpp"
#include "dylora/methods/pissa/offset_low_rank.hpp"
#include "dylora/methods/prilora/proportional.hpp"
#include "dylora/methods/reslora/stack.hpp"
#include "io/peft_kinds_model.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

constexpr Index in = 7, out = 6, max_rank = 4;

template <class S>
MatrixX<S> W() {
  return noise<S>(out, in, 1);
}

/// With other values for every seed, of what is trained.
template <class Layer>
Layer trained(Layer layer, std::uint64_t seed) {
  randomize<Layer>(layer, seed);
  return layer;
}

template <class S>
LowRank<S> low_rank(Index rank, std::uint64_t seed) {
  return {noise<S>(rank, in, seed), noise<S>(out, rank, seed + 1), {.alpha = 3}};
}

template <class S>
auto with_low_rank(std::uint64_t seed) {
  Rng rng(9);
  return trained(Linear<S>(W<S>(), {.max_rank = max_rank, .alpha = 3, .scale = alpha_over_sqrt_rank}, rng), seed);
}

template <class S>
auto with_multi(std::uint64_t seed) {
  Rng rng(9);
  return trained(Linear<S, MultiLora<S>>(W<S>(), {.max_rank = max_rank, .modules = 2, .alpha = 3}, rng), seed);
}

template <class S, NolaNesting nesting>
auto with_nola(std::uint64_t seed) {
  Rng rng(9);  // the seed of the bases is no parameter
  return trained(Linear<S, Nola<S, nesting>>(W<S>(), {.max_rank = max_rank, .bases = max_rank, .alpha = 3}, rng), seed);
}

template <class S>
auto with_initialized(std::uint64_t seed) {
  return trained(
      Linear<S, OffsetLowRank<S>>(W<S>(), OffsetLowRank<S>(noise<S>(max_rank, in, seed + 10), noise<S>(out, max_rank, seed + 20), {})),
      seed);
}

template <class S>
auto with_chain(std::uint64_t seed) {
  using Links = Chain<OffsetLowRank<S>>;
  const auto link = [&](std::uint64_t of) { return OffsetLowRank<S>(noise<S>(max_rank, in, of), noise<S>(out, max_rank, of + 1), {}); };
  Links chain({link(10 * seed), link(20 * seed), link(30 * seed)}, {});
  for (OffsetLowRank<S>& one : chain.links) one = trained(one, ++seed);
  return Linear<S, Links>(W<S>(), chain);
}

template <class S>
auto with_proportional(std::uint64_t seed) {
  Rng rng(9);
  return trained(Linear<S, Proportional<LowRank<S>>>(W<S>(), {.adapter = {.max_rank = 3}, .max_rank = max_rank}, rng), seed);
}

template <class S>
auto with_stacked(std::uint64_t seed) {
  Rng rng(9);
  using Slices = Stacked<Dropout<LowRank<S>>>;
  return trained(Linear<S, Slices>(W<S>(), {.adapters = {{.adapter = {.max_rank = 3}}, {.adapter = {.max_rank = 2}}}}, rng), seed);
}

template <class S>
auto with_flow(std::uint64_t seed) {
  return trained(Linear<S, Flow<S>>(W<S>(), Flow<S>({low_rank<S>(2, 10 * seed), low_rank<S>(max_rank, 20 * seed)})), seed);
}

template <class S, Magnitude kind>
auto with_dora(std::uint64_t seed) {
  Rng rng(9);
  return trained(DoraLinear<S, LowRank<S>, DenseWeight<S>, kind>(W<S>(), {.adapter = {.max_rank = max_rank}}, rng), seed);
}

template <class S>
auto with_residual(std::uint64_t seed) {
  Rng rng(9);
  using Links = ResidualStack<S, Shortcut::block>;
  return trained(Links({noise<S>(in, in, 1), noise<S>(in, in, 2), noise<S>(in, in, 3)}, {.adapter = {.max_rank = max_rank}}, rng), seed);
}

template <class Layer>
auto result(const Layer& layer, Index rank) {
  return layer.forward(noise<typename Layer::Scalar>(layer.in_features(), 3, 5), slice(std::min(rank, layer.max_rank())));
}
template <class S>
auto result(const KindsModel<S>& model, Index rank) {
  return outputs(model, rank);
}

/// Saves what make(1) makes, loads it into make(2), and compares at every rank; then the same of each cut.
void check_identity(const auto& make) {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder / "saved.safetensors";
  const auto model = make(1);
  save_parameters(path, model);
  auto loaded = make(2);
  for (Index rank = 1; rank <= model.max_rank(); ++rank) REQUIRE_FALSE(same_bits(result(loaded, rank), result(model, rank)));
  load_parameters(path, loaded);
  for (Index rank = 0; rank <= model.max_rank(); ++rank) CHECK(same_bits(result(loaded, rank), result(model, rank)));
  save_parameters(folder / "again.safetensors", loaded);
  CHECK(contents_of(folder / "again.safetensors") == contents_of(path));

  for (Index saved = 0; saved <= model.max_rank(); ++saved) {
    INFO("cut to " << saved);
    save_parameters(path, model, saved);
    auto cut = make(2);
    load_parameters(path, cut);
    CHECK(cut.max_rank() == model.max_rank());
    for (Index rank = 0; rank <= saved; ++rank) CHECK(same_bits(result(cut, rank), result(model, rank)));
  }
}

}  // namespace

TEMPLATE_TEST_CASE("whatever is trained comes back from its file with the same bits at every rank", "", float, double) {
  using S = TestType;
  SECTION("LowRank") { check_identity(with_low_rank<S>); }
  SECTION("MultiLora") { check_identity(with_multi<S>); }
  SECTION("Nola") { check_identity(with_nola<S, NolaNesting::rank>); }
  SECTION("NolaBases") { check_identity(with_nola<S, NolaNesting::bases>); }
  SECTION("Initialized, whose initial factors come back too") { check_identity(with_initialized<S>); }
  SECTION("Chain, whose frozen links come back too") { check_identity(with_chain<S>); }
  SECTION("Proportional") { check_identity(with_proportional<S>); }
  SECTION("Stacked and Dropout") { check_identity(with_stacked<S>); }
  SECTION("Flow, whose adapters come back too") { check_identity(with_flow<S>); }
  SECTION("DoRA with a magnitude for all ranks") { check_identity(with_dora<S, Magnitude::shared>); }
  SECTION("DoRA with a magnitude for each rank") { check_identity(with_dora<S, Magnitude::nested>); }
  SECTION("a chain of residual links") { check_identity(with_residual<S>); }
  SECTION("embeddings and convolutions") {
    check_identity([](std::uint64_t seed) { return KindsModel<S>({.max_rank = 5}, seed); });
  }
}

namespace {

/// One of everything that a file can hold: constants and settings, and parameters along both axes and none.
struct Toy {
  using Scalar = float;
  struct Gradients {};

  RowMatrix<float> A = noise<float>(3, 4, 1);
  MatrixX<float> B = noise<float>(5, 3, 2);
  VectorX<float> gain = noise<float>(5, 1, 3);
  MatrixX<float> frozen = noise<float>(2, 3, 4);
  std::uint64_t seed = 7;
  std::string variant = "language";

  static void members(const auto& f, auto&... t) {
    f(Parameter{"A", RankAxis::rows}, t.A...);
    f(Parameter{"B", RankAxis::cols}, t.B...);
    f(Parameter{"gain"}, t.gain...);
    f(Constant{"frozen"}, &Toy::frozen);
    f(Setting{"seed"}, &Toy::seed);
    f(Setting{"variant"}, &Toy::variant);
  }

  bool operator==(const Toy& o) const {
    return A.rows() == o.A.rows() && B.cols() == o.B.cols() && A == o.A && B == o.B && gain == o.gain && frozen == o.frozen;
  }
};

Toy other_toy() {
  Toy toy;
  toy.A *= 2;
  toy.B *= 2;
  toy.gain *= 2;
  toy.frozen *= 2;
  return toy;
}

/// The file of a toy, with other tensors or metadata.
void write_toy(const std::filesystem::path& path, const std::map<std::string, MatrixX<float>>& changed,
               const std::map<std::string, std::string>& metadata = {}, const std::string& without = "") {
  const Toy toy;
  std::map<std::string, RowMatrix<float>> tensors{{"A", toy.A}, {"B", toy.B}, {"frozen", toy.frozen}};
  for (const auto& [name, values] : changed) tensors[name] = values;
  const std::vector<float> gain(toy.gain.data(), toy.gain.data() + toy.gain.size());
  std::vector<TensorView> views;
  if (!changed.contains("gain")) views.push_back(tensor_view("gain", gain));
  for (const auto& [name, values] : tensors)
    if (name != without) views.push_back(tensor_view(name, values));
  std::map<std::string, std::string> all{{"dylora", "parameters 1"}, {"setting.seed", "7"}, {"setting.variant", "\"language\""}};
  for (const auto& [key, value] : metadata) all[key] = value;
  std::erase_if(all, [](const auto& entry) { return entry.second.empty(); });
  std::string file = safetensors_beginning(views, all);  // which writes NaNs too
  for (const TensorView& view : views) file.append(reinterpret_cast<const char*>(view.bytes.data()), view.bytes.size());
  put(path, file);
}

}  // namespace

TEST_CASE("the file of parameters is safetensors with this header") {
  const TemporaryFolder folder;
  const Toy toy;
  save_parameters(folder / "toy", toy);
  const SafetensorsFile file(folder / "toy");
  std::map<std::string, std::vector<Index>> shapes;
  for (const TensorView& tensor : file.tensors()) shapes[tensor.name] = tensor.shape;
  CHECK(shapes == std::map<std::string, std::vector<Index>>{{"A", {3, 4}}, {"B", {5, 3}}, {"frozen", {2, 3}}, {"gain", {5}}});
  CHECK(file.metadata() == std::map<std::string, std::string>{
                               {"format", "pt"}, {"dylora", "parameters 1"}, {"setting.seed", "7"}, {"setting.variant", "\"language\""}});
  CHECK(matrix_of<float>(*file.find("B"), "") == toy.B);

  const DoraModel<double> model;
  save_parameters(folder / "model", model, 2);
  const SafetensorsFile of_model(folder / "model");
  REQUIRE(of_model.find("v.lora_magnitude_vector") != nullptr);
  CHECK(of_model.find("v.lora_magnitude_vector")->shape == std::vector<Index>{5, 2});
  CHECK(of_model.find("v.lora_magnitude_vector")->dtype == DType::F64);
  CHECK(of_model.find("q.lora_magnitude_vector")->shape == std::vector<Index>{6});
  CHECK(of_model.metadata().at("setting.q.max_rank") == "5");
  CHECK(of_model.metadata().at("setting.q.scale at rank 1") == "2.5");
}

TEST_CASE("a snapshot of parameters and their file are told apart by the arguments") {
  const TemporaryFolder folder;
  auto layer = with_low_rank<float>(1);
  auto snapshot = zeros_like(layer);
  take_snapshot(layer, snapshot);
  save_parameters((folder / "layer").c_str(), layer);
  randomize<Linear<float>>(layer, 5);
  load_parameters((folder / "layer").string(), layer);
  CHECK(layer.adapter.A == snapshot.adapter.A);
}

TEST_CASE("a file with fewer components cuts the adapter to them") {
  const TemporaryFolder folder;
  for (Index rank = 0; rank <= 4; ++rank) {
    Toy saved = other_toy(), loaded;
    save_parameters(folder / "toy", saved, rank);
    load_parameters(folder / "toy", loaded);
    truncate(saved, rank);
    CHECK(loaded == saved);
    if (rank == 0) continue;
    Toy shorter;
    truncate(shorter, rank - 1);
    const Toy before = shorter;
    if (rank <= 3) {
      CHECK_THROWS_SAYING(FormatError, load_parameters(folder / "toy", shorter), "tensor \"A\"", std::to_string(rank - 1) + " × 4 or fewer",
                          std::to_string(rank) + " × 4");
      CHECK(shorter == before);
    }
  }
}

TEST_CASE("a file that is not of this model is refused, naming what differs, and nothing is changed") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder / "toy";
  const auto refused = [&](std::initializer_list<std::string_view> parts) {
    Toy toy = other_toy();
    std::string wrong = wrong_throw<FormatError>([&] { load_parameters(path, toy); }, {path.string() + ": "});
    if (wrong.empty()) wrong = wrong_throw<FormatError>([&] { load_parameters(path, toy); }, parts);
    return toy == other_toy() ? wrong : "the model was changed";
  };
  const auto with = [&](const std::string& name, const MatrixX<float>& values) { write_toy(path, {{name, values}}); };

  write_toy(path, {});
  Toy good = other_toy();
  load_parameters(path, good);
  CHECK(good == Toy());

  for (const char* name : {"A", "B", "frozen"}) {
    write_toy(path, {}, {}, name);
    CHECK(refused({"tensor \"" + std::string(name) + "\"", "expected F32", "got none"}) == "");
  }
  with("A", noise<float>(4, 4, 1));
  CHECK(refused({"tensor \"A\"", "expected F32 3 × 4 or fewer components", "got F32 4 × 4"}) == "");
  with("A", noise<float>(3, 5, 1));
  CHECK(refused({"tensor \"A\"", "expected F32 3 × 4", "got F32 3 × 5"}) == "");
  with("A", noise<float>(2, 4, 1));
  CHECK(refused({"tensor \"B\"", "expected 2 components", "got 3"}) == "");
  with("B", noise<float>(4, 3, 1));
  CHECK(refused({"tensor \"B\"", "expected F32 5 × 3 or fewer components", "got F32 4 × 3"}) == "");
  with("frozen", noise<float>(1, 3, 1));
  CHECK(refused({"tensor \"frozen\"", "expected F32 2 × 3, got F32 1 × 3"}) == "");
  with("gain", noise<float>(5, 1, 1));
  CHECK(refused({"tensor \"gain\"", "expected F32 5, got F32 5 × 1"}) == "");
  with("more", noise<float>(5, 1, 1));
  CHECK(refused({"tensor \"more\"", "the model alone", "F32 5 × 1"}) == "");
  for (const float bad : {nan<float>, std::numeric_limits<float>::infinity()}) {
    MatrixX<float> values = noise<float>(2, 3, 4);
    values(1, 2) = bad;
    with("frozen", values);
    CHECK(refused({"tensor \"frozen\"", "finite values", "NaN"}) == "");
  }

  write_toy(path, {}, {{"setting.seed", "8"}});
  CHECK(refused({"setting \"seed\"", "expected 7", "got 8"}) == "");
  write_toy(path, {}, {{"setting.variant", "\"vision\""}});
  CHECK(refused({"setting \"variant\"", "language", "vision"}) == "");
  write_toy(path, {}, {{"setting.seed", ""}});
  CHECK(refused({"setting \"seed\"", "expected 7", "got none"}) == "");
  write_toy(path, {}, {{"setting.alpha", "16.0"}});
  CHECK(refused({"setting \"alpha\"", "expected none", "got 16.0"}) == "");
  write_toy(path, {}, {{"dylora", "parameters 2"}});
  CHECK(refused({"dylora", "\"parameters 1\"", "got \"parameters 2\""}) == "");
  write_toy(path, {}, {{"dylora", ""}});
  CHECK(refused({"dylora", "\"parameters 1\"", "got none"}) == "");
  put(path, "PK");
  CHECK(refused({}) == "");
  Toy toy;
  CHECK_THROWS_SAYING(FileError, load_parameters(folder / "none", toy), (folder / "none").string());
}

TEST_CASE("parameters of another type of numbers or of an adapter with other settings are refused") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder / "saved";
  save_parameters(path, with_low_rank<float>(1));
  auto in_double = with_low_rank<double>(1);
  CHECK_THROWS_SAYING(FormatError, load_parameters(path, in_double), "tensor \"lora_A\"", "expected F64 4 × 7", "got F32 4 × 7");
  const auto changed = [&](const auto& change) {
    auto layer = with_low_rank<float>(1);
    change(layer.adapter.options);
    return layer;
  };
  auto other_alpha = changed([](LowRankOptions& o) { o.alpha = 4; });
  CHECK_THROWS_SAYING(FormatError, load_parameters(path, other_alpha), "setting \"scale at max_rank\"", "expected 2.0", "got 1.5");
  auto other_rule = changed([](LowRankOptions& o) { o.scale = alpha_over_rank; });
  CHECK_THROWS_SAYING(FormatError, load_parameters(path, other_rule), "setting \"scale at max_rank\"", "expected 0.75", "got 1.5");
  auto more_ranks = changed([](LowRankOptions& o) { o.max_rank = 5; });
  CHECK_THROWS_SAYING(FormatError, load_parameters(path, more_ranks), "setting \"max_rank\"", "expected 5", "got 4");

  save_parameters(path, with_nola<float, NolaNesting::rank>(1));
  auto other_bases = with_nola<float, NolaNesting::rank>(1);
  ++other_bases.adapter.seed;
  CHECK_THROWS_SAYING(FormatError, load_parameters(path, other_bases), "setting \"seed\"");
  auto vision = with_nola<float, NolaNesting::rank>(1);
  vision.adapter.options.variant = NolaVariant::vision;
  CHECK_THROWS_SAYING(FormatError, load_parameters(path, vision), "setting \"variant\"");
  auto nested = with_nola<float, NolaNesting::bases>(1);
  CHECK_THROWS_SAYING(FormatError, load_parameters(path, nested), "setting \"nesting\"");

  save_parameters(path, with_chain<float>(1));
  auto shorter = with_chain<float>(1);
  shorter.adapter.links.pop_back();
  CHECK_THROWS_SAYING(FormatError, load_parameters(path, shorter), "links.1.max_rank");
  save_parameters(path, with_flow<float>(1));
  auto swapped = with_flow<float>(1);
  swapped.adapter.adapters = GatedAdapters<float>({low_rank<float>(max_rank, 1), low_rank<float>(2, 2)});
  CHECK_THROWS_SAYING(FormatError, load_parameters(path, swapped), "setting \"adapters.component_owners\"");
  save_parameters(path, with_residual<float>(1));
  auto reach = with_residual<float>(1);
  for (auto& link : reach.links) link.adapter.reach = 1;
  CHECK_THROWS_SAYING(FormatError, load_parameters(path, reach), "setting \"links.0.reach\"", "expected 1", "got -1");
}

TEST_CASE("what cannot be saved is said, and the file that was there stays") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder / "toy";
  save_parameters(path, Toy());
  const std::string before = contents_of(path);
  CHECK_THROWS_SAYING(std::invalid_argument, save_parameters(path, Toy(), -1), "save_parameters: rank", "got -1");
  const auto with_nan = [](auto member) {
    Toy toy;
    (toy.*member)(2, 0) = nan<float>;
    return toy;
  };
  CHECK_THROWS_SAYING(NonFiniteError, save_parameters(path, with_nan(&Toy::A)), "tensor \"A\"", "NaN");
  CHECK_THROWS_SAYING(NonFiniteError, save_parameters(path, with_nan(&Toy::gain)), "tensor \"gain\"", "NaN");
  Toy frozen;
  frozen.frozen(0, 0) = std::numeric_limits<float>::infinity();
  CHECK_THROWS_SAYING(NonFiniteError, save_parameters(path, frozen), "tensor \"frozen\"", "infinity");
  CHECK_THROWS_SAYING(std::invalid_argument, save_parameters(path, FrozenLinear<float>(W<float>())), "at least one tensor");
  CHECK_THROWS_SAYING(FileError, save_parameters(folder / "none" / "toy", Toy()), (folder / "none").string());
  CHECK(contents_of(path) == before);
  CHECK_NOTHROW(save_parameters(path, with_nan(&Toy::A), 2));  // above the saved rank
}

}  // namespace dylora::test
