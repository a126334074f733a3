#ifndef DYLORA_EXAMPLES_FINETUNE_ADAPTED_MODEL_HPP
#define DYLORA_EXAMPLES_FINETUNE_ADAPTED_MODEL_HPP

#include <dylora/dylora.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "finetune/memory.hpp"
#include "finetune/options.hpp"
#include "finetune/task.hpp"
#include "text/corpus.hpp"

namespace finetune {

struct Training {
  double seconds = 0, tokens_per_second = 0;
  std::string stopped;  // why it ended early, if it did
};

/// A text model that is adapted by some method, whatever the types of its parts.
class AdaptedModel {
 public:
  virtual ~AdaptedModel() = default;

  /// The largest rank that it can be asked for.
  virtual Index max_rank() const = 0;
  /// By the whole run, also what is frozen at its end.
  virtual Index trained_parameters() const = 0;
  virtual Memory memory_needed(double base_bytes, Index tokens, bool checkpoints) const = 0;

  /// `used_options` are what a checkpoint must have been made with.
  virtual Training train(const Options& options, const nlohmann::json& used_options, const Task& task) = 0;

  /// The mean next-token loss at a rank, in nats.
  virtual double loss(const std::vector<text::Batch>& batches, RankSlice rank) = 0;
  virtual RankCurve rank_curve(const std::vector<text::Batch>& batches, Index highest) = 0;

  /// Cuts the adapters to ranks of their own that have the parameters of --layer-budget for all together and lose least on `seen`. The
  /// model goes on serving every rank, each adapter with what it kept. Returns the ranks by name.
  virtual nlohmann::json choose_layer_ranks(const Options& options, const std::vector<text::Batch>& seen) = 0;

  /// In the files of --save and --save-gguf.
  virtual void save(const Options& options) const = 0;

  virtual std::vector<Index> continue_text(const std::vector<Index>& prompt, Index length, double temperature, RankSlice rank,
                                           Rng& rng) const = 0;

  /// The matrix of each adapted projection at a rank, where the method can be merged: what a spectrum is taken of.
  virtual std::vector<MatrixX<float>> merged(RankSlice rank) const = 0;
};

using AnyModel = std::unique_ptr<AdaptedModel>;

}  // namespace finetune

#endif
