#ifndef DYLORA_TRAIN_SGD_HPP
#define DYLORA_TRAIN_SGD_HPP

#include <cmath>
#include <cstddef>
#include <string>
#include <type_traits>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"
#include "dylora/train/optimizer.hpp"
#include "dylora/train/parameter_groups.hpp"

namespace dylora {

struct SgdOptions {
  double lr = 1e-2;
  double momentum = 0;                  ///< μ in [0, 1)
  double weight_decay = 0;              ///< decoupled: p loses lr · weight_decay · p per step
  double max_norm = 0;                  ///< the global gradient norm is clipped to this; 0 means never
  Update update = Update::active_only;  ///< what happens to components that took no part
  ParameterGroups groups = {};          ///< by name: another lr, no decay (train/parameter_groups.hpp)
};

/// u ← μ u + g,   p ← (1 − lr · λ) p − lr · u
///
/// Stochastic gradient descent with heavy-ball momentum (Polyak, 1964), over anything Trainable; used as AdamW is.
template <Trainable T>
class Sgd {
 public:
  /// Throws std::invalid_argument if an option is out of its range.
  explicit Sgd(const T& trained, SgdOptions options = {})
      : options_(options), momentum_(zeros_like(trained)), counters_(trained, options.update), groups_(trained, options.groups, "Sgd") {
    require_learning_rate(options.lr);
    require_option(options.momentum >= 0 && options.momentum < 1, options.momentum, "Sgd: momentum", "a number in [0, 1)");
    require_option(options.weight_decay >= 0 && std::isfinite(options.weight_decay), options.weight_decay, "Sgd: weight_decay",
                   "a finite number ≥ 0");
    require_option(options.max_norm >= 0, options.max_norm, "Sgd: max_norm", "a number ≥ 0, where 0 means no clipping");
  }

  const SgdOptions& options() const { return options_; }
  Index steps() const { return steps_; }

  void set_learning_rate(double lr) {
    require_learning_rate(lr);
    options_.lr = lr;
  }

  /// Moves the parameters of `trained`. Throws, with nothing changed, ShapeError if gradients or moments do not have its shapes and
  /// NonFiniteError if a gradient is not finite. Reads and writes the updated components only.
  void step(T& trained, const typename T::Gradients& gradients) {
    require_shapes(trained, "Sgd: gradient of", gradients);
    require_shapes(trained, "Sgd: moments of", momentum_);
    const double clip = detail::clip_factor(trained, gradients, options_.max_norm, "Sgd: step " + std::to_string(steps_));
    ++steps_;
    std::size_t index = 0;
    T::zip_parameters(
        [&](Parameter parameter, auto& p, const auto& g, auto& u) {
          const ParameterGroup& group = groups_[index];
          counters_.for_each_updated_block(index++, parameter.rank_axis, g, [&](Index, Index begin, Index end) {
            const auto block = [&](auto& matrix) { return detail::component_block(parameter.rank_axis, matrix, begin, end); };
            detail::for_each_span([&](Index size, auto*... values) { update(size, values..., clip, group); }, block(p), block(g), block(u));
          });
        },
        trained, gradients, momentum_);
  }

  /// What a checkpoint keeps of it (io/checkpoint/checkpoint.hpp). The learning rate is part of the state, since schedules set it; the other options
  /// must be the same.
  template <class Archive>
  void state(Archive& archive) {
    archive.same("method", "Sgd");
    archive.same("momentum", options_.momentum);
    archive.same("weight_decay", options_.weight_decay);
    archive.same("max_norm", options_.max_norm);
    archive.same("update", detail::name_of(options_.update));
    archive("lr", options_.lr, require_learning_rate);
    archive("steps", steps_, detail::require_step_count);
    archive.template parameters<T>("u", momentum_);
    archive("counters", counters_);
    archive("groups", groups_);
  }

 private:
  static void require_learning_rate(double lr) { require_option(lr >= 0 && std::isfinite(lr), lr, "Sgd: lr", "a finite number ≥ 0"); }

  template <class S>
  void update(Index size, S* parameters, const S* gradients, S* momentum, double clip, const ParameterGroup& group) const {
    const double lr = options_.lr * group.lr_ratio, weight_decay = group.decays ? options_.weight_decay : 0;
    detail::Span<S> p(parameters, size), u(momentum, size);
    u = S(options_.momentum) * u + S(clip) * detail::ConstSpan<S>(gradients, size);
    p = S(1 - lr * weight_decay) * p - S(lr) * u;
  }

  SgdOptions options_;
  typename T::Gradients momentum_;
  detail::StepCounters counters_;
  detail::GroupOfEach groups_;
  Index steps_ = 0;
};

}  // namespace dylora

#endif
