#ifndef DYLORA_EXAMPLES_TEXT_BASE_MODEL_HPP
#define DYLORA_EXAMPLES_TEXT_BASE_MODEL_HPP

#include <cstdint>
#include <cstdio>
#include <dylora/dylora.hpp>
#include <dylora/io/bytes/atomic_file.hpp>
#include <filesystem>
#include <fstream>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "gpt/gpt.hpp"
#include "text/corpus.hpp"
#include "text/progress.hpp"
#include "text/training.hpp"

/// The small pretrained model: trained once from real text, then kept in a file whose name says what it was made from.
namespace text {

using BaseModel = gpt::Gpt<float, gpt::DenseLinear<float>>;

struct PretrainOptions {
  gpt::Config config;
  Index steps = 1200;
  Index batch = 32;
  double lr = 2e-3;
  std::uint64_t seed = 1;
};

/// Everything that the pretrained weights depend on, in words.
inline std::string base_key(const PretrainOptions& options, const Corpus& corpus) {
  const gpt::Config& c = options.config;
  std::ostringstream key;
  key << "dylora base 1: vocabulary " << c.vocabulary << " context " << c.context << " width " << c.width << " layers " << c.layers
      << " heads " << c.heads << (c.tied ? " tied" : " untied") << " steps " << options.steps << " batch " << options.batch << " lr "
      << options.lr << " seed " << options.seed << " text " << std::hex << checksum(corpus.training.data(), corpus.training.size());
  return key.str();
}

inline std::filesystem::path base_path(const std::filesystem::path& folder, const std::string& key) {
  std::ostringstream name;
  name << "base-" << std::hex << checksum(key.data(), key.size()) << ".bin";
  return folder / name.str();
}

/// Key, parameters and their checksum: a reader sees all of it or nothing.
inline void save_base(const std::filesystem::path& path, const std::string& key, const BaseModel& model) {
  dylora::AtomicFile file(path);
  std::uint64_t sum = checksum(key.data(), key.size());
  file.write(key + '\n');
  for_each_parameter(
      [&](dylora::Parameter, const auto& p) {
        const auto* bytes = reinterpret_cast<const char*>(p.data());
        const std::size_t size = sizeof(float) * static_cast<std::size_t>(p.size());
        sum = checksum(bytes, size, sum);
        file.write(std::string_view(bytes, size));
      },
      model);
  file.write(std::as_bytes(std::span(&sum, 1)));
  file.commit();
}

/// Nothing if there is no such file, or it is not whole, or it was made from something else.
inline std::optional<BaseModel> load_base(const std::filesystem::path& path, const std::string& key, const PretrainOptions& options) {
  std::ifstream in(path, std::ios::binary);
  std::string found;
  if (!in || !std::getline(in, found) || found != key) return std::nullopt;
  dylora::Rng unused(0);
  BaseModel model = gpt::random_gpt<float>(options.config, unused);
  std::uint64_t sum = checksum(key.data(), key.size()), expected = 0;
  for_each_parameter(
      [&](dylora::Parameter, auto& p) {
        const std::size_t size = sizeof(float) * static_cast<std::size_t>(p.size());
        in.read(reinterpret_cast<char*>(p.data()), static_cast<std::streamsize>(size));
        sum = checksum(reinterpret_cast<const char*>(p.data()), size, sum);
      },
      model);
  in.read(reinterpret_cast<char*>(&expected), sizeof expected);
  if (!in || sum != expected) return std::nullopt;
  return model;
}

/// Throws NonFiniteError with the step and the layer if training diverges; no base is kept then.
inline BaseModel pretrain(const PretrainOptions& options, const Corpus& corpus) {
  dylora::Rng rng(options.seed);
  BaseModel model = gpt::random_gpt<float>(options.config, rng);
  auto gradients = dylora::zeros_like(model);
  BaseModel::Cache cache;
  BaseModel::Workspace workspace;
  dylora::AdamW optimizer(model, {.beta2 = 0.99, .weight_decay = 0.01, .max_norm = 1});
  const dylora::Schedule schedule(dylora::Decay::cosine,
                                  {.peak = options.lr, .steps = options.steps, .warmup_steps = options.steps / 20, .final_fraction = 0.05});
  Progress progress("pretraining", options.steps, options.batch * options.config.context);
  Batch batch;
  for (Index step = 0; step < options.steps; ++step) {
    random_batch(corpus.training, options.batch, options.config.context, rng, batch);
    optimizer.set_learning_rate(schedule(step));
    const double loss = dylora::train_step(model, optimizer, gradients, [&] {
      return loss_and_gradients(model, batch, dylora::RankSlice::none(), 1, cache, gradients, workspace);
    });
    progress.update(step, loss, 0);
  }
  return model;
}

/// The pretrained base from `folder`, or a new one, which is then left there.
inline BaseModel pretrained_base(const std::filesystem::path& folder, const PretrainOptions& options, const Corpus& corpus) {
  const std::string key = base_key(options, corpus);
  const std::filesystem::path path = base_path(folder, key);
  if (auto model = load_base(path, key, options)) {
    std::printf("base: %s\n", path.string().c_str());
    return std::move(*model);
  }
  BaseModel model = pretrain(options, corpus);
  std::filesystem::create_directories(folder);
  save_base(path, key, model);
  std::printf("base: kept in %s\n", path.string().c_str());
  return model;
}

}  // namespace text

#endif
