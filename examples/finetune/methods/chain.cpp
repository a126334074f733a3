#include <dylora/methods/chain/chain.hpp>
#include <dylora/methods/chain/stages.hpp>

#include "finetune/adapted_as.hpp"
#include "finetune/methods.hpp"
#include "finetune/methods/low_rank.hpp"

namespace finetune {
namespace {

/// Chain of LoRA with its links kept apart, so that the whole chain still works at every rank.
struct Links : PlainMethod {
  StageLengths stages(const Options& o) const { return StageLengths::equal(o.links, o.steps); }
  template <class Model>
  void begin_stage(Model& model, Rng& rng) {
    for_each_layer(model, [&](std::string_view, auto& layer) { layer.adapter.extend(rng); });
  }
};

}  // namespace

AnyModel adapt_by_chain(const text::BaseModel& base, const Options& o) {
  using Linear = dylora::Linear<float, Chain<LowRank<float>>>;
  Rng rng(o.seed);
  auto model = gpt::with_projections<Linear>(
      base, [&](DenseWeight<float> weight, gpt::Place place) { return Linear(std::move(weight), adapter_options(o, place), rng); });
  return adapted_as(std::move(model), Links{});
}

}  // namespace finetune
