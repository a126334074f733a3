#ifndef DYLORA_EXAMPLES_PRETRAINED_GPT2_HPP
#define DYLORA_EXAMPLES_PRETRAINED_GPT2_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <dylora/dylora.hpp>
#include <dylora/io/bytes/mapped_file.hpp>
#include <dylora/io/safetensors/folder.hpp>
#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gpt/gpt.hpp"
#include "pretrained/gpt2_config.hpp"
#include "text/corpus.hpp"

/// GPT-2 from the files that people have: config.json and model.safetensors, whole or in shards.
namespace pretrained {

/// GPT-2 keeps a projection as in × out, row by row: for us, out × in column by column.
using Weight = dylora::WeightView<float>;
using Projection = dylora::Linear<float, dylora::LowRank<float>, Weight>;
using QkvProjection = dylora::Linear<float, dylora::Stacked<dylora::LowRank<float>>, Weight>;
using Embedding = Eigen::Map<const dylora::MatrixX<float>>;

/// Attention whose queries, keys and values come from one projection, under GPT-2's names.
struct Gpt2Attention : dylora::MergedAttention<float, QkvProjection, Projection> {
  using MergedAttention::MergedAttention;

  static void members(const auto& f, auto&... t) {
    f(dylora::Child<QkvProjection>{"c_attn"}, t.qkv...);
    f(dylora::Child<Projection>{"c_proj"}, t.o...);
  }
};

using Gpt2Model = gpt::Gpt<float, Projection, Gpt2Attention, Embedding>;

/// The files of a pretrained GPT-2. The weights stay where they are mapped; only those of another type than F32, or at an odd address, are
/// converted into memory of their own.
class Gpt2 {
 public:
  /// Throws dylora::FileError or dylora::FormatError for files that are missing, malformed or not of one GPT-2: a tensor that is missing,
  /// has another shape than config.json says, or belongs to nothing.
  explicit Gpt2(const std::filesystem::path& folder) : files_(folder), config_(read_config(folder)) {
    prefix_ = files_.find("transformer.wte.weight") != nullptr ? "transformer." : "";
    const auto [vocabulary, context, width, layers, heads, tied] = config_.model;
    token_embedding_ = tensor("wte.weight", {vocabulary, width});
    position_embedding_ = tensor("wpe.weight", {context, width});
    for (Index i = 0; i < layers; ++i) {
      const std::string block = "h." + std::to_string(i) + '.';
      blocks_.push_back({norm(block + "ln_1"), norm(block + "ln_2"), conv1d(block + "attn.c_attn", width, 3 * width),
                         conv1d(block + "attn.c_proj", width, width), conv1d(block + "mlp.c_fc", width, config_.inner),
                         conv1d(block + "mlp.c_proj", config_.inner, width)});
      for (const char* mask : {"attn.bias", "attn.masked_bias"}) known_.insert(prefix_ + block + mask);
    }
    final_norm_ = norm("ln_f");
    if (tied) {
      known_.insert("lm_head.weight");
    } else {
      head_ = values("lm_head.weight", {vocabulary, width});
    }
    refuse_others();
  }

  const gpt::Config& config() const { return config_.model; }
  const dylora::SafetensorsFolder& files() const { return files_; }

  /// The number of weights that the model uses.
  Index parameters() const {
    Index count = 0;
    for (const dylora::TensorView* tensor : weights_) count += tensor->size();
    return count;
  }

  /// Tells this model from others without reading all of it: a checksum of the tensors' names and types, and of the first bytes of each.
  std::string identity() const {
    std::uint64_t sum = text::checksum(nullptr, 0);
    for (const dylora::TensorView* tensor : weights_) {
      const std::string described =
          tensor->name + ' ' + std::string(dylora::info(tensor->dtype).name) + ' ' + dylora::describe_shape(tensor->shape);
      sum = text::checksum(described.data(), described.size(), sum);
      const auto first = tensor->bytes.first(std::min<std::size_t>(4096, tensor->bytes.size()));
      sum = text::checksum(reinterpret_cast<const char*>(first.data()), first.size(), sum);
    }
    return "GPT-2 " + std::to_string(sum);
  }

  /// Bytes of weights that had to be converted; all others are only mapped.
  std::size_t converted_bytes() const { return converted_bytes_; }

