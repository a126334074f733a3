#include "pretrained/gpt2.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "golden/golden.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace pretrained {

namespace {

using dylora::DType;
using dylora::FileError;
using dylora::FormatError;
using dylora::MatrixX;
using dylora::Rng;
using dylora::TensorView;
using dylora::test::contents_of;
using dylora::test::put;
using dylora::test::same_bits;
using dylora::test::TemporaryFolder;
using nlohmann::json;

const std::string golden_folder = DYLORA_GOLDEN_DIR "/gpt2/";
constexpr gpt::Targets queries_and_values{.k = false, .o = false, .mlp = false};
constexpr gpt::Targets queries_keys_values{.o = false, .mlp = false};

/// A tensor whose values a test may change, and the type it is written as.
struct Tensor {
  std::vector<Index> shape;
  std::vector<float> values;
  DType dtype = DType::F32;
};
using Tensors = std::map<std::string, Tensor>;

const std::string& golden_bytes() {
  static const std::string bytes = [] {
    std::string result, digits;
    std::ifstream file(golden_folder + "model.safetensors.hex");
    while (file >> digits) {
      for (std::size_t i = 0; i < digits.size(); i += 2) result += static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16));
    }
    return result;
  }();
  return bytes;
}

json golden_config() { return json::parse(contents_of(golden_folder + "config.json")); }

const Tensors& golden_tensors() {
  static const Tensors tensors = [] {
    Tensors result;
    for (const TensorView& tensor : dylora::parse_safetensors(std::as_bytes(std::span(golden_bytes())), "golden").tensors) {
      Tensor& copy = result[tensor.name] = {tensor.shape, std::vector<float>(static_cast<std::size_t>(tensor.size()))};
      dylora::copy_elements(tensor, copy.values.data(), "golden");
    }
    return result;
  }();
  return tensors;
}

bool is_mask(std::string_view name) { return name.ends_with(".attn.bias"); }

/// The values that make the model, without the masks.
std::size_t golden_size() {
  std::size_t size = 0;
  for (const auto& [name, tensor] : golden_tensors()) size += is_mask(name) ? 0 : tensor.values.size();
  return size;
}

template <class T>
std::string bytes_as(const std::vector<float>& values) {
  std::string bytes;
  for (const float value : values) {
    const T element(value);
    bytes.append(reinterpret_cast<const char*>(&element), sizeof(T));
  }
  return bytes;
}

std::string bytes_of_tensor(const Tensor& tensor) {
  switch (tensor.dtype) {
    case DType::F16: return bytes_as<Eigen::half>(tensor.values);
    case DType::BF16: return bytes_as<Eigen::bfloat16>(tensor.values);
    case DType::F32: return bytes_as<float>(tensor.values);
    case DType::F64: return bytes_as<double>(tensor.values);
    default: return std::string(tensor.values.size() * static_cast<std::size_t>(dylora::info(tensor.dtype).bits) / 8, '\1');
  }
}

void put_tensors(const std::filesystem::path& path, const Tensors& tensors) {
  std::vector<std::string> bytes;
  for (const auto& [name, tensor] : tensors) bytes.push_back(bytes_of_tensor(tensor));
  std::vector<TensorView> views;
  for (const auto& [name, tensor] : tensors) {
    views.push_back({name, tensor.dtype, tensor.shape, std::as_bytes(std::span(bytes[views.size()]))});
  }
  dylora::save_safetensors(path, views);
}

/// The golden model as it was downloaded, for a test to change.
struct ModelFolder : TemporaryFolder {
  ModelFolder() {
    configure(json::object());
    put(*this / "model.safetensors", golden_bytes());
  }
  explicit ModelFolder(const Tensors& tensors) {
    configure(json::object());
    put_tensors(*this / "model.safetensors", tensors);
  }

  void configure(const json& patch) const {
    json config = golden_config();
    config.merge_patch(patch);
    put(*this / "config.json", config.dump());
  }
};

/// As gpt2.py names it: it writes the first slice of a projection into every name, we only that of c_attn.
std::string golden_name(std::string name) {
  if (name.find("c_attn") == name.npos) name.insert(name.rfind(".lora_"), ".0");
  return name;
}

