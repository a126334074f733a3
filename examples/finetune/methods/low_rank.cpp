#include "finetune/methods/low_rank.hpp"

#include <dylora/methods/adalora/importance.hpp>
#include <dylora/methods/chain/fold.hpp>
#include <dylora/methods/chain/stages.hpp>
#include <optional>

#include "finetune/adapted_as.hpp"
#include "finetune/methods.hpp"

namespace finetune {
namespace {

/// PeriodicLoRA: from time to time the adapters become part of the weights and begin afresh.
struct Periodic : PlainMethod {
  StageLengths stages(const Options& o) const {
    if (o.interval == 0) return StageLengths::equal(std::min<Index>(4, o.steps), o.steps);
    std::vector<Index> lengths(static_cast<std::size_t>(o.steps / o.interval), o.interval);
    if (o.steps % o.interval > 0) lengths.push_back(o.steps % o.interval);
    return StageLengths(lengths);
  }
  template <class Model>
  void begin_stage(Model& model, Rng& rng) {
    fold(model, model.max_rank(), rng);
  }
};

/// A plain LoRA whose components are ordered, once it is trained, by AdaLoRA's importance.
struct ByImportance : PlainMethod {
  using Model = gpt::Gpt<float>;

  std::optional<ImportanceTracker<Model>> importance;

  void prepare(Model& model, const Options&, const Task&) { importance.emplace(model); }
  void see_gradients(Model& model, Model::Gradients& gradients) { importance->update(model, gradients); }
  void finish(Model& model) { permute_components(model, importance->order(model)); }
};

}  // namespace

AnyModel adapt_by_low_rank(const text::BaseModel& base, const Options& o) {
  Rng rng(o.seed);
  auto model = gpt::adapted(base, adapter_options(o), rng, make_targets(o));
  if (o.method == "periodic") return adapted_as(std::move(model), Periodic{});
  if (o.method == "adalora") return adapted_as(std::move(model), ByImportance{});
  return adapted_as(std::move(model), LowRankMethod{});
}

}  // namespace finetune
