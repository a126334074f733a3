#ifndef DYLORA_TRAIN_SGD_HPP
#define DYLORA_TRAIN_SGD_HPP

#include <array>
#include <string_view>

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
  ParameterGroups groups = {};          ///< by parameter: another lr, no decay (train/parameter_groups.hpp)
};

namespace detail {

struct SgdFormula {
  using Options = SgdOptions;
  static constexpr std::string_view name = "Sgd";
  static constexpr std::array<std::string_view, 1> moments{"u"};

  static void require(const Options& options) {
    require_option(options.momentum >= 0 && options.momentum < 1, options.momentum, "Sgd: momentum", "a number in [0, 1)");
  }

  static void same(auto& archive, const Options& options) { archive.same("momentum", options.momentum); }

  template <class S>
  static void update(const Options& options, const ElementUpdate& of, Index size, S* parameters, const S* gradients, S* momentum) {
    Span<S> p(parameters, size), u(momentum, size);
    u = S(options.momentum) * u + S(of.clip) * ConstSpan<S>(gradients, size);
    p = S(1 - of.lr * of.weight_decay) * p - S(of.lr) * u;
  }
};

}  // namespace detail

/// u ← μ u + g,   p ← (1 − lr · λ) p − lr · u
///
/// Stochastic gradient descent with heavy-ball momentum (Polyak, 1964), over anything Trainable; used as AdamW is.
template <Trainable T>
class Sgd : public Optimizer<T, detail::SgdFormula> {
 public:
  /// Throws std::invalid_argument if an option is out of its range.
  explicit Sgd(const T& trained, SgdOptions options = {}) : Optimizer<T, detail::SgdFormula>(trained, options) {}
};

}  // namespace dylora

#endif