template <class F, class... T>
void for_each_adapter(F&& f, T&... t) {
  dylora::for_each_parameter<Gpt2Model>(
      [&](dylora::Parameter parameter, auto&... p) {
        if (((p.size() > 0) && ...)) f(golden_name(std::string(parameter.name)), p...);
      },
      t...);
}

const golden::File& golden_file() {
  static const golden::File file("gpt2.txt");
  return file;
}

/// The model with the golden adapters of a case: "all" or "qv".
Gpt2Model golden_model(const Gpt2& pretrained, const std::string& name) {
  const golden::File& file = golden_file();
  Rng rng(0);
  Gpt2Model model =
      pretrained.adapted({.max_rank = 4, .alpha = file.number("alpha")}, name == "all" ? gpt::Targets{} : queries_and_values, rng);
  Index read = 0;
  for_each_adapter(
      [&](const std::string& parameter, auto& p) {
        const MatrixX<float> values = file.matrix<float>(name + "/parameters/" + parameter);
        REQUIRE(values.rows() == p.rows());
        REQUIRE(values.cols() == p.cols());
        p = values;
        ++read;
      },
      model);
  CHECK(read == file.count(name + "/parameters/"));
  return model;
}

MatrixX<float> logits_of(const Gpt2Model& model, dylora::RankSlice rank) {
  Gpt2Model::Cache cache;
  model.forward(golden_file().integers("tokens"), dylora::Sequences(golden_file().integers("lengths")), rank, cache);
  return cache.logits.view();
}

MatrixX<float> logits_of(const Gpt2& pretrained) { return logits_of(golden_model(pretrained, "all"), 4); }
MatrixX<float> logits_of(const TemporaryFolder& folder) { return logits_of(Gpt2(folder.path())); }

const MatrixX<float>& expected_logits() {
  static const MatrixX<float> logits = logits_of(ModelFolder());
  return logits;
}

MatrixX<float> every_eighth_row(const MatrixX<float>& m) { return m(Eigen::seq(0, m.rows() - 1, 8), Eigen::all); }

/// Bytes of this process that are in memory; 0 where the system does not say.
std::uintmax_t resident_bytes() {
  std::uintmax_t all = 0, resident = 0;
#if defined(__unix__) || defined(__APPLE__)
  std::ifstream("/proc/self/statm") >> all >> resident;
  resident *= static_cast<std::uintmax_t>(sysconf(_SC_PAGESIZE));
#endif
  return resident;
}

/// The configuration of one of the family, and a file of its size that is a hole from the header to its end.
void put_zeros(const TemporaryFolder& folder, Index width, Index layers, Index heads) {
  constexpr Index vocabulary = 50257, context = 1024;
  put(folder / "config.json", json{{"model_type", "gpt2"},
                                   {"activation_function", "gelu_new"},
                                   {"vocab_size", vocabulary},
                                   {"n_positions", context},
                                   {"n_ctx", context},
                                   {"n_embd", width},
                                   {"n_layer", layers},
                                   {"n_head", heads}}
                                  .dump());
  json header;
  std::uint64_t end = 0;
  const auto add = [&](const std::string& name, const std::vector<Index>& shape) {
    const std::uint64_t begin = end;
    end += sizeof(float) * static_cast<std::uint64_t>(dylora::element_count(shape));
    header[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, end}}};
  };
  const auto add_norm = [&](const std::string& name) {
    add(name + ".weight", {width});
    add(name + ".bias", {width});
  };
  const auto add_projection = [&](const std::string& name, Index in, Index out) {
    add(name + ".weight", {in, out});
    add(name + ".bias", {out});
  };
  add("wte.weight", {vocabulary, width});
  add("wpe.weight", {context, width});
  for (Index i = 0; i < layers; ++i) {
    const std::string block = "h." + std::to_string(i) + '.';
    add_norm(block + "ln_1");
    add(block + "attn.bias", {1, 1, context, context});
    add_projection(block + "attn.c_attn", width, 3 * width);
    add_projection(block + "attn.c_proj", width, width);
    add_norm(block + "ln_2");
    add_projection(block + "mlp.c_fc", width, 4 * width);
    add_projection(block + "mlp.c_proj", 4 * width, width);
  }
  add_norm("ln_f");
  std::string text = header.dump();
  text.append(8 - text.size() % 8, ' ');
  const std::uint64_t length = text.size();
  put(folder / "model.safetensors", std::string(reinterpret_cast<const char*>(&length), sizeof length) + text);
  std::filesystem::resize_file(folder / "model.safetensors", sizeof length + length + end);
}

