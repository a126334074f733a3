// For the test of inspect_adapter: writes files of every kind that it meets, and holds a merged model to W + s(b) · B_b · A_b.
//
//     write_adapters FOLDER                                             writes the files
//     write_adapters FOLDER SET MERGED RANK SCALE_RULE [transposed]     exit status 0 if MERGED is what the sum of SET is

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/random.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/bytes/atomic_file.hpp"
#include "dylora/io/bytes/tensor.hpp"
#include "dylora/io/checkpoint/file.hpp"
#include "dylora/io/gguf/contents.hpp"
#include "dylora/io/gguf/writer.hpp"
#include "dylora/io/safetensors/safetensors.hpp"
#include "support/temporary_folder.hpp"

namespace {

using namespace dylora;
using test::put;
namespace fs = std::filesystem;
using Factor = RowMatrix<double>;

/// A module, its weight and its factors.
struct Adapted {
  std::string module, weight;
  DType dtype;
  double alpha;
  Factor W, A, B;

  Index rank() const { return A.rows(); }
};

/// Four types, two ranks, two alphas.
std::vector<Adapted> usual() {
  Rng rng(11);
  const auto make = [&](const std::string& name, DType dtype, Index rank, double alpha) {
    const auto matrix = [&](Index rows, Index cols) { return Factor(random_uniform<double>(rows, cols, 1, rng)); };
    return Adapted{"model.layers.0." + name, "layers.0." + name + ".weight", dtype, alpha, matrix(8, 6), matrix(rank, 6), matrix(8, rank)};
  };
  return {make("q", DType::F32, 4, 8), make("k", DType::F16, 4, 8), make("v", DType::BF16, 2, 8), make("o", DType::F64, 4, 3)};
}

/// Sums half-way between two numbers of the type, and one a little above that, which a first rounding to float would take to the middle.
std::vector<Adapted> ties() {
  const auto make = [](const std::string& name, DType dtype, double ulp) {
    Adapted result{"layers.0." + name, "layers.0." + name + ".weight", dtype, 1, Factor(1, 3), Factor(1, 3), Factor::Ones(1, 1)};
    result.W << 1, 1 + ulp, 1;
    result.A << ulp / 2, ulp / 2, ulp / 2 + 0x1p-40;
    return result;
  };
  return {make("half", DType::F16, 0x1p-10), make("brain", DType::BF16, 0x1p-7)};
}

std::vector<Adapted> set_of(const std::string& name) { return name == "ties" ? ties() : usual(); }

template <class T>
std::string bytes_as(const Factor& values) {
  std::string bytes;
  for (const double value : values.reshaped<Eigen::RowMajor>()) {
    const auto element = static_cast<T>(static_cast<float>(value));
    bytes.append(reinterpret_cast<const char*>(&element), sizeof element);
  }
  return bytes;
}

std::string bytes_as(DType dtype, const Factor& values) {
  if (dtype == DType::F16) return bytes_as<Eigen::half>(values);
  if (dtype == DType::BF16) return bytes_as<Eigen::bfloat16>(values);
  if (dtype == DType::F32) return bytes_as<float>(values);
  return {reinterpret_cast<const char*>(values.data()), static_cast<std::size_t>(values.size()) * sizeof(double)};
}

/// Tensors that own their bytes.
class Tensors {
 public:
  void add(const std::string& name, DType dtype, std::vector<Index> shape, std::string bytes) {
    bytes_[name] = std::move(bytes);
    views_.push_back({name, dtype, std::move(shape), std::as_bytes(std::span(bytes_[name]))});
  }
  void add(const std::string& name, DType dtype, const Factor& matrix) {
    add(name, dtype, {matrix.rows(), matrix.cols()}, bytes_as(dtype, matrix));
  }
  const std::vector<TensorView>& views() const { return views_; }

