#include <dylora/methods/prilora/observed.hpp>
#include <dylora/methods/prilora/proportional.hpp>
#include <dylora/methods/prilora/pruning.hpp>
#include <dylora/methods/prilora/rank_allocation.hpp>
#include <optional>

#include "finetune/adapted_as.hpp"
#include "finetune/methods.hpp"
#include "finetune/methods/low_rank.hpp"

namespace finetune {
namespace {

using Linear = dylora::Linear<float, Observed<Proportional<LowRank<float>>>>;
using Model = gpt::Gpt<float, Linear>;

struct Pruned : PlainMethod {
  std::optional<Pruning<Model>> pruning;

  void prepare(Model& model, const Options&, const Task&) { pruning.emplace(model, PruningOptions{.keeps_pruned = true}); }
  void see_gradients(Model& model, Model::Gradients& gradients) { pruning->before_step(model, gradients); }
  void after_step(Index, Model& model, const Model::Cache&) { pruning->after_step(model); }
};

}  // namespace

/// Ranks that grow with the depth, from a third of --max-rank to all of it, and an A of which half the entries end as 0.
AnyModel adapt_by_prilora(const text::BaseModel& base, const Options& o) {
  Rng rng(o.seed);
  const auto layers = static_cast<Index>(base.blocks.size());
  const std::vector<Index> ranks =
      layers > 1 ? linear_ranks(std::max<Index>(1, o.max_rank / 3), o.max_rank, layers) : std::vector<Index>{o.max_rank};
  auto model = gpt::with_projections<Linear>(base, [&](DenseWeight<float> weight, gpt::Place place) {
    LowRankOptions options = adapter_options(o, place);
    if (options.max_rank > 0) {
      options.max_rank = ranks[static_cast<std::size_t>(place.block)];
      options.alpha *= static_cast<double>(options.max_rank) / static_cast<double>(o.max_rank);  // or low ranks would be louder
    }
    return Linear(std::move(weight), {.adapter = options, .max_rank = o.max_rank}, rng);
  });
  return adapted_as(std::move(model), Pruned{});
}

}  // namespace finetune