Index frozen_count(const Gpt2Model& model) {
  const auto norm = [](const auto& n) { return n.gain.size() + n.bias.size(); };
  const auto projection = [](const auto& p) { return p.base.values().size() + p.base.bias().size(); };
  Index count = model.token_embedding.size() + model.position_embedding.size() + norm(model.final_norm) + model.head.size();
  for (const auto& block : model.blocks) {
    count += norm(block.attention_norm) + norm(block.mlp_norm) + projection(block.attention.qkv) + projection(block.attention.o) +
             projection(block.fc) + projection(block.proj);
  }
  return count;
}

/// Whether all these values lie in the tensor of that name, first to last.
template <class M>
bool lies_in(const M& values, const TensorView* tensor) {
  return static_cast<const void*>(values.data()) == tensor->bytes.data() && values.size() == tensor->size();
}

}  // namespace

TEST_CASE("A pretrained GPT-2 with adapters computes what PyTorch does with the same files", "[golden]") {
  const ModelFolder folder;
  const Gpt2 pretrained(folder.path());
  const golden::File& file = golden_file();
  for (const std::string name : {"all", "qv"}) {
    const Gpt2Model model = golden_model(pretrained, name);
    CHECK(model.max_rank() == 4);
    for (const Index rank : {1, 4}) {
      const std::string at_rank = name + '/' + std::to_string(rank);
      Gpt2Model::Cache cache;
      Gpt2Model::Workspace workspace;
      auto gradients = dylora::zeros_like(model);
      model.forward(file.integers("tokens"), dylora::Sequences(file.integers("lengths")), rank, cache);
      const MatrixX<float> logits = cache.logits.view();
      if (at_rank == "all/4") golden::check(every_eighth_row(logits), file, "logits");
      const auto loss = dylora::cross_entropy(logits, file.integers("targets"));
      golden::check_number<float>(loss.value, file, at_rank + "/loss");

      model.backward(loss.gradient, cache, gradients, workspace);
      Index checked = 0;
      for_each_adapter(
          [&](const std::string& parameter, const auto& gradient) {
            golden::check(gradient, file, at_rank + "/gradients/" + parameter);
            ++checked;
          },
          gradients);
      CHECK(checked == file.count(at_rank + "/gradients/"));
      CHECK(model.first_non_finite(cache).empty());
    }
  }
}

TEST_CASE("A pretrained GPT-2 generates token by token what PyTorch computes at once", "[golden]") {
  const ModelFolder folder;
  const Gpt2 pretrained(folder.path());
  const Gpt2Model model = golden_model(pretrained, "all");
  const auto tokens = golden_file().integers("tokens");
  std::vector<dylora::KeyValueCache<float>> past;
  MatrixX<float> logits(model.config.vocabulary, model.config.context);
  for (Index i = 0; i < logits.cols(); ++i) logits.col(i) = model.extend({&tokens[static_cast<std::size_t>(i)], 1}, 4, past);
  CHECK(golden::error(every_eighth_row(logits), golden_file()["logits"].leftCols(logits.cols())) <= golden::tolerance<float>);
}

TEST_CASE("Fresh adapters leave the pretrained GPT-2 as it is") {
  const ModelFolder folder;
  const Gpt2 pretrained(folder.path());
  Rng rng(0);
  const Gpt2Model model = pretrained.adapted({.max_rank = 4}, {}, rng);
  const MatrixX<float> plain = logits_of(model, dylora::RankSlice::none());
  CHECK(same_bits(logits_of(model, 4), plain));
  CHECK(same_bits(logits_of(golden_model(pretrained, "all"), dylora::RankSlice::none()), plain));
  CHECK_FALSE(same_bits(plain, expected_logits()));
}