 private:
  std::map<std::string, std::string> bytes_;
  std::vector<TensorView> views_;
};

/// The weights of a set, and what no adapter belongs to.
Tensors base_of(const std::vector<Adapted>& set, bool transposed) {
  Tensors tensors;
  for (const Adapted& a : set) tensors.add(a.weight, a.dtype, transposed ? Factor(a.W.transpose()) : a.W);
  tensors.add("norm.weight", DType::F32, {3}, bytes_as<float>(Factor::Constant(1, 3, 0.1)));
  tensors.add("positions", DType::I64, {2}, std::string(16, '\7'));
  return tensors;
}

void write_peft(const fs::path& folder, const std::vector<Adapted>& set, const std::string& config) {
  fs::create_directories(folder);
  Tensors tensors;
  for (const Adapted& a : set) {
    tensors.add("base_model.model." + a.module + ".lora_A.weight", DType::F64, a.A);
    tensors.add("base_model.model." + a.module + ".lora_B.weight", DType::F64, a.B);
  }
  save_safetensors(folder / "adapter_model.safetensors", tensors.views());
  put(folder / "adapter_config.json", R"({"peft_type": "LORA", "r": 4, "lora_alpha": 8, )" + config + "}");
}

/// Components of norms 0.1, 3 and 4 at right angles.
Adapted orthogonal() {
  Adapted result{"layers.0.q", "layers.0.q.weight", DType::F32, 6, Factor::Zero(5, 4), Factor::Zero(3, 4), Factor::Zero(5, 3)};
  result.A.diagonal().setOnes();
  result.B.diagonal() << 0.1, 3, 4;
  return result;
}

void write_gguf_adapter(const fs::path& path, float alpha) {
  const Adapted adapted = orthogonal();
  Tensors tensors;
  tensors.add("blk.0.attn_q.weight.lora_a", DType::F32, adapted.A);
  tensors.add("blk.0.attn_q.weight.lora_b", DType::F32, adapted.B);
  GgufContents contents;
  contents.metadata = {
      {"general.architecture", std::string("llama")}, {"general.type", std::string("adapter")}, {"adapter.type", std::string("lora")}};
  if (alpha > 0) contents.metadata.push_back({"adapter.lora.alpha", alpha});
  for (const TensorView& tensor : tensors.views()) contents.tensors.push_back(gguf_tensor(tensor));
  AtomicFile file(path);
  write_gguf(file, contents);
  file.commit();
}

void write_shards(const fs::path& folder, const Tensors& base) {
  fs::create_directories(folder);
  std::string map;
  for (const int shard : {1, 2}) {
    const std::string file = "model-0000" + std::to_string(shard) + "-of-00002.safetensors";
    std::vector<TensorView> part;
    for (std::size_t i = 0; i < base.views().size(); ++i) {
      if (static_cast<int>(i % 2) + 1 == shard) part.push_back(base.views()[i]);
    }
    save_safetensors(folder / file, part);
    for (const TensorView& tensor : part) map += (map.empty() ? "\"" : ", \"") + tensor.name + "\": \"" + file + "\"";
  }
  put(folder / "model.safetensors.index.json", R"({"weight_map": {)" + map + "}}");
}

void write_all(const fs::path& folder) {
  const Tensors base = base_of(usual(), false);
  save_safetensors(folder / "base.safetensors", base.views(), {{"made by", "a test"}});
  save_safetensors(folder / "transposed.safetensors", base_of(usual(), true).views());
  save_safetensors(folder / "ties.safetensors", base_of(ties(), false).views());
  write_shards(folder / "shards", base);

  const std::string patterns = R"("rank_pattern": {"v": 2}, "alpha_pattern": {"o": 3})";
  write_peft(folder / "adapter", usual(), patterns);
  write_peft(folder / "conv1d", usual(), patterns + R"(, "fan_in_fan_out": true)");
  write_peft(folder / "ties", ties(), R"("rank_pattern": {".*": 1}, "alpha_pattern": {".*": 1})");
  write_peft(folder / "orthogonal", {orthogonal()}, R"("rank_pattern": {"q": 3}, "alpha_pattern": {"q": 6})");
  write_peft(folder / "rslora", {usual().front()}, R"("use_rslora": true)");
  write_peft(folder / "dora", usual(), patterns + R"(, "use_dora": true)");
  write_peft(folder / "wrong_rank", usual(), R"("task_type": null)");
  Adapted twice = usual().front();
  twice.module = "layers.0.q";
  write_peft(folder / "twice", {usual().front(), twice}, R"("task_type": null)");
  twice.module = "layers.1.q";
  write_peft(folder / "elsewhere", {twice}, R"("task_type": null)");

  const auto variant = [&](const char* name, const std::string& tensor, DType dtype, const Factor& values) {
    Tensors tensors;
    tensors.add(tensor, dtype, values);
    tensors.add("layers.0.q.weight", DType::F32, usual().front().W);
    save_safetensors(folder / name, tensors.views());
  };
  variant("ambiguous.safetensors", "model.layers.0.q.weight", DType::F32, usual().front().W);
  variant("hostile.safetensors", "red \x1b[31m\n", DType::F32, Factor::Ones(1, 1));
  variant("lone.safetensors", "base_model.model.layers.0.q.lora_A.weight", DType::F32, Factor::Ones(1, 1));
  Tensors integers, large;
  integers.add("layers.0.q.weight", DType::I64, {8, 6}, std::string(8 * 6 * 8, '\1'));
  save_safetensors(folder / "integers.safetensors", integers.views());
  large.add("layers.0.q.weight", DType::F16, Factor::Constant(8, 6, 65504));
  save_safetensors(folder / "large.safetensors", large.views());
  Adapted huge = usual().front();
  huge.B *= 1e5;
  write_peft(folder / "huge", {huge}, R"("task_type": null)");

  GgufContents model;
  model.metadata = {{"general.architecture", std::string("llama")}, {"tokens", GgufArray(std::vector<std::string>{"a", "b"})}};
  model.tensors.push_back(gguf_tensor(base.views().front()));
  AtomicFile gguf(folder / "model.gguf");
  write_gguf(gguf, model);
  gguf.commit();
  write_gguf_adapter(folder / "adapter.gguf", 6);
  write_gguf_adapter(folder / "scale_1.gguf", 0);
  std::vector<float> weights(6, 1);
  const std::string checkpoint = checkpoint_bytes(7, [&](auto& archive) { archive("weights", weights); });
  put(folder / "checkpoint.safetensors", checkpoint);
  put(folder / "damaged.safetensors", std::string(checkpoint).replace(checkpoint.size() - 1, 1, "!"));

  for (const char* name : {"base.safetensors", "adapter.gguf"}) {
    const std::string whole = test::contents_of(folder / name);
    put(folder / (std::string("cut_") + name), whole.substr(0, whole.size() - 5 - 32));  // GGUF pads to 32
  }
  put(folder / "pickle.bin", "\x80\x02}q\x01.");
  put(folder / "pointer.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
  fs::create_directories(folder / "empty");
  fs::create_directories(folder / "no_config");
  fs::copy_file(folder / "adapter/adapter_model.safetensors", folder / "no_config/adapter_model.safetensors",
                fs::copy_options::overwrite_existing);
}

/// Whether `value` is the number of the type T nearest to `exact`, of two equally near ones the even one.
template <class T, class Bits>
bool is_nearest(T value, double exact) {
  const auto distance = [&](T candidate) { return std::abs(static_cast<double>(candidate) - exact); };
  const Bits bits = std::bit_cast<Bits>(value);
  for (const auto neighbour : {static_cast<Bits>(bits - 1), static_cast<Bits>(bits + 1)}) {
    const double other = distance(std::bit_cast<T>(neighbour));
    if (other < distance(value) || (other == distance(value) && bits % 2 == 1)) return false;
  }
  return true;
}

/// Whether the bytes of a tensor are those of `exact` in its type.
bool holds(const TensorView& tensor, const Factor& exact) {
  const auto all = [&](auto is_right, auto element) {
    for (Index i = 0; i < exact.size(); ++i) {
      std::memcpy(&element, tensor.bytes.data() + static_cast<std::size_t>(i) * sizeof element, sizeof element);
      if (!is_right(element, exact.data()[i])) return false;
    }
    return true;
  };
  switch (tensor.dtype) {
    case DType::F16: return all(is_nearest<Eigen::half, std::uint16_t>, Eigen::half());
    case DType::BF16: return all(is_nearest<Eigen::bfloat16, std::uint16_t>, Eigen::bfloat16());
    case DType::F32: return all(is_nearest<float, std::uint32_t>, float());
    default: return all([](double value, double wanted) { return std::abs(value - wanted) <= 1e-14; }, double());
  }
}

void compare(const fs::path& folder, const std::string& name, const fs::path& merged_path, Index rank, const std::string& rule,
             bool transposed) {
  const SafetensorsFile base(folder / (name == "ties" ? "ties.safetensors" : transposed ? "transposed.safetensors" : "base.safetensors"));
  const SafetensorsFile merged(merged_path);
  const auto require = [](bool right, const std::string& what) {
    if (!right) throw std::runtime_error(what);
  };
  require(merged.tensors().size() == base.tensors().size(), "another number of tensors");
  std::map<std::string, Factor> sums;
  for (const Adapted& a : set_of(name)) {
    const Index b = std::min(rank, a.rank());
    const double below = static_cast<double>(a.rank()) / static_cast<double>(b);
    const double scale = a.alpha / static_cast<double>(a.rank()) * (rule == "rank" ? below : rule == "sqrt-rank" ? std::sqrt(below) : 1);
    Factor W = matrix_of<double>(*base.find(a.weight), base.name());
    for (Index o = 0; o < a.B.rows(); ++o) {
      for (Index i = 0; i < a.A.cols(); ++i) {
        double sum = 0;
        for (Index k = 0; k < b; ++k) sum += a.B(o, k) * a.A(k, i);
        (transposed ? W(i, o) : W(o, i)) += scale * sum;
      }
    }
    sums[a.weight] = W;
  }
  for (const TensorView& was : base.tensors()) {
    const TensorView* is = merged.find(was.name);
    require(is != nullptr && is->dtype == was.dtype && is->shape == was.shape, was.name + ": lost, or of another type or shape");
    const auto sum = sums.find(was.name);
    require(sum == sums.end() ? std::ranges::equal(is->bytes, was.bytes) : holds(*is, sum->second), was.name + ": other values");
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    if (arguments.size() == 1) {
      write_all(arguments[0]);
    } else if (arguments.size() >= 5) {
      compare(arguments[0], arguments[1], arguments[2], std::stol(arguments[3]), arguments[4], arguments.size() > 5);
    } else {
      throw std::invalid_argument("expected 1, 5 or 6 arguments");
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "write_adapters: %s\n", error.what());
    return 1;
  }
}
