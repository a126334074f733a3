#ifndef DYLORA_BENCHMARKS_GPT_STEP_STEP_HPP
#define DYLORA_BENCHMARKS_GPT_STEP_STEP_HPP

#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <dylora/dylora.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gpt/gpt.hpp"
#include "text/corpus.hpp"

namespace gpt_step {

using namespace dylora;

/// What is trained on what, the same for all contenders.
struct Task {
  gpt::Config config;
  Index windows = 32, max_rank = 8;
  std::uint64_t seed = 1;

  Index tokens() const { return windows * config.context; }
  std::string name() const { return std::to_string(config.width) + " x " + std::to_string(config.layers); }

  /// The same as a request to torch_peer.py.
  nlohmann::json request(const std::string& what, int threads) const {
    return {{"do", what},
            {"vocabulary", config.vocabulary},
            {"context", config.context},
            {"width", config.width},
            {"layers", config.layers},
            {"heads", config.heads},
            {"windows", windows},
            {"max_rank", max_rank},
            {"seed", seed},
            {"threads", threads}};
  }
};

/// What some training steps took and gave.
struct Trained {
  double seconds;  ///< of one step
  std::vector<double> losses;
};

constexpr std::array parts{"forward", "loss", "backward", "optimizer"};

/// A DyLoRA training step of examples/gpt on a batch of random bytes.
class Step {
 public:
  using Model = gpt::Gpt<float>;

  explicit Step(const Task& task) : Step(task, Rng(task.seed)) {}

  double operator()(RankSlice rank) {
    auto last = Clock::now();
    const auto lap = [&](std::size_t part) {
      const auto now = Clock::now();
      part_seconds[part] += std::chrono::duration<double>(now - last).count();
      last = now;
    };
    set_zero(model_, gradients_);
    lap(3);
    model_.forward(batch_.tokens, batch_.sequences, rank, cache_);
    lap(0);
    auto logits = cache_.logits.view();
    const double loss = cross_entropy<float>(logits, batch_.targets, logits);
    lap(1);
    model_.backward(logits, cache_, gradients_, workspace_);
    lap(2);
    optimizer_.step(model_, gradients_);
    lap(3);
    return loss;
  }

  /// A step at each of these ranks.
  Trained train(const std::vector<Index>& ranks) {
    Trained result;
    const auto begin = Clock::now();
    for (const Index rank : ranks) result.losses.push_back((*this)(rank));
    result.seconds = std::chrono::duration<double>(Clock::now() - begin).count() / static_cast<double>(ranks.size());
    return result;
  }

  std::array<double, parts.size()> part_seconds{};  ///< of all steps so far

 private:
  using Clock = std::chrono::steady_clock;

  Step(const Task& task, Rng rng) : model_(random_model(task, rng)) {
    batch_.sequences = Sequences::equal(task.windows, task.config.context);
    for (auto* bytes : {&batch_.tokens, &batch_.targets}) {
      for (Index i = 0; i < task.tokens(); ++i) bytes->push_back(rng.below(task.config.vocabulary));
    }
  }

  /// B is drawn, too, since A has no gradient while B is zero.
  static Model random_model(const Task& task, Rng& rng) {
    Model model = gpt::adapted(gpt::random_gpt<float>(task.config, rng), {.max_rank = task.max_rank, .alpha = 16}, rng);
    for_each_parameter(
        [&](Parameter parameter, auto& p) {
          if (parameter.rank_axis == RankAxis::cols) p = random_uniform<float>(p.rows(), p.cols(), 0.02 * std::sqrt(3.0), rng);
        },
        model);
    return model;
  }

  Model model_;
  Model::Gradients gradients_ = zeros_like(model_);
  Model::Cache cache_;
  Model::Workspace workspace_;
  AdamW<Model> optimizer_{model_, {.lr = 1e-3, .max_norm = 1, .update = Update::dense}};  // dense: what PyTorch does
  text::Batch batch_;
};

}  // namespace gpt_step

#endif
