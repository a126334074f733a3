#ifndef DYLORA_EXAMPLES_FINETUNE_TRAIN_HPP
#define DYLORA_EXAMPLES_FINETUNE_TRAIN_HPP

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <dylora/dylora.hpp>
#include <dylora/io/checkpoint.hpp>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "finetune/options.hpp"
#include "finetune/task.hpp"
#include "text/corpus.hpp"
#include "text/progress.hpp"
#include "text/training.hpp"

namespace finetune {

struct Training {
  double seconds = 0, tokens_per_second = 0;
  std::string stopped;  // why it ended early, if it did
};

/// Whether the trained adapter depends on an option, so that a run may only be resumed with the same.
inline bool matters_to_training(std::string_view option) {
  constexpr std::array others{"text",      "base",          "base_folder",      "pretrain", "json",       "save",      "save_gguf",
                              "save_rank", "checkpoint",    "checkpoint_every", "resume",   "validation", "tolerance", "layer_budget",
                              "prompt",    "sample_length", "temperature",      "threads",  "targets"};
  return std::find(others.begin(), others.end(), option) == others.end();
}

/// 16 and 16.0 are the same option.
inline nlohmann::json comparable(const nlohmann::json& value) {
  constexpr double largest = 0x1p53;  // above it, a number would not be the same as an integer
  if (!value.is_number_float() || std::abs(value.get<double>()) > largest || std::floor(value.get<double>()) != value.get<double>()) {
    return value;
  }
  return static_cast<std::int64_t>(value.get<double>());
}

/// Trains the adapters of `model`. With --checkpoint the state is kept every so many steps, and after the last; with --resume the run goes on
/// from there, bit for bit as if it had not been stopped.
template <class Model>
Training train(Model& model, const Options& o, const nlohmann::json& used_options, const Plan& plan, const Task& task,
               typename Model::Cache& cache) {
  Rng data_rng(o.seed + 1), rank_rng(o.seed + 2);
  auto gradients = zeros_like(model), current = gradients, good = gradients;  // good: the last parameters seen to give a finite loss
  save_parameters(model, good);
  AdamW optimizer(model, {.beta2 = 0.99,
                          .weight_decay = o.weight_decay,
                          .max_norm = o.max_norm,
                          .update = o.update == "dense" ? Update::dense : Update::active_only});
  const Schedule schedule(decays.at(o.decay), {.peak = o.lr, .steps = o.steps, .warmup_steps = std::min(o.warmup, o.steps)});

  const auto state = [&](auto& archive) {
    archive.parameters("model", model);
    archive.template parameters<Model>("last good model", good);
    archive("optimizer", optimizer);
    archive("data_rng", data_rng);
    archive("rank_rng", rank_rng);
    archive.same("text and base", task.identity);
    archive.same("--targets", target_letters(o));
    for (const auto& [key, value] : used_options.items()) {
      std::string name = "--" + key;
      std::replace(name.begin(), name.end(), '_', '-');
      if (matters_to_training(key)) archive.same(name, comparable(value));
    }
  };
  std::optional<Checkpoints> checkpoints;
  Index first = 0;
  if (!o.checkpoint.empty()) {
    checkpoints.emplace(o.checkpoint);
    if (!o.resume && !checkpoints->empty()) {
      throw std::runtime_error(o.checkpoint +
                               ": expected a folder without checkpoints, got some of an earlier run; --resume goes on with it");
    }
    if (const auto loaded = checkpoints->load(state)) {
      first = loaded->step;
      for (const std::string& reason : loaded->refused) std::fprintf(stderr, "finetune_text: passed over %s\n", reason.c_str());
      std::printf("resumed after step %td from %s\n", first, loaded->path.string().c_str());
    }
  }

  text::Progress progress("adapting", o.steps, o.accumulation * o.batch * o.context, first);
  text::Batch batch;
  Index step = first;
  Training result;
  try {
    for (; step < o.steps; ++step) {
      Index shown = 0;
      save_parameters(model, current);
      optimizer.set_learning_rate(schedule(step));
      const double loss = train_step(model, optimizer, gradients, [&] {
        double sum = 0;
        for (Index i = 0; i < o.accumulation; ++i) {
          text::random_batch(task.training, o.batch, o.context, data_rng, batch);
          auto groups = divide(plan(step, rank_rng), o.batch);
          shown = groups.size() == 1 ? groups.front().rank.active : 0;
          for (RankGroup& group : groups) group.weight /= static_cast<double>(o.accumulation);
          sum += text::loss_and_gradients(model, batch, groups, cache, gradients);
        }
        return sum / static_cast<double>(o.accumulation);
      });
      std::swap(current, good);
      progress.update(step, loss, shown);
      const Index done = step + 1;
      if (checkpoints && (done % o.checkpoint_every == 0 || done == o.steps)) checkpoints->save(done, state);
    }
  } catch (const NonFiniteError& error) {
    result.stopped = error.what();
    restore_parameters(model, good);
    std::fprintf(stderr,
                 "\nfinetune_text: training stopped at %s\nfinetune_text: going on with the last parameters that gave a finite loss\n",
                 error.what());
  }
  result.seconds = progress.seconds();
  result.tokens_per_second = progress.tokens_per_second(step);
  return result;
}

}  // namespace finetune

#endif
