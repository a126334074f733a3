#ifndef DYLORA_EXAMPLES_FINETUNE_OPTIONS_HPP
#define DYLORA_EXAMPLES_FINETUNE_OPTIONS_HPP

#include <CLI/CLI.hpp>
#include <algorithm>
#include <dylora/dylora.hpp>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "gpt/gpt.hpp"

/// The command line of finetune_text, and what it says about ranks, targets and the report.
namespace finetune {

using namespace dylora;

using Plan = std::function<StepRanks(Index, Rng&)>;

inline const std::map<std::string, ScaleRule> scale_rules{
    {"rank", alpha_over_rank}, {"sqrt-rank", alpha_over_sqrt_rank}, {"max-rank", alpha_over_max_rank}};
inline const std::map<std::string, Decay> decays{{"constant", Decay::constant}, {"linear", Decay::linear}, {"cosine", Decay::cosine}};

/// What --method may say.
const std::vector<std::string>& method_names();

struct Options {
  std::string method = "dylora";
  double lr_ratio = 4;
  Index modules = 3, bases = 0, links = 2, interval = 0;
  bool quiet = false;  // says nothing while it trains

  std::vector<std::string> text, pretrain{DYLORA_EIGEN_INCLUDE_DIR};
  std::string base_folder = DYLORA_BUILD_DIR, json;
  std::string base, save, save_gguf, checkpoint;
  Index save_rank = 0, checkpoint_every = 100;
  bool resume = false;

  Index context = 64, width = 128, layers = 3, heads = 4;
  bool untied = false;
  Index pretrain_steps = 1200;
  double pretrain_lr = 2e-3;

  Index max_rank = 8, min_rank = 0, unit = 1;
  double alpha = 16, geometric_p = 0.25;
  std::string scale = "max-rank", sampler = "recommended", mode = "nested", targets;

  Index steps = 800, batch = 32, accumulation = 1, warmup = 40, validation = 256;
  double lr = 1.2e-2, weight_decay = 0, max_norm = 1;
  std::string decay = "cosine", update = "active-only";
  double tolerance = 0.01;
  Index layer_budget = 0;

  std::string prompt = "This License ";
  Index sample_length = 240;
  double temperature = 0.7;

