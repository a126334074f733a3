#include <dylora/methods/pissa/init.hpp>
#include <dylora/methods/pissa/offset_low_rank.hpp>

#include "finetune/adapted_as.hpp"
#include "finetune/methods.hpp"
#include "finetune/methods/low_rank.hpp"

namespace finetune {

AnyModel adapt_by_init(const text::BaseModel& base, const Options& o) {
  using Linear = dylora::Linear<float, OffsetLowRank<float>>;
  return adapted_as(gpt::with_projections<Linear>(base, [&](DenseWeight<float> weight, gpt::Place place) {
    const LowRankOptions options = adapter_options(o, place);
    auto adapter = o.method == "pissa" ? pissa_init<float>(weight.W, options) : olora_init<float>(weight.W, options);
    return Linear(std::move(weight), std::move(adapter));
  }));
}

}  // namespace finetune
