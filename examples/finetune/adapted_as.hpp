#ifndef DYLORA_EXAMPLES_FINETUNE_ADAPTED_AS_HPP
#define DYLORA_EXAMPLES_FINETUNE_ADAPTED_AS_HPP

#include <cstdio>
#include <dylora/dylora.hpp>
#include <dylora/io/gguf/adapter.hpp>
#include <dylora/io/parameters_file.hpp>
#include <dylora/io/peft/peft.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "finetune/adapted_model.hpp"
#include "finetune/train.hpp"
#include "text/training.hpp"

namespace finetune {

/// The model and the method of one type each.
template <class Model, class Method>
class AdaptedAs final : public AdaptedModel {
 public:
  AdaptedAs(Model model, Method method) : model_(std::move(model)), method_(std::move(method)) {}

  Index max_rank() const override { return model_.max_rank(); }
  Index trained_parameters() const override {
    if constexpr (requires { method_.trained_before(); }) return parameter_count(model_) + method_.trained_before();
    return parameter_count(model_);
  }
  Memory memory_needed(double base_bytes, Index tokens, bool checkpoints) const override {
    return finetune::memory_needed(model_, base_bytes, tokens, checkpoints);
  }

  Training train(const Options& options, const nlohmann::json& used_options, const Task& task) override {
    return finetune::train(model_, method_, options, used_options, task, cache_);
  }

  double loss(const std::vector<text::Batch>& batches, RankSlice rank) override { return text::mean_loss(model_, batches, rank, cache_); }
  RankCurve rank_curve(const std::vector<text::Batch>& batches, Index highest) override {
    return text::rank_curve(model_, batches, highest, cache_);
  }

  nlohmann::json choose_layer_ranks(const Options& o, const std::vector<text::Batch>& seen) override {
    const auto adapters = adapter_ranks(model_);
    const RankSearch search = search_ranks(model_, {.budget = total_cost(adapters, o.layer_budget, parameters_per_component)},
                                           [&] { return loss(seen, o.max_rank); });
    truncate_each(model_, search.best.ranks);
    nlohmann::json ranks;
    for (std::size_t i = 0; i < adapters.size(); ++i) ranks[adapters[i].name] = search.best.ranks[i];
    return ranks;
  }

  void save(const Options& o) const override {
    const Index rank = o.save_rank > 0 ? o.save_rank : model_.max_rank();
    const auto report = [&](const std::vector<AdapterScale>& saved, const std::string& where) {
      std::printf("\nsaved in %s:\n", where.c_str());
      for (const AdapterScale& module : saved) {
        if (module.rank > 0) std::printf("  %-36s rank %3td  scale %g\n", module.name.c_str(), module.rank, module.scale);
      }
    };
    if (!o.save.empty() && !has_peft_files()) {
      const std::string path = o.save + "/adapter.safetensors";
      save_parameters(path, model_, rank);
      std::printf("\nsaved in %s\n", path.c_str());
    } else if (!o.save.empty()) {
      const bool gpt2 = !o.base.empty();
      report(
          save_peft(
              o.save, model_, rank,
              {.prefix = "transformer", .fan_in_fan_out = gpt2, .base_model_name_or_path = o.base, .task_type = gpt2 ? "CAUSAL_LM" : ""}),
          o.save);
    }
    if (!o.save_gguf.empty()) report(save_gguf(o.save_gguf, model_, rank, {.architecture = "gpt2", .name = gguf_gpt2_name}), o.save_gguf);
  }

  std::vector<Index> continue_text(const std::vector<Index>& prompt, Index length, double temperature, RankSlice rank,
                                   Rng& rng) const override {
    return text::continue_text(model_, prompt, length, temperature, rank, rng);
  }

  std::vector<MatrixX<float>> merged(RankSlice rank) const override {
    std::vector<MatrixX<float>> weights;
    for_each_layer(model_, [&](std::string_view, const auto& layer) {
      if constexpr (requires { layer.merged(rank).W; }) {
        if (layer.max_rank() > 0) weights.push_back(layer.merged(rank.at_most(layer.max_rank())).W);
      }
    });
    return weights;
  }

 private:
  /// Whether all that is trained has a place in PEFT's files: low-rank products of layers, with or without magnitudes.
  bool has_peft_files() const {
    bool portable = true;
    Index in_layers = 0;
    for_each_layer(model_, [&](std::string_view, const auto& layer) {
      if constexpr (!PortableAdapter<std::remove_cvref_t<decltype(layer.adapter)>>) portable = portable && parameter_count(layer) == 0;
      in_layers += parameter_count(layer);
    });
    return portable && in_layers == parameter_count(model_);
  }

  Model model_;
  Method method_;
  typename Model::Cache cache_;
};

template <class Model, class Method = PlainMethod>
AnyModel adapted_as(Model model, Method method = {}) {
  return std::make_unique<AdaptedAs<Model, Method>>(std::move(model), std::move(method));
}

}  // namespace finetune

#endif