TEST_CASE("The weights stay in the file, and the targets say what is adapted") {
  const ModelFolder folder;
  const Gpt2 pretrained(folder.path());
  CHECK(pretrained.converted_bytes() == 0);
  CHECK(pretrained.config().vocabulary == 657);
  CHECK(pretrained.config().tied);
  Rng rng(0);
  const Gpt2Model model = pretrained.adapted({.max_rank = 4}, queries_and_values, rng);
  const auto file = [&](const std::string& name) { return pretrained.files().find(name); };
  CHECK(lies_in(model.token_embedding, file("wte.weight")));
  CHECK(lies_in(model.position_embedding, file("wpe.weight")));
  CHECK(model.head.size() == 0);
  REQUIRE(model.blocks.size() == 2);
  for (std::size_t i = 0; i < model.blocks.size(); ++i) {
    const auto& block = model.blocks[i];
    const auto mapped = [&](const auto& projection, const std::string& name) {
      INFO(name);
      CHECK(lies_in(projection.base.values(), file("h." + std::to_string(i) + '.' + name + ".weight")));
      CHECK(lies_in(projection.base.bias(), file("h." + std::to_string(i) + '.' + name + ".bias")));
    };
    mapped(block.attention.qkv, "attn.c_attn");
    mapped(block.attention.o, "attn.c_proj");
    mapped(block.fc, "mlp.c_fc");
    mapped(block.proj, "mlp.c_proj");
    REQUIRE(block.attention.qkv.adapter.slices.size() == 3);
    CHECK(block.attention.qkv.adapter.slices[0].max_rank() == 4);
    CHECK(block.attention.qkv.adapter.slices[1].max_rank() == 0);
    CHECK(block.attention.qkv.adapter.slices[2].max_rank() == 4);
    CHECK(block.attention.o.max_rank() + block.fc.max_rank() + block.proj.max_rank() == 0);
  }
  CHECK(pretrained.adapted({.max_rank = 4}, {}, rng).blocks[0].attention.qkv.adapter.slices.size() == 1);
}

TEST_CASE("A moved GPT-2 keeps its weights, the converted ones too") {
  Tensors tensors = golden_tensors();
  tensors["wte.weight"].dtype = DType::F64;
  const ModelFolder folder(tensors);
  Gpt2 first(folder.path());
  const Gpt2 pretrained = std::move(first);
  CHECK(pretrained.converted_bytes() == tensors["wte.weight"].values.size() * sizeof(float));
  CHECK(same_bits(logits_of(pretrained), expected_logits()));
}

