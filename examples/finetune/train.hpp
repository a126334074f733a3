#ifndef DYLORA_EXAMPLES_FINETUNE_TRAIN_HPP
#define DYLORA_EXAMPLES_FINETUNE_TRAIN_HPP

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <dylora/dylora.hpp>
#include <dylora/io/checkpoint/checkpoint.hpp>
#include <dylora/methods/chain/stages.hpp>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "finetune/adapted_model.hpp"
#include "finetune/options.hpp"
#include "finetune/task.hpp"
#include "text/corpus.hpp"
#include "text/progress.hpp"
#include "text/training.hpp"

namespace finetune {

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

/// What a method does besides training its parameters: nothing, unless it says otherwise by a member of the same name.
struct PlainMethod {
  /// Before the first step: what it needs from the text.
  template <class Model>
  void prepare(Model& /*model*/, const Options& /*options*/, const Task& /*task*/) {}

  /// How many of --steps are left after that.
  Index steps(const Options& options) const { return options.steps; }

  ParameterGroups groups(const Options& /*options*/) const { return {}; }

  /// The stages of the run; the learning rate, the optimiser and whatever begin_stage does begin anew with each.
  StageLengths stages(const Options& options) const { return StageLengths::equal(1, options.steps); }
  template <class Model>
  void begin_stage(Model& /*model*/, Rng& /*rng*/) {}

  /// With the gradients of a step, before they are used.
  template <class Model>
  void see_gradients(Model& /*model*/, typename Model::Gradients& /*gradients*/) {}

  template <class Model>
  void after_step(Index /*step*/, Model& /*model*/, const typename Model::Cache& /*cache*/) {}

  template <class Model>
  void finish(Model& /*model*/) {}
};

/// Weight decay leaves the parameters of this name alone: it would pull magnitudes and gains to zero.
struct Undecayed : PlainMethod {
  std::string name;

  ParameterGroups groups(const Options& /*options*/) const { return without_decay({name}); }
};

/// Trains the parameters of `model` by a method. With --checkpoint the state is kept every so many steps, and after the last; with --resume
/// the run goes on from there, bit for bit as if it had not been stopped.
template <class Model, class Method>
Training train(Model& model, Method& method, const Options& given, const nlohmann::json& used_options, const Task& task,
               typename Model::Cache& cache) {
  const auto start = std::chrono::steady_clock::now();
  Rng data_rng(given.seed + 1), rank_rng(given.seed + 2), stage_rng(given.seed + 3);
  method.prepare(model, given, task);
  Options o = given;
  o.steps = method.steps(given);
  const StageLengths stages = method.stages(o);
  const Index stage_steps = (o.steps + stages.index(o.steps - 1)) / (stages.index(o.steps - 1) + 1);
  Options of_stage = o;
  of_stage.steps = stage_steps;
  const Plan plan = make_plan(of_stage);
  auto gradients = zeros_like(model), current = gradients, good = gradients;  // good: the last parameters seen to give a finite loss
  typename Model::Workspace workspace;
  take_snapshot(model, good);
  const auto fresh_optimizer = [&] {
    return AdamW(model, {.beta2 = 0.99,
                         .weight_decay = o.weight_decay,
                         .max_norm = o.max_norm,
                         .update = o.update == "dense" ? Update::dense : Update::active_only,
                         .groups = method.groups(o)});
  };
  auto optimizer = fresh_optimizer();
  const Schedule schedule(decays.at(o.decay), {.peak = o.lr, .steps = stage_steps, .warmup_steps = std::min(o.warmup, stage_steps)});

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

  text::Progress progress(o.quiet ? "" : "adapting", o.steps, o.accumulation * o.batch * o.context, first);
  text::Batch batch;
  Index step = first;
  Training result;
  try {
    for (; step < o.steps; ++step) {
      if (step > 0 && stages.local_step(step) == 0) {
        if (!std::isfinite(text::mean_loss(model, {batch}, o.max_rank, cache))) {  // before it becomes part of what is frozen
          throw NonFiniteError("the loss after step " + std::to_string(step) + ": expected a finite number, got a NaN or an infinity");
        }
        method.begin_stage(model, stage_rng);
        optimizer = fresh_optimizer();
        take_snapshot(model, good);
      }
      Index shown = 0;
      take_snapshot(model, current);
      optimizer.set_learning_rate(schedule(stages.local_step(step)));
      const double loss = train_step(model, optimizer, gradients, [&] {
        double sum = 0;
        for (Index i = 0; i < o.accumulation; ++i) {
          text::random_batch(task.training, o.batch, o.context, data_rng, batch);
          auto groups = divide_sequences(plan(stages.local_step(step), rank_rng), o.batch);
          shown = groups.size() == 1 ? groups.front().rank.active : 0;
          for (RankGroup& group : groups) group.weight /= static_cast<double>(o.accumulation);
          sum += text::loss_and_gradients(model, batch, groups, cache, gradients, workspace);
        }
        method.see_gradients(model, gradients);
        return sum / static_cast<double>(o.accumulation);
      });
      method.after_step(step, model, cache);
      std::swap(current, good);
      progress.update(step, loss, shown);
      const Index done = step + 1;
      if (checkpoints && (done % o.checkpoint_every == 0 || done == o.steps)) checkpoints->save(done, state);
    }
  } catch (const NonFiniteError& error) {
    result.stopped = error.what();
    restore_snapshot(model, good);
    std::fprintf(stderr,
                 "\nfinetune_text: training stopped at %s\nfinetune_text: going on with the last parameters that gave a finite loss\n",
                 error.what());
  }
  method.finish(model);
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  result.tokens_per_second = progress.tokens_per_second(step);
  return result;
}

}  // namespace finetune

#endif
