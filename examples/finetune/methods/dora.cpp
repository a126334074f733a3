#include <dylora/methods/dora/dora_linear.hpp>

#include "finetune/adapted_as.hpp"
#include "finetune/methods.hpp"
#include "finetune/methods/low_rank.hpp"

namespace finetune {

AnyModel adapt_by_dora(const text::BaseModel& base, const Options& o) {
  using Linear = DoraLinear<float>;
  Rng rng(o.seed);
  return adapted_as(gpt::with_projections<Linear>(base,
                                                  [&](DenseWeight<float> weight, gpt::Place place) {
                                                    return Linear(std::move(weight), {.adapter = adapter_options(o, place)}, rng);
                                                  }),
                    Undecayed{{}, "lora_magnitude_vector"});
}

}  // namespace finetune