  std::uint64_t seed = 1;
  int threads = 0;
};

/// Declares the command line; every option also goes into the report.
inline void declare(CLI::App& app, Options& o) {
  auto* base = app.add_option(
      "--base", o.base,
      "Adapt the GPT-2 in this folder: config.json, model.safetensors (or its shards and their index), vocab.json, merges.txt. Without it, "
      "a small model is pretrained first");
  app.add_option("--method", o.method, "How it is adapted")->check(CLI::IsMember(method_names()));
  app.add_option("--lr-ratio", o.lr_ratio, "lora+: the learning rate of B over that of A")->check(CLI::PositiveNumber);
  app.add_option("--modules", o.modules, "multilora: pairs of factors side by side")->check(CLI::PositiveNumber);
  app.add_option("--bases", o.bases, "nola: random bases of each factor; 0 for as many as a rank of --max-rank has parameters")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--links", o.links, "chain: links, each trained for its share of the steps")->check(CLI::PositiveNumber);
  app.add_option("--interval", o.interval, "periodic: steps between two merges; 0 for a quarter of the steps")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--text", o.text, "Files or folders to adapt to (default: the licence texts of this system)");
  app.add_option("--pretrain", o.pretrain, "Files or folders to pretrain the base on (default: Eigen's headers)")->excludes(base);
  app.add_option("--base-folder", o.base_folder, "Where the pretrained base is kept")->excludes(base);
  app.add_option("--json", o.json, "Write a report to this file");
  app.add_option("--save", o.save,
                 "Write the adapter to this folder, as Hugging Face's PEFT loads it where it has the method, else as "
                 "dylora/io/parameters_file.hpp does");
  app.add_option("--save-gguf", o.save_gguf, "Write the adapter to this file, as llama.cpp loads it")->needs(base);
  app.add_option("--save-rank", o.save_rank, "The rank to save; 0 for all components")->check(CLI::NonNegativeNumber);
  auto* checkpoint = app.add_option("--checkpoint", o.checkpoint, "Keep the state of the training in this folder");
  app.add_option("--checkpoint-every", o.checkpoint_every, "Steps between two checkpoints")->check(CLI::PositiveNumber);
  app.add_flag("--resume", o.resume, "Go on from the newest checkpoint, if there is one")->needs(checkpoint);

  app.add_option("--context", o.context, "Tokens in a window")->check(CLI::Range(1, 4096));
  app.add_option("--width", o.width, "Width of the model")->check(CLI::Range(1, 4096))->excludes(base);
  app.add_option("--layers", o.layers, "Blocks of the model")->check(CLI::Range(1, 64))->excludes(base);
  app.add_option("--heads", o.heads, "Attention heads")->check(CLI::Range(1, 64))->excludes(base);
  app.add_flag("--untied", o.untied, "Give the head weights of its own")->excludes(base);
  app.add_option("--pretrain-steps", o.pretrain_steps, "Steps of pretraining")->check(CLI::PositiveNumber)->excludes(base);
  app.add_option("--pretrain-lr", o.pretrain_lr, "Learning rate of pretraining")->check(CLI::NonNegativeNumber)->excludes(base);

  app.add_option("--max-rank", o.max_rank, "R, the components of each adapter; prilora: of those of the last block")
      ->check(CLI::PositiveNumber);
  app.add_option("--min-rank", o.min_rank, "The lowest rank that is drawn; 0 for the smallest there is")->check(CLI::NonNegativeNumber);
  app.add_option("--alpha", o.alpha, "Numerator of the scale")->check(CLI::PositiveNumber);
  app.add_option("--scale", o.scale, "Denominator of the scale: the rank, its root, or the maximal rank")
      ->check(CLI::IsMember(scale_rules));
  app.add_option(
         "--sampler", o.sampler,
         "How ranks are drawn: one per micro-batch (uniform, as the paper, or geometric), several for parts of each (sandwich, every, "
         "recommended), or --max-rank alone, which is LoRA (fixed)")
      ->check(CLI::IsMember({"recommended", "uniform", "geometric", "sandwich", "every", "fixed"}));
  app.add_option("--geometric-p", o.geometric_p, "The geometric sampler's p")->check(CLI::Range(0.0, 1.0));
  app.add_option("--unit", o.unit, "Components in a block; ranks are multiples of it")->check(CLI::PositiveNumber);
  app.add_option("--mode", o.mode, "Whether all active components learn or the newest block only")
      ->check(CLI::IsMember({"nested", "frozen"}));
  app.add_option("--targets", o.targets,
                 "Which projections are adapted: letters of q k v o and m for the MLP (default: all; with --base qkv, "
                 "which is one adapter on c_attn)");

  app.add_option("--steps", o.steps, "Steps of adaptation")->check(CLI::PositiveNumber);
  app.add_option("--batch", o.batch, "Windows in a micro-batch")->check(CLI::PositiveNumber);
  app.add_option("--accumulation", o.accumulation, "Micro-batches in a step, each at ranks of its own")->check(CLI::PositiveNumber);
  app.add_option("--lr", o.lr, "Learning rate of adaptation")->check(CLI::NonNegativeNumber);
  app.add_option("--decay", o.decay, "Learning-rate schedule")->check(CLI::IsMember(decays));
  app.add_option("--warmup", o.warmup, "Steps of warm-up")->check(CLI::NonNegativeNumber);
  app.add_option("--weight-decay", o.weight_decay, "Decoupled weight decay")->check(CLI::NonNegativeNumber);
  app.add_option("--max-norm", o.max_norm, "Clip the global gradient norm; 0 never")->check(CLI::NonNegativeNumber);
  app.add_option("--update", o.update, "What a step does to inactive components")->check(CLI::IsMember({"active-only", "dense"}));
  app.add_option("--validation", o.validation, "Windows of held-out text for each loss")->check(CLI::PositiveNumber);

  app.add_option("--tolerance", o.tolerance, "How much worse than the best rank, in nats, the selected one may be")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--layer-budget", o.layer_budget,
                 "After training, give each layer a rank of its own, all together with the parameters of this rank for all; 0 leaves them")
      ->check(CLI::NonNegativeNumber);

