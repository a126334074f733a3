#include <dylora/methods/multilora.hpp>

#include "finetune/adapted_as.hpp"
#include "finetune/methods.hpp"
#include "finetune/methods/low_rank.hpp"

namespace finetune {

AnyModel adapt_by_multilora(const text::BaseModel& base, const Options& o) {
  using Linear = dylora::Linear<float, MultiLora<float>>;
  Rng rng(o.seed);
  return adapted_as(gpt::with_projections<Linear>(
                        base,
                        [&](DenseWeight<float> weight, gpt::Place place) {
                          const LowRankOptions one = adapter_options(o, place);
                          return Linear(std::move(weight),
                                        {.max_rank = one.max_rank, .modules = o.modules, .alpha = one.alpha, .scale = one.scale}, rng);
                        }),
                    Undecayed{{}, "multilora_gain"});
}

}  // namespace finetune
