#ifndef DYLORA_EXAMPLES_FINETUNE_METHODS_HPP
#define DYLORA_EXAMPLES_FINETUNE_METHODS_HPP

#include <functional>
#include <string>

#include "finetune/adapted_model.hpp"
#include "finetune/options.hpp"
#include "text/base_model.hpp"

/// The methods of --method. Each is a file in methods/, so that they are compiled beside each other.
namespace finetune {

/// A base with fresh adapters of options.method.
AnyModel adapt_base(const text::BaseModel& base, const Options& options);

/// The options as the method has them: LoRA, AdaLoRA's importance and LoRA-Flow train at --max-rank alone, rsLoRA divides α by √b. Throws
/// std::invalid_argument for what the method does not go with; is_given says whether the command line has an option.
Options for_method(Options options, const std::function<bool(const std::string&)>& is_given);

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
