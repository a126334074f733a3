#ifndef DYLORA_LAYERS_DORA_OPTIONS_HPP
#define DYLORA_LAYERS_DORA_OPTIONS_HPP

namespace dylora {

/// Whether the gradient of A and B takes the norms of the corrected rows for constants, as the paper (section 4.3) and PEFT do, or goes through
/// them too. The output, its gradient in x and that of the magnitude are the same.
enum class NormGradient { detached, exact };

template <class AdapterOptions>
struct DoraOptions {
  AdapterOptions adapter = {};
  double dropout = 0;                                   ///< p in [0, 1): how often an input of the correction is dropped
  NormGradient norm_gradient = NormGradient::detached;  ///< what dA and dB are
};

}  // namespace dylora

#endif