  app.add_option("--prompt", o.prompt, "What the samples continue");
  app.add_option("--sample-length", o.sample_length, "Bytes in a sample; 0 for none")->check(CLI::NonNegativeNumber);
  app.add_option("--temperature", o.temperature, "Temperature of the samples")->check(CLI::PositiveNumber);

  app.add_option("--seed", o.seed, "Seed of everything random");
  app.add_option("--threads", o.threads, "Threads; 0 for as many as there are")->check(CLI::NonNegativeNumber);

  for (CLI::Option* option : app.get_options()) {
    if (option->get_expected_max() == 1) option->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);  // what comes later wins
  }
}

/// Which ranks a micro-batch works at, as the options say.
inline Plan make_plan(const Options& o) {
  if (o.min_rank % o.unit != 0 || o.max_rank % o.unit != 0 || o.min_rank > o.max_rank) {
    throw std::invalid_argument("--min-rank and --max-rank: expected multiples of --unit " + std::to_string(o.unit) +
                                " in that order, got " + std::to_string(o.min_rank) + " and " + std::to_string(o.max_rank));
  }
  const Index lowest = o.sampler == "fixed" ? o.max_rank / o.unit : std::max<Index>(1, o.min_rank / o.unit), highest = o.max_rank / o.unit;
  if (o.sampler == "recommended" || o.sampler == "sandwich" || o.sampler == "every") {
    if (o.unit != 1 || o.mode != "nested" || (o.sampler == "recommended" && lowest != 1)) {
      throw std::invalid_argument("--sampler " + o.sampler + ": expected --unit 1 and --mode nested" +
                                  (o.sampler == "recommended" ? ", and ranks from 1 on" : "") +
                                  " (--sampler uniform takes others), got --unit " + std::to_string(o.unit) + ", --mode " + o.mode +
                                  " and ranks from " + std::to_string(lowest) + " on");
    }
    const Index ranks = highest - lowest + 1,
                parts = o.sampler == "every" ? ranks : std::min<Index>(ranks, o.sampler == "sandwich" ? 4 : 6);
    if (o.batch < parts) {
      throw std::invalid_argument("--batch: expected at least " + std::to_string(parts) + " windows for --sampler " + o.sampler +
                                  ", one for each part, got " + std::to_string(o.batch));
    }
    if (o.sampler == "sandwich") return Sandwich{lowest, highest};
    if (o.sampler == "every") return EveryRank{lowest, highest};
    return recommended_plan(highest, o.steps);
  }
  const auto in_units = [&](auto sampler) -> Plan {
    if (o.mode == "frozen") return FreshRanks{BlockRank{FrozenPrefix{sampler}, o.unit}};
    return FreshRanks{BlockRank{sampler, o.unit}};
  };
  if (o.sampler == "geometric") return in_units(GeometricRank{lowest, highest, o.geometric_p});
  return in_units(UniformRank{lowest, highest});
}

/// The letters of --targets, or what they are without it.
inline std::string target_letters(const Options& o) { return !o.targets.empty() ? o.targets : o.base.empty() ? "qkvom" : "qkv"; }

inline gpt::Targets make_targets(const Options& o) {
  const std::string letters = target_letters(o);
  if (letters.find_first_not_of("qkvom") != std::string::npos) {
    throw std::invalid_argument("--targets: expected some of the letters q k v o m, got \"" + letters + '"');
  }
  const auto has = [&](char letter) { return letters.find(letter) != std::string::npos; };
  return {.q = has('q'), .k = has('k'), .v = has('v'), .o = has('o'), .mlp = has('m')};
}

/// Every option and its value under the option's name, numbers as numbers.
inline nlohmann::json used_options(const CLI::App& app) {
  nlohmann::json used;
  for (const CLI::Option* option : app.get_options()) {
    if (option->get_lnames().empty() || option->get_lnames().front() == "help") continue;
    std::string name = option->get_lnames().front();
    std::replace(name.begin(), name.end(), '-', '_');
    if (option->get_expected_max() == 0) {
      used[name] = option->count() > 0;  // a flag
      continue;
    }
    const std::string value = option->count() > 0 ? option->results().back() : option->get_default_str();
    const auto parsed = nlohmann::json::parse(value, nullptr, false);
    used[name] = parsed.is_number() ? parsed : nlohmann::json(value);
  }
  return used;
}

}  // namespace finetune

#endif