  /// The model with fresh adapters, over the weights in these files, which must outlive it. Where all of q, k and v are targets, c_attn has
  /// one adapter; else one for each slice of it that is.
  Gpt2Model adapted(dylora::LowRankOptions options, gpt::Targets targets, dylora::Rng& rng) const {
    const auto [vocabulary, context, width, layers, heads, tied] = config_.model;
    const auto projection = [&](const Conv1D& from, bool adapt) { return Projection(weight(from), with(options, adapt), rng); };
    Gpt2Model model{config_.model,
                    {token_embedding_, width, vocabulary},
                    {position_embedding_, width, context},
                    {},
                    layer_norm(final_norm_),
                    {head_, width, head_ != nullptr ? vocabulary : 0}};
    for (const Block& block : blocks_) {
      QkvProjection merged(weight(block.c_attn), slices(options, targets), rng);
      Projection out = projection(block.attention_out, targets.o);
      Projection fc = projection(block.c_fc, targets.mlp), mlp_out = projection(block.mlp_out, targets.mlp);
      model.blocks.push_back({layer_norm(block.ln_1), layer_norm(block.ln_2),
                              Gpt2Attention(std::move(merged), std::move(out), {.heads = heads}), std::move(fc), std::move(mlp_out)});
    }
    return model;
  }

 private:
  struct Norm {
    const float *gain, *bias;
  };
  struct Conv1D {
    const float *values, *bias;
    Index in, out;
  };
  struct Block {
    Norm ln_1, ln_2;
    Conv1D c_attn, attention_out, c_fc, mlp_out;
  };

  static Gpt2Config read_config(const std::filesystem::path& folder) {
    const dylora::MappedFile file(folder / "config.json");
    return parse_gpt2_config(file.text(), file.name());
  }

  static dylora::StackedOptions<dylora::LowRankOptions> slices(const dylora::LowRankOptions& options, gpt::Targets targets) {
    if (targets.q == targets.k && targets.k == targets.v) return {.adapters = {with(options, targets.q)}};
    return {.adapters = {with(options, targets.q), with(options, targets.k), with(options, targets.v)}};
  }

  static dylora::LowRankOptions with(dylora::LowRankOptions options, bool adapt) {
    if (!adapt) options.max_rank = 0;
    return options;
  }

  static Weight weight(const Conv1D& from) { return Weight(from.values, from.out, from.in, from.bias); }

  gpt::LayerNorm<float> layer_norm(const Norm& from) const {
    const Index width = config_.model.width;
    gpt::LayerNorm<float> norm(width);
    norm.gain = Eigen::Map<const dylora::VectorX<float>>(from.gain, width);
    norm.bias = Eigen::Map<const dylora::VectorX<float>>(from.bias, width);
    norm.epsilon = config_.epsilon;
    return norm;
  }

  Norm norm(const std::string& name) {
    const Index width = config_.model.width;
    return {tensor(name + ".weight", {width}), tensor(name + ".bias", {width})};
  }

  Conv1D conv1d(const std::string& name, Index in, Index out) {
    return {tensor(name + ".weight", {in, out}), tensor(name + ".bias", {out}), in, out};
  }

  const float* tensor(const std::string& name, const std::vector<Index>& shape) { return values(prefix_ + name, shape); }

  const float* values(const std::string& name, const std::vector<Index>& shape) {
    const dylora::TensorView* found = files_.find(name);
    if (found == nullptr) {
      throw dylora::FormatError(files_.name() + ": tensor " + dylora::in_quotes(name) + ": expected one of " +
                                dylora::describe_shape(shape) + ", found none");
    }
    if (found->shape != shape) {
      throw dylora::FormatError(files_.name() + ": tensor " + dylora::in_quotes(name) + ": expected " + dylora::describe_shape(shape) +
                                " as config.json says, got " + dylora::describe_shape(found->shape));
    }
    known_.insert(name);
    weights_.push_back(found);
    if (const float* in_place = dylora::elements_in_place<float>(*found)) return in_place;
    std::vector<float>& copy = converted_.emplace_back(static_cast<std::size_t>(found->size()));
    dylora::copy_elements(*found, copy.data(), files_.name());
    converted_bytes_ += copy.size() * sizeof(float);
    return copy.data();
  }

  /// All that the files may hold besides the weights is the masks of older ones, and a copy of a tied head.
  void refuse_others() const {
    for (const dylora::SafetensorsFile& file : files_.files()) {
      for (const dylora::TensorView& tensor : file.tensors()) {
        if (!known_.contains(tensor.name)) {
          throw dylora::FormatError(file.name() + ": tensor " + dylora::in_quotes(tensor.name) +
                                    ": expected none of that name in the model of config.json");
        }
      }
    }
  }

  dylora::SafetensorsFolder files_;
  Gpt2Config config_;
  std::string prefix_;
  std::set<std::string> known_;
  std::vector<const dylora::TensorView*> weights_;  // those that the model uses
  std::deque<std::vector<float>> converted_;
  std::size_t converted_bytes_ = 0;
  const float *token_embedding_ = nullptr, *position_embedding_ = nullptr, *head_ = nullptr;
  std::vector<Block> blocks_;
  Norm final_norm_{};
};

}  // namespace pretrained

#endif
