#ifndef DYLORA_EXAMPLES_FINETUNE_METHODS_HPP
#define DYLORA_EXAMPLES_FINETUNE_METHODS_HPP

#include "finetune/adapted_model.hpp"
#include "finetune/options.hpp"
#include "text/base_model.hpp"

/// The methods of --method. Each is a file in methods/, so that they are compiled beside each other.
namespace finetune {

/// A base with fresh adapters of options.method.
AnyModel adapt_base(const text::BaseModel& base, const Options& options);

/// The options as the method wants them, unless the command line says otherwise: LoRA trains at --max-rank alone, rsLoRA divides α by √b.
Options for_method(Options options, bool has_sampler, bool has_scale);

AnyModel adapt_by_low_rank(const text::BaseModel& base, const Options& options);  ///< dylora, lora, rslora, lora+, periodic, adalora
AnyModel adapt_by_dora(const text::BaseModel& base, const Options& options);
AnyModel adapt_by_reslora(const text::BaseModel& base, const Options& options);
AnyModel adapt_by_chain(const text::BaseModel& base, const Options& options);
AnyModel adapt_by_multilora(const text::BaseModel& base, const Options& options);
AnyModel adapt_by_nola(const text::BaseModel& base, const Options& options);
AnyModel adapt_by_prilora(const text::BaseModel& base, const Options& options);
AnyModel adapt_by_flow(const text::BaseModel& base, const Options& options);
AnyModel adapt_by_init(const text::BaseModel& base, const Options& options);  ///< pissa, olora
AnyModel adapt_embedding(const text::BaseModel& base, const Options& options);

}  // namespace finetune

#endif