TEST_CASE("The same model comes out of every form that the files may have") {
  Tensors tensors = golden_tensors();

  SECTION("names that begin with transformer.") {
    Tensors prefixed;
    for (const auto& [name, tensor] : tensors) prefixed["transformer." + name] = tensor;
    CHECK(same_bits(logits_of(ModelFolder(prefixed)), expected_logits()));
    prefixed["lm_head.weight"] = tensors["wte.weight"];
    CHECK(same_bits(logits_of(ModelFolder(prefixed)), expected_logits()));
  }
  SECTION("two shards") {
    const ModelFolder folder;
    std::filesystem::remove(folder / "model.safetensors");
    const std::string names[] = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"};
    Tensors shards[2];
    json index;
    for (const auto& [name, tensor] : tensors) {
      const std::size_t shard = name.starts_with("h.1.") || name == "wte.weight" ? 1 : 0;
      shards[shard][name] = tensor;
      index["weight_map"][name] = names[shard];
    }
    for (std::size_t i = 0; i < 2; ++i) put_tensors(folder / names[i], shards[i]);
    put(folder / "model.safetensors.index.json", index.dump());
    const Gpt2 pretrained(folder.path());
    CHECK(pretrained.files().files().size() == 2);
    CHECK(pretrained.converted_bytes() == 0);
    CHECK(same_bits(logits_of(pretrained), expected_logits()));
  }
  SECTION("a head of its own") {
    tensors["lm_head.weight"] = tensors["wte.weight"];
    const ModelFolder equal(tensors);
    equal.configure({{"tie_word_embeddings", false}});
    CHECK_FALSE(Gpt2(equal.path()).config().tied);
    CHECK(same_bits(logits_of(equal), expected_logits()));

    for (float& value : tensors["lm_head.weight"].values) value = -value;
    const ModelFolder negated(tensors);
    negated.configure({{"tie_word_embeddings", false}});
    CHECK(same_bits(logits_of(negated), MatrixX<float>(-expected_logits())));
    negated.configure({{"tie_word_embeddings", true}});  // then what the file has for a head is not looked at
    CHECK(same_bits(logits_of(negated), expected_logits()));
  }
  SECTION("no masks, or all that older files have") {
    Tensors none = tensors;
    REQUIRE(std::erase_if(none, [](const auto& named) { return is_mask(named.first); }) == 2);
    CHECK(same_bits(logits_of(ModelFolder(none)), expected_logits()));
    for (const char* block : {"h.0.", "h.1."}) {
      tensors[std::string(block) + "attn.masked_bias"] = {{}, {-1e4F}};
      tensors[std::string(block) + "attn.bias"].dtype = DType::BOOL;
    }
    CHECK(same_bits(logits_of(ModelFolder(tensors)), expected_logits()));
  }
  SECTION("data at an odd address") {
    const ModelFolder folder;
    const std::string& bytes = golden_bytes();
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), sizeof length);
    const std::string header = bytes.substr(sizeof length, length), data = bytes.substr(sizeof length + length);
    ++length;
    put(folder / "model.safetensors", std::string(reinterpret_cast<const char*>(&length), sizeof length) + header + ' ' + data);
    const Gpt2 pretrained(folder.path());
    CHECK(pretrained.converted_bytes() == golden_size() * sizeof(float));
    CHECK(same_bits(logits_of(pretrained), expected_logits()));
  }
  SECTION("types that hold the values exactly") {
    for (const DType dtype : {DType::F64, DType::F16}) {
      for (auto& [name, tensor] : tensors) tensor.dtype = dtype;
      const ModelFolder folder(tensors);
      const Gpt2 pretrained(folder.path());
      CHECK(pretrained.converted_bytes() == golden_size() * sizeof(float));
      CHECK(same_bits(logits_of(pretrained), expected_logits()));
    }
  }
  SECTION("BF16, which rounds some of them") {
    std::size_t rounded = 0;
    for (auto& [name, tensor] : tensors) {
      for (float& value : tensor.values) {
        const auto nearest = static_cast<float>(Eigen::bfloat16(value));
        if (nearest != value) ++rounded;
        value = nearest;
      }
    }
    CHECK(rounded > 0);
    const MatrixX<float> expected = logits_of(ModelFolder(tensors));
    CHECK_FALSE(same_bits(expected, expected_logits()));
    Tensors half = golden_tensors();
    for (auto& [name, tensor] : half) tensor.dtype = DType::BF16;
    CHECK(same_bits(logits_of(ModelFolder(half)), expected));
  }
}

