#include <dylora/methods/reslora/link.hpp>
#include <dylora/methods/reslora/shortcut.hpp>

#include "finetune/adapted_as.hpp"
#include "finetune/methods.hpp"
#include "finetune/methods/low_rank.hpp"

namespace finetune {

/// With block shortcuts, the form that can be merged exactly.
AnyModel adapt_by_reslora(const text::BaseModel& base, const Options& o) {
  using Linear = ResidualLink<float, Shortcut::block>;
  Rng rng(o.seed);
  return adapted_as(gpt::with_projections<Linear>(base, [&](DenseWeight<float> weight, gpt::Place place) {
    return Linear(std::move(weight), {.adapter = adapter_options(o, place), .position = place.block}, rng);
  }));
}

}  // namespace finetune
