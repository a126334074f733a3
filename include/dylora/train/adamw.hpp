#ifndef DYLORA_TRAIN_ADAMW_HPP
#define DYLORA_TRAIN_ADAMW_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <type_traits>

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
  ParameterGroups groups = {};          ///< by name: another lr, no decay (train/parameter_groups.hpp)
};

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
class AdamW {
 public:
  /// Throws std::invalid_argument if an option is out of its range.
  explicit AdamW(const T& trained, AdamWOptions options = {})
      : options_(options),
        m_(zeros_like(trained)),
        v_(zeros_like(trained)),
        counters_(trained, options.update),
        groups_(trained, options.groups, "AdamW") {
    require_learning_rate(options.lr);
    require_option(options.beta1 >= 0 && options.beta1 < 1, options.beta1, "AdamW: beta1", "a number in [0, 1)");
    require_option(options.beta2 >= 0 && options.beta2 < 1, options.beta2, "AdamW: beta2", "a number in [0, 1)");
    require_option(options.eps > 0 && std::isfinite(options.eps), options.eps, "AdamW: eps", "a finite number > 0");
    require_option(options.weight_decay >= 0 && std::isfinite(options.weight_decay), options.weight_decay, "AdamW: weight_decay",
                   "a finite number ≥ 0");
    require_option(options.max_norm >= 0, options.max_norm, "AdamW: max_norm", "a number ≥ 0, where 0 means no clipping");
  }

  const AdamWOptions& options() const { return options_; }
  Index steps() const { return steps_; }

  void set_learning_rate(double lr) {
    require_learning_rate(lr);
    options_.lr = lr;
  }

  /// Moves the parameters of `trained`. Throws, with nothing changed, ShapeError if gradients or moments do not have its shapes and
  /// NonFiniteError if a gradient is not finite. Reads and writes the updated components only.
  void step(T& trained, const typename T::Gradients& gradients) {
    require_shapes(trained, "AdamW: gradient of", gradients);
    require_shapes(trained, "AdamW: moments of", m_, v_);
    const double clip = detail::clip_factor(trained, gradients, options_.max_norm, "AdamW: step " + std::to_string(steps_));
    ++steps_;
    std::size_t index = 0;
    T::zip_parameters(
        [&](Parameter parameter, auto& p, const auto& g, auto& m, auto& v) {
          const ParameterGroup& group = groups_[index];
          counters_.for_each_updated_block(index++, parameter.rank_axis, g, [&](Index count, Index begin, Index end) {
            const auto block = [&](auto& matrix) { return detail::component_block(parameter.rank_axis, matrix, begin, end); };
            detail::for_each_span([&](Index size, auto*... values) { update(size, values..., count, clip, group); }, block(p), block(g),
                                  block(m), block(v));
          });
        },
        trained, gradients, m_, v_);
  }

  /// What a checkpoint keeps of it (io/checkpoint/checkpoint.hpp). The learning rate is part of the state, since schedules set it; the other options
  /// must be the same.
  template <class Archive>
  void state(Archive& archive) {
    archive.same("method", "AdamW");
    archive.same("beta1", options_.beta1);
    archive.same("beta2", options_.beta2);
    archive.same("eps", options_.eps);
    archive.same("weight_decay", options_.weight_decay);
    archive.same("max_norm", options_.max_norm);
    archive.same("update", detail::name_of(options_.update));
    archive("lr", options_.lr, require_learning_rate);
    archive("steps", steps_, detail::require_step_count);
    archive.template parameters<T>("m", m_);
    archive.template parameters<T>("v", v_);
    archive("counters", counters_);
    archive("groups", groups_);
  }

 private:
  static void require_learning_rate(double lr) { require_option(lr >= 0 && std::isfinite(lr), lr, "AdamW: lr", "a finite number ≥ 0"); }

  template <class S>
  void update(Index size, S* parameters, const S* gradients, S* moments, S* squares, Index count, double clip,
              const ParameterGroup& group) const {
    const double beta1 = options_.beta1, beta2 = options_.beta2, lr = options_.lr * group.lr_ratio;
    const double weight_decay = group.decays ? options_.weight_decay : 0;
    const auto t = static_cast<double>(count);
    const S step_size = static_cast<S>(lr / (1 - std::pow(beta1, t)));
    const S inverse_root = static_cast<S>(1 / std::sqrt(1 - std::pow(beta2, t)));
    detail::Span<S> p(parameters, size), m(moments, size), v(squares, size);
    const detail::ConstSpan<S> g(gradients, size);
    m = S(beta1) * m + S((1 - beta1) * clip) * g;
    v = S(beta2) * v + S((1 - beta2) * clip * clip) * g.square();
    p = S(1 - lr * weight_decay) * p - step_size * m / (v.sqrt() * inverse_root + std::max(S(options_.eps), std::numeric_limits<S>::min()));
  }

  AdamWOptions options_;
  typename T::Gradients m_, v_;
  detail::StepCounters counters_;
  detail::GroupOfEach groups_;
  Index steps_ = 0;
};

}  // namespace dylora

#endif