TEST_CASE("The whole GPT-2 family loads and is adapted without its weights in memory") {
  struct Member {
    const char* name;
    Index width, layers, heads, parameters;
  };
  for (const Member& member : {Member{"distilgpt2", 768, 6, 12, 81'912'576}, Member{"gpt2", 768, 12, 12, 124'439'808},
                               Member{"gpt2-medium", 1024, 24, 16, 354'823'168}, Member{"gpt2-large", 1280, 36, 20, 774'030'080},
                               Member{"gpt2-xl", 1600, 48, 25, 1'557'611'200}}) {
    INFO(member.name);
    const TemporaryFolder folder;
    put_zeros(folder, member.width, member.layers, member.heads);
    const std::uintmax_t before = resident_bytes();
    const Gpt2 pretrained(folder.path());
    Rng rng(0);
    const Gpt2Model model = pretrained.adapted({.max_rank = 8}, queries_keys_values, rng);
    const std::uintmax_t after = resident_bytes();
    CHECK(frozen_count(model) == member.parameters);
    CHECK(dylora::parameter_count(model) == member.layers * 8 * (member.width + 3 * member.width));
    CHECK(pretrained.converted_bytes() == 0);
    CHECK(pretrained.files().bytes() > 4 * static_cast<std::uintmax_t>(member.parameters));
    CHECK(after < before + (64 << 20));
  }
}

TEST_CASE("A config.json says what the model is") {
  const auto parsed = [](const json& patch) {
    json config = golden_config();
    config.merge_patch(patch);
    return parse_gpt2_config(config.dump(), "config.json");
  };
  const Gpt2Config config = parsed(json::object());
  CHECK(config.model.vocabulary == 657);
  CHECK(config.model.context == 16);
  CHECK(config.model.width == 8);
  CHECK(config.model.layers == 2);
  CHECK(config.model.heads == 2);
  CHECK(config.model.tied);
  CHECK(config.inner == 32);
  CHECK(config.epsilon == 1e-5);
  CHECK(parsed({{"n_inner", 24}}).inner == 24);
  CHECK(parsed({{"layer_norm_epsilon", 1e-6}}).epsilon == 1e-6);
  CHECK_FALSE(parsed({{"tie_word_embeddings", false}}).model.tied);
  CHECK(parsed({{"activation_function", "gelu_pytorch_tanh"}}).model.width == 8);  // another name of the same
}

TEST_CASE("An MLP of another width and another epsilon are those of the model") {
  Tensors tensors = golden_tensors();
  for (const std::string block :
       {"h.0.mlp.", "h.1.mlp."}) {  // 8 hidden features of 32: the first 8 columns of c_fc, the first 8 rows of c_proj
    Tensor narrow{{8, 8}, {}};
    for (std::size_t i = 0; i < 8; ++i) {
      const auto row = tensors[block + "c_fc.weight"].values.begin() + static_cast<std::ptrdiff_t>(32 * i);
      narrow.values.insert(narrow.values.end(), row, row + 8);
    }
    tensors[block + "c_fc.weight"] = narrow;
    tensors[block + "c_fc.bias"].shape = {8};
    tensors[block + "c_fc.bias"].values.resize(8);
    tensors[block + "c_proj.weight"].shape = {8, 8};
    tensors[block + "c_proj.weight"].values.resize(64);
  }
  const ModelFolder folder(tensors);
  folder.configure({{"n_inner", 8}, {"layer_norm_epsilon", 0.5}});
  Rng rng(0);
  const Gpt2 pretrained(folder.path());
  const Gpt2Model model = pretrained.adapted({.max_rank = 2}, queries_and_values, rng);
  CHECK(model.blocks[1].fc.out_features() == 8);
  CHECK(model.blocks[1].proj.in_features() == 8);
  CHECK(model.blocks[1].mlp_norm.epsilon == 0.5);
  CHECK(model.final_norm.epsilon == 0.5);
  CHECK(logits_of(model, 2).allFinite());
}

TEST_CASE("A config.json of another model, or with a number that cannot be, is refused") {
  struct Case {
    json patch;
    std::string says;
  };
  const std::string only = ", which is all that this model computes, got ";
  std::vector<Case> cases = {
      {{{"model_type", "llama"}}, R"(model_type: expected "gpt2")" + only + R"("llama")"},
      {{{"model_type", 2}}, R"(model_type: expected "gpt2")" + only + "2"},
      {{{"activation_function", "gelu"}}, R"(activation_function: expected "gelu_new")" + only + R"("gelu")"},
      {{{"activation_function", "relu"}}, R"(activation_function: expected "gelu_new")" + only + R"("relu")"},
      {{{"activation_function", {"gelu_new"}}}, R"(activation_function: expected "gelu_new")" + only + "array"},
      {{{"scale_attn_by_inverse_layer_idx", true}}, "scale_attn_by_inverse_layer_idx: expected false" + only + "true"},
      {{{"scale_attn_weights", false}}, "scale_attn_weights: expected true" + only + "false"},
      {{{"add_cross_attention", true}}, "add_cross_attention: expected false" + only + "true"},
      {{{"n_head", 3}}, "n_head: expected a divisor of n_embd 8, got 3"},
      {{{"n_head", 16}}, "n_head: expected a divisor of n_embd 8, got 16"},
      {{{"tie_word_embeddings", 1}}, "tie_word_embeddings: expected true or false, got 1"},
      {{{"layer_norm_epsilon", 0}}, "layer_norm_epsilon: expected a number in (0, 1), got 0"},
      {{{"layer_norm_epsilon", -1e-5}}, "layer_norm_epsilon: expected a number in (0, 1), got -1e-05"},
      {{{"layer_norm_epsilon", 1}}, "layer_norm_epsilon: expected a number in (0, 1), got 1"},
      {{{"layer_norm_epsilon", "1e-5"}}, R"(layer_norm_epsilon: expected a number in (0, 1), got "1e-5")"},
  };
  const std::pair<const char*, std::string> limits[] = {{"vocab_size", "16777216"}, {"n_positions", "1048576"}, {"n_embd", "65536"},
                                                        {"n_layer", "1024"},        {"n_head", "1024"},         {"n_inner", "1048576"}};
  for (const auto& [key, largest] : limits) {
    const std::pair<json, std::string> values[] = {{0, "0"},
                                                   {-1, "-1"},
                                                   {INT64_MIN, "-9223372036854775808"},
                                                   {std::stoll(largest) + 1, std::to_string(std::stoll(largest) + 1)},
                                                   {INT64_MAX, "9223372036854775807"},
                                                   {UINT64_MAX, "18446744073709551615"},
                                                   {1e300, "1e+300"},
                                                   {2.0, "2.0"},
                                                   {1.5, "1.5"},
                                                   {"2", "\"2\""},
                                                   {true, "true"},
                                                   {json::array({2}), "array"},
                                                   {json::object({{"a", 2}}), "object"}};
    for (const auto& [value, shown] : values) {
      cases.push_back({{{key, value}}, std::string(key) + ": expected an integer in [1, " + largest + "], got " + shown});
    }
    if (std::string_view(key) != "n_inner") {
      cases.push_back({{{key, nullptr}}, std::string(key) + ": expected an integer in [1, " + largest + "], got none"});
    }
  }
  for (const auto& [patch, says] : cases) {
    json config = golden_config();
    config.merge_patch(patch);
    INFO(patch);
    CHECK_THROWS_SAYING(FormatError, parse_gpt2_config(config.dump(), "config.json"), "config.json: " + says);
  }
  for (const auto& other : {std::pair("[]", "array"), std::pair("3", "3"), std::pair("null", "none"), std::pair("\"gpt2\"", "\"gpt2\"")}) {
    CHECK_THROWS_SAYING(FormatError, parse_gpt2_config(other.first, "config.json"),
                        "config.json: expected a JSON object, got " + std::string(other.second));
  }
}

TEST_CASE("Every part of a config.json that is cut short is refused as malformed") {
  const std::string text = golden_config().dump(2);
  for (std::size_t size = 0; size < text.size(); ++size) {
    INFO(size);
    CHECK_THROWS_SAYING(FormatError, parse_gpt2_config(std::string_view(text).substr(0, size), "config.json"),
                        "config.json: byte " + std::to_string(size) + ": expected JSON");
  }
  CHECK(parse_gpt2_config(text, "config.json").model.layers == 2);
}

TEST_CASE("Files that are missing are named") {
  const ModelFolder folder;
  std::filesystem::remove(folder / "config.json");
  CHECK_THROWS_SAYING(FileError, Gpt2(folder.path()), (folder / "config.json").string() + ": cannot read: No such file");
  folder.configure(json::object());
  std::filesystem::remove(folder / "model.safetensors");
  CHECK_THROWS_SAYING(FileError, Gpt2(folder.path()), folder.path().string() + ": cannot read: expected model.safetensors or ");
  put(folder / "config.json", "{");
  put(folder / "model.safetensors", golden_bytes());
  CHECK_THROWS_SAYING(FormatError, Gpt2(folder.path()), (folder / "config.json").string() + ": byte 1: expected JSON");
}

TEST_CASE("A model that lacks a weight, or has it in another shape, is refused with its name") {
  for (const auto& [name, tensor] : golden_tensors()) {
    if (is_mask(name)) continue;
    INFO(name);
    Tensors without = golden_tensors();
    without.erase(name);
    const ModelFolder missing(without);
    CHECK_THROWS_SAYING(
        FormatError, Gpt2(missing.path()),
        missing.path().string() + ": tensor \"" + name + "\": expected one of " + dylora::describe_shape(tensor.shape) + ", found none");

    Tensors reshaped = golden_tensors();
    reshaped[name].shape.insert(reshaped[name].shape.begin(), 1);
    const ModelFolder wrong(reshaped);
    CHECK_THROWS_SAYING(FormatError, Gpt2(wrong.path()),
                        wrong.path().string() + ": tensor \"" + name + "\": expected " + dylora::describe_shape(tensor.shape) +
                            " as config.json says, got 1 × " + dylora::describe_shape(tensor.shape));
  }
}

TEST_CASE("A model whose tensors are not those of its config.json is refused") {
  const auto refused = [](const Tensors& tensors, const json& patch) {
    const ModelFolder folder(tensors);
    folder.configure(patch);
    return Gpt2(folder.path());
  };
  Tensors tensors = golden_tensors();
  CHECK_THROWS_SAYING(FormatError, refused(tensors, {{"n_layer", 3}}), "tensor \"h.2.ln_1.weight\": expected one of 8, found none");
  CHECK_THROWS_SAYING(FormatError, refused(tensors, {{"n_layer", 1}}), "model.safetensors: tensor \"h.1.attn.",
                      "expected none of that name in the model of config.json");
  CHECK_THROWS_SAYING(FormatError, refused(tensors, {{"n_embd", 16}}),
                      "tensor \"wte.weight\": expected 657 × 16 as config.json says, got 657 × 8");
  CHECK_THROWS_SAYING(FormatError, refused(tensors, {{"n_inner", 16}}), "tensor \"h.0.mlp.c_fc.weight\": expected 8 × 16", "got 8 × 32");
  CHECK_THROWS_SAYING(FormatError, refused(tensors, {{"tie_word_embeddings", false}}),
                      "tensor \"lm_head.weight\": expected one of 657 × 8, found none");

  tensors["h.0.attn.c_attn.weight"].shape = {24, 8};  // out × in, as a Linear has it and a Conv1D has not
  CHECK_THROWS_SAYING(FormatError, refused(tensors, json::object()),
                      "tensor \"h.0.attn.c_attn.weight\": expected 8 × 24 as config.json says, got 24 × 8");
}

TEST_CASE("A tensor that belongs to nothing in the model is refused") {
  for (const std::string name : {"h.2.ln_1.weight", "h.2.attn.bias", "h.0.attn.c_attn.lora_A", "score.weight", "transformer.wpe.weight",
                                 "h.00.ln_1.bias", "H.0.ln_1.bias", "ln_f", ""}) {
    INFO(name);
    Tensors tensors = golden_tensors();
    tensors[name] = tensors["ln_f.bias"];
    const ModelFolder folder(tensors);
    CHECK_THROWS_SAYING(
        FormatError, Gpt2(folder.path()),
        (folder / "model.safetensors").string() + ": tensor \"" + name + "\": expected none of that name in the model of config.json");
  }
}

TEST_CASE("A weight of a type that holds no plain numbers is refused") {
  for (const DType dtype : {DType::BOOL, DType::U8, DType::I8, DType::F8_E4M3, DType::F8_E5M2, DType::F4, DType::I16, DType::I32,
                            DType::U32, DType::I64, DType::C64}) {
    for (const std::string name : {"wte.weight", "h.1.mlp.c_proj.weight", "ln_f.bias"}) {
      Tensors tensors = golden_tensors();
      tensors[name].dtype = dtype;
      const ModelFolder folder(tensors);
      CHECK_THROWS_SAYING(FormatError, Gpt2(folder.path()),
                          folder.path().string() + ": tensor \"" + name + "\": expected F16, BF16, F32 or F64, got " +
                              std::string(dylora::info(dtype).name));
    }
  }
}

}  // namespace pretrained
