#include <dylora/methods/nola/nola.hpp>

#include "finetune/adapted_as.hpp"
#include "finetune/methods.hpp"
#include "finetune/methods/low_rank.hpp"

namespace finetune {

AnyModel adapt_by_nola(const text::BaseModel& base, const Options& o) {
  using Linear = dylora::Linear<float, Nola<float>>;
  Rng rng(o.seed);
  return adapted_as(gpt::with_projections<Linear>(base, [&](DenseWeight<float> weight, gpt::Place place) {
    const LowRankOptions one = adapter_options(o, place);
    const Index as_low_rank = std::max<Index>(1, one.max_rank * (weight.rows() + weight.cols()) / 2);
    const NolaOptions options{
        .max_rank = one.max_rank, .bases = o.bases > 0 ? o.bases : as_low_rank, .alpha = one.alpha, .scale = one.scale};
    return Linear(std::move(weight), options, rng);
  }));
}

}  // namespace finetune
