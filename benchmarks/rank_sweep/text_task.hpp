#ifndef DYLORA_BENCHMARKS_RANK_SWEEP_TEXT_TASK_HPP
#define DYLORA_BENCHMARKS_RANK_SWEEP_TEXT_TASK_HPP

#include <chrono>
#include <cstdint>
#include <dylora/dylora.hpp>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "gpt/gpt.hpp"
#include "rank_sweep/contender.hpp"
#include "rank_sweep/train.hpp"
#include "text/base_model.hpp"
#include "text/corpus.hpp"
#include "text/training.hpp"

namespace rank_sweep {

/// The text model: a pretrained base, text to adapt it to, and held-out text in two halves. On one half every choice is made (learning
/// rates, ranks of layers); on the other everything is judged.
struct TextTask {
  using Model = gpt::Gpt<float>;

  text::BaseModel base;
  text::Corpus corpus;
  Index windows;  ///< of a training batch
  std::vector<text::Batch> choosing, judging;

  TextTask(text::BaseModel base_, text::Corpus corpus_, Index windows_, Index validation)
      : base(std::move(base_)), corpus(std::move(corpus_)), windows(windows_) {
    const auto batches = text::spread_batches(corpus.validation, validation, 16, base.config.context);
    require_in_range(static_cast<Index>(batches.size()), 2, std::numeric_limits<Index>::max(), "TextTask: batches of held-out text");
    for (std::size_t i = 0; i < batches.size(); ++i) (i % 2 == 0 ? choosing : judging).push_back(batches[i]);
  }

  Model adapted(const Contender& contender, std::uint64_t seed) const {
    Rng rng(1000 * seed);
    return gpt::adapted(base, {.max_rank = contender.max_rank, .alpha = alpha, .scale = contender.scale}, rng);
  }
};

/// The losses at ranks 1, 2, … of one trained contender on each half, and what the training took.
struct TextRun {
  std::vector<double> choosing, judging;
  double seconds = 0;
  double flops = 0;
};

/// −Σ p log q over the bytes, p what the teacher's logits say: the mean over tokens; the logits become its gradient times the weight.
inline double soft_cross_entropy(MatrixRef<float> logits, ConstMatrixRef<float> teacher, double weight) {
  double sum = 0;
  const auto log_softmax = [](const auto& column) {
    const Eigen::ArrayXd shifted = column.template cast<double>().array() - static_cast<double>(column.maxCoeff());
    return Eigen::ArrayXd(shifted - std::log(shifted.exp().sum()));
  };
  for (Index i = 0; i < logits.cols(); ++i) {
    const Eigen::ArrayXd p = log_softmax(teacher.col(i)).exp(), q = log_softmax(logits.col(i));
    sum -= (p * q).sum();
    logits.col(i) = ((q.exp() - p) * (weight / static_cast<double>(logits.cols()))).cast<float>().matrix();
  }
  return sum / static_cast<double>(logits.cols());
}

/// The groups below the highest rank learn what that rank says about their windows.
inline double distilled_step(const TextTask::Model& model, const text::Batch& batch, const std::vector<RankGroup>& groups,
                             TextTask::Model::Cache& cache, TextTask::Model::Cache& teacher, TextTask::Model::Gradients& gradients,
                             TextTask::Model::Workspace& workspace) {
  model.forward(batch.tokens, batch.sequences, model.max_rank(), teacher);
  model.forward(batch.tokens, batch.sequences, batch_ranks(groups, batch.sequences), cache);
  auto logits = cache.logits.view();
  const Index top_columns = groups.front().rank.active == model.max_rank() ? batch.sequences.begin(groups.front().count) : 0;
  const double loss = weighted_loss(groups, batch.sequences, [&](Index begin, Index count, double weight) {
    auto part = logits.middleCols(begin, count);
    const auto targets = std::span(batch.targets).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count));
    return begin < top_columns ? cross_entropy<float>(part, targets, part, {.weight = weight})
                               : soft_cross_entropy(part, teacher.logits.view().middleCols(begin, count), weight);
  });
  model.backward(logits, cache, gradients, workspace);
  return loss;
}

/// Flops of one token at `rank`, forward and backward: two per parameter and token in each product, no gradient for what is frozen.
inline double flops_per_token(const TextTask::Model& model, Index rank) {
  const gpt::Config& c = model.config;
  const auto width = static_cast<double>(c.width), layers = static_cast<double>(c.layers), seen = static_cast<double>(c.context + 1) / 2;
  const double projections = 12 * width * width * layers, head = width * static_cast<double>(c.vocabulary);
  const double adapters = total_cost(adapter_ranks(model), rank, parameters_per_component);
  return 4 * (projections + head) + 14 * width * seen * layers + 6 * adapters;
}

inline std::vector<double> losses_per_rank(const TextTask::Model& model, const std::vector<text::Batch>& batches,
                                           TextTask::Model::Cache& cache) {
  std::vector<double> losses;
  for (Index rank = 1; rank <= model.max_rank(); ++rank) losses.push_back(text::mean_loss(model, batches, rank, cache));
  return losses;
}

/// The trained model, or nothing if training diverged. Adds to what it took.
inline std::optional<TextTask::Model> train_text(const TextTask& task, const Contender& contender, double lr, std::uint64_t seed,
                                                 TextRun& taken) {
  auto model = task.adapted(contender, seed);
  auto gradients = zeros_like(model);
  TextTask::Model::Cache cache, teacher;
  TextTask::Model::Workspace workspace;
  text::Batch batch;
  Rng data_rng(1000 * seed + 1), rank_rng(1000 * seed + 2);
  const auto context = static_cast<double>(task.base.config.context);
  std::vector<double> flops{0};
  for (Index rank = 1; rank <= model.max_rank(); ++rank) flops.push_back(flops_per_token(model, rank));
  bool finite = true;
  const auto start = std::chrono::steady_clock::now();
  try {
    train(model, contender, lr, rank_rng, gradients, [&](const StepRanks& ranks) {
      text::random_batch(task.corpus.training, task.windows, task.base.config.context, data_rng, batch);
      const auto groups = divide_sequences(ranks, task.windows);
      for (const RankGroup& group : groups) {
        taken.flops += static_cast<double>(group.count) * context * flops[static_cast<std::size_t>(group.rank.active)];
      }
      if (contender.distilled) taken.flops += static_cast<double>(task.windows) * context * flops.back() / 2;  // the teacher's forward
      return contender.distilled ? distilled_step(model, batch, groups, cache, teacher, gradients, workspace)
                                 : text::loss_and_gradients(model, batch, groups, cache, gradients, workspace);
    });
  } catch (const NonFiniteError&) {
    finite = false;
  }
  taken.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (!finite) return std::nullopt;
  return model;
}

/// Trains and evaluates; a run that diverged has infinite losses.
inline TextRun run_text(const TextTask& task, const Contender& contender, double lr, std::uint64_t seed) {
  TextRun run;
  const auto model = train_text(task, contender, lr, seed, run);
  if (!model) {
    run.choosing = run.judging = std::vector<double>(static_cast<std::size_t>(contender.max_rank), std::numeric_limits<double>::infinity());
    return run;
  }
  TextTask::Model::Cache cache;
  run.choosing = losses_per_rank(*model, task.choosing, cache);
  run.judging = losses_per_rank(*model, task.judging, cache);
  return run;
}

}  // namespace rank_sweep

#endif
