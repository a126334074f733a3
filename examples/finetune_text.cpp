// Adapts a pretrained text model to other text, with DyLoRA or by --method, and shows the validation loss at every rank that this one run
// gives. The model is a small byte-level one, pretrained here on source code, or with --base a GPT-2 in the files that the Hugging Face hub
// has of it.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <dylora/dylora.hpp>
#include <dylora/io/bytes/atomic_file.hpp>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "finetune/adapted_as.hpp"
#include "finetune/memory.hpp"
#include "finetune/methods.hpp"
#include "finetune/methods/low_rank.hpp"
#include "finetune/options.hpp"
#include "finetune/task.hpp"
#include "gpt/gpt.hpp"
#include "pretrained/gpt2.hpp"
#include "pretrained/tokenizer.hpp"
#include "program.hpp"
#include "text/base_model.hpp"
#include "text/corpus.hpp"
#include "text/platform.hpp"
#include "text/training.hpp"

namespace {

using namespace dylora;
using namespace finetune;

template <class Vocabulary>
void print_sample(const AdaptedModel& model, const Vocabulary& vocabulary, const Options& o, RankSlice rank) {
  Rng rng(o.seed);
  std::string sample = vocabulary.decode(model.continue_text(vocabulary.encode(o.prompt), o.sample_length, o.temperature, rank, rng));
  for (char& c : sample) {
    if ((static_cast<unsigned char>(c) < ' ' && c != '\n') || static_cast<unsigned char>(c) > '~') c = '?';
  }
  std::printf("\n--- rank %td: %s%s\n", rank.active, o.prompt.c_str(), sample.c_str());
}

std::vector<std::string> text_paths(const Options& o) { return o.text.empty() ? text::default_text(DYLORA_OWN_TEXT) : o.text; }

/// The work, for a model of either kind.
template <class Vocabulary>
int adapt(AdaptedModel& model, const Vocabulary& vocabulary, const Task& task, Index base_parameters, const Options& o,
          const CLI::App& app) {
  const auto validation = text::spread_batches(task.validation, o.validation, o.batch, o.context);
  const double base_loss = model.loss(validation, RankSlice::none());
  const Index trained = model.trained_parameters(), parameters = base_parameters + trained;
  std::printf("%td parameters, of which %td are trained; validation loss of the base %.4f\n", parameters, trained, base_loss);

  nlohmann::json report = used_options(app);
  report.update({{"sampler", o.sampler}, {"scale", o.scale}});  // which a method may have its own way
  const Training training = model.train(o, report, task);

  if (!training.stopped.empty() && !std::isfinite(model.loss(validation, o.max_rank))) {
    std::fprintf(stderr, "finetune_text: the loss at --max-rank is no number; nothing to evaluate\n");
    return 3;
  }
  const RankCurve curve = model.rank_curve(validation, o.max_rank);
  std::printf("\n rank   validation loss   bits per byte   over the best\n");
  nlohmann::json ranks = nlohmann::json::array();
  for (Index rank = 0; rank <= o.max_rank; ++rank) {
    const Estimate loss = curve.loss(rank), excess = curve.excess(rank, curve.best());
    std::printf("%5td   %15.4f   %13.3f", rank, loss.mean, loss.mean / std::log(2.0) / task.bytes_per_token);
    if (rank == curve.best()) {
      std::printf("            best\n");
    } else {
      std::printf("   %6.4f ± %6.4f%s\n", excess.mean, excess.standard_error,
                  rank > 0                 ? ""
                  : o.method == "periodic" ? "   what was merged"
                                           : "   no adapter");
    }
    nlohmann::json entry{{"rank", rank}, {"loss", loss.mean}};
    if (curve.batches() > 1) entry["standard_error"] = loss.standard_error;
    ranks.push_back(entry);
  }
  const Index selected = select_rank(curve, {.tolerance = o.tolerance});
  std::printf("\nsmallest rank within %g of the best: %td\n", o.tolerance, selected);
  std::printf("trained once, in %.1f s at %.0f tokens/s\n", training.seconds, training.tokens_per_second);

  nlohmann::json layer_ranks;
  if (o.layer_budget > 0) {
    const double uniform = curve.loss(o.layer_budget).mean;
    layer_ranks = model.choose_layer_ranks(o, text::spread_batches(task.training, 4 * o.validation, o.batch, o.context));
    const double chosen = model.loss(validation, o.max_rank);
    std::printf("\na rank for each layer, at the parameters of rank %td for all: validation loss %.4f, uniform %.4f\n", o.layer_budget,
                chosen, uniform);
    for (const auto& [name, rank] : layer_ranks.items()) std::printf("  %-18s %td\n", name.c_str(), rank.template get<Index>());
    layer_ranks = {{"ranks", layer_ranks}, {"loss", chosen}, {"uniform_loss", uniform}};
  }

  model.save(o);
  if (!o.json.empty()) {
    report.update({{"base_loss", base_loss},
                   {"ranks", ranks},
                   {"selected_rank", selected},
                   {"train_seconds", training.seconds},
                   {"tokens_per_second", training.tokens_per_second},
                   {"parameters", parameters},
                   {"trainable_parameters", trained},
                   {"peak_rss_mb", text::peak_rss_mb()},
                   {"text", text_paths(o)},
                   {"pretrain", o.pretrain}});
    if (!training.stopped.empty()) report["stopped"] = training.stopped;
    if (!layer_ranks.is_null()) report["layer_ranks"] = layer_ranks;
    std::ofstream out(o.json);
    if (!(out << report.dump(2) << '\n') || !out.flush()) throw std::runtime_error("cannot write " + o.json);
  }
  if (o.sample_length > 0) {
    print_sample(model, vocabulary, o, std::max(o.unit, o.min_rank));
    print_sample(model, vocabulary, o, o.max_rank);
  }
  return training.stopped.empty() ? 0 : 3;
}

/// What does not depend on the model is checked before any work.
void check(const Options& o) {
  if (o.layer_budget > o.max_rank) {
    throw std::invalid_argument("--layer-budget: expected at most --max-rank " + std::to_string(o.max_rank) + ", got " +
                                std::to_string(o.layer_budget));
  }
  if (o.save_rank > o.max_rank) {
    throw std::invalid_argument("--save-rank: expected at most --max-rank " + std::to_string(o.max_rank) + ", got " +
                                std::to_string(o.save_rank));
  }
  if (o.sample_length > 0 && o.prompt.empty()) throw std::invalid_argument("--prompt: expected at least one byte to continue, got none");
  if (!o.json.empty() && !std::ofstream(o.json, std::ios::app)) throw std::runtime_error("cannot write " + o.json);
  if (!o.save.empty()) {
    std::filesystem::create_directories(o.save);
    AtomicFile(std::filesystem::path(o.save) / "adapter_model.safetensors");  // whether it could be written
  }
  if (!o.save_gguf.empty()) AtomicFile(std::filesystem::path(o.save_gguf));
  make_plan(o);
  make_targets(o);
}

void check_max_rank(const Options& o, Index width) {
  if (o.max_rank > width) {
    throw std::invalid_argument("--max-rank: expected at most the width of " + std::to_string(width) + ", got " +
                                std::to_string(o.max_rank));
  }
}

/// A GPT-2 from the files in --base.
int run_pretrained(const Options& o, const CLI::App& app) {
  const pretrained::Gpt2 base(o.base);
  check_max_rank(o, base.config().width);
  if (o.context > base.config().context) {
    throw std::invalid_argument("--context: expected at most the model's " + std::to_string(base.config().context) + ", got " +
                                std::to_string(o.context));
  }
  const auto tokenizer = pretrained::Tokenizer::from_folder(o.base);
  if (tokenizer.size() > base.config().vocabulary) {
    throw std::runtime_error(o.base + ": vocab.json: expected at most the " + std::to_string(base.config().vocabulary) +
                             " tokens of config.json, got " + std::to_string(tokenizer.size()));
  }
  Rng rng(o.seed);
  const AnyModel model = adapted_as(base.adapted(adapter_options(o), make_targets(o), rng), LowRankMethod{});
  print(
      model->memory_needed(static_cast<double>(base.files().bytes() + base.converted_bytes()), o.batch * o.context, !o.checkpoint.empty()),
      base.converted_bytes() > 0 ? "converted to float, or mapped from their files" : "mapped from their files");
  const text::Corpus corpus = text::read_corpus(text_paths(o), o.context);
  Task task = make_task(corpus, tokenizer, o.context);
  std::printf("text to adapt to: %zu files, %zu bytes, %zu tokens\n", corpus.files, corpus.bytes(),
              task.training.size() + task.validation.size());
  task.identity += " of " + base.identity();
  return adapt(*model, tokenizer, task, base.parameters(), o, app);
}

/// The small model that is pretrained first.
int run_own(const Options& o, const CLI::App& app) {
  if (o.width % o.heads != 0) {
    throw std::invalid_argument("--heads: expected a divisor of --width " + std::to_string(o.width) + ", got " + std::to_string(o.heads));
  }
  check_max_rank(o, o.width);
  const text::Corpus source = text::read_corpus(o.pretrain, o.context), target = text::read_corpus(text_paths(o), o.context);
  std::printf("pretraining text: %zu files, %zu bytes; text to adapt to: %zu files, %zu bytes\n", source.files, source.bytes(),
              target.files, target.bytes());
  const text::PretrainOptions pretrain{
      .config = {.context = o.context, .width = o.width, .layers = o.layers, .heads = o.heads, .tied = !o.untied},
      .steps = o.pretrain_steps,
      .lr = o.pretrain_lr,
      .seed = o.seed};
  const text::BaseModel base = text::pretrained_base(o.base_folder, pretrain, source);
  const AnyModel model = adapt_base(base, o);
  print(model->memory_needed(sizeof(float) * static_cast<double>(2 * parameter_count(base)), o.batch * o.context, !o.checkpoint.empty()),
        "a copy adapted");
  Task task = make_task(target, Bytes{}, o.context);
  task.identity += " of " + text::base_key(pretrain, source);
  return adapt(*model, Bytes{}, task, parameter_count(base), o, app);
}

int run(const Options& given, const CLI::App& app) {
  const Options o = for_method(given, [&](const std::string& option) { return app.count(option) > 0; });
  check(o);
  text::use_threads(o.threads);
  return o.base.empty() ? run_own(o, app) : run_pretrained(o, app);
}

}  // namespace

int main(int argc, char** argv) {
  return program::run_main(argc, argv, "finetune_text", "Adapt a pretrained text model with DyLoRA or another method: one run, every rank",
                           Options{}, declare, run);
}
