#ifndef DYLORA_TRAIN_ADAMW_HPP
#define DYLORA_TRAIN_ADAMW_HPP

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string_view>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"
#include "dylora/train/optimizer.hpp"
#include "dylora/train/parameter_groups.hpp"

namespace dylora {

struct AdamWOptions {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;              ///< decoupled: p loses lr · weight_decay · p per step
  double max_norm = 0;                  ///< the global gradient norm is clipped to this; 0 means never
  Update update = Update::active_only;  ///< what happens to components that took no part
  ParameterGroups groups = {};          ///< by parameter: another lr, no decay (train/parameter_groups.hpp)
};

namespace detail {

struct AdamWFormula {
  using Options = AdamWOptions;
  static constexpr std::string_view name = "AdamW";
  static constexpr std::array<std::string_view, 2> moments{"m", "v"};

  static void require(const Options& options) {
    require_option(options.beta1 >= 0 && options.beta1 < 1, options.beta1, "AdamW: beta1", "a number in [0, 1)");
    require_option(options.beta2 >= 0 && options.beta2 < 1, options.beta2, "AdamW: beta2", "a number in [0, 1)");
    require_option(options.eps > 0 && std::isfinite(options.eps), options.eps, "AdamW: eps", "a finite number > 0");
  }

  static void same(auto& archive, const Options& options) {
    archive.same("beta1", options.beta1);
    archive.same("beta2", options.beta2);
    archive.same("eps", options.eps);
  }

  template <class S>
  static void update(const Options& options, const ElementUpdate& of, Index size, S* parameters, const S* gradients, S* first, S* second) {
    const double beta1 = options.beta1, beta2 = options.beta2;
    const auto t = static_cast<double>(of.count);
    const S step_size = static_cast<S>(of.lr / (1 - std::pow(beta1, t)));
    const S inverse_root = static_cast<S>(1 / std::sqrt(1 - std::pow(beta2, t)));
    Span<S> p(parameters, size), m(first, size), v(second, size);
    const ConstSpan<S> g(gradients, size);
    m = S(beta1) * m + S((1 - beta1) * of.clip) * g;
    v = S(beta2) * v + S((1 - beta2) * of.clip * of.clip) * g.square();
    p = S(1 - of.lr * of.weight_decay) * p -
        step_size * m / (v.sqrt() * inverse_root + std::max(S(options.eps), std::numeric_limits<S>::min()));
  }
};

}  // namespace detail

/// m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   p ← (1 − lr · λ) p − lr · m̂ / (√v̂ + ε)
///
/// AdamW (Loshchilov and Hutter, arXiv 1711.05101), computed as torch.optim.AdamW does, over anything Trainable:
///
///     AdamW optimizer(layer, {.lr = 1e-3, .max_norm = 1});
///     optimizer.step(layer, gradients);
///
/// With `active_only`, a step updates exactly the rank components that the gradients say were trained, and each has its own bias
/// correction: a component drawn for the first time at step 100 is at its first step. `dense` is what one gets from a framework whose
/// inactive components have a zero gradient.
template <Trainable T>
class AdamW : public Optimizer<T, detail::AdamWFormula> {
 public:
  /// Throws std::invalid_argument if an option is out of its range.
  explicit AdamW(const T& trained, AdamWOptions options = {}) : Optimizer<T, detail::AdamWFormula>(trained, options) {}
};

}  // namespace dylora

#endif
