#ifndef DYLORA_METHODS_ADALORA_IMPORTANCE_HPP
#define DYLORA_METHODS_ADALORA_IMPORTANCE_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"
#include "dylora/ranks/truncate.hpp"

/// The components of each adapter in the order of what training found them to be worth, so that prefixes of them can be served.
///
///     ImportanceTracker importance(model);
///     train_step(model, optimizer, gradients, [&] {
///       …                                                   // forward, loss, backward
///       importance.update(model, gradients);
///       return loss;
///     });
///     permute_components(model, importance.order(model));     // after training: ranks/permute.hpp
namespace dylora {

struct ImportanceOptions {
  double beta1 = 0.85;  ///< β₁ in [0, 1), of the sensitivity
  double beta2 = 0.85;  ///< β₂ in [0, 1), of the uncertainty
};

/// I = |p · ∂L/∂p|,   Ī ← β₁ Ī + (1 − β₁) I,   Ū ← β₂ Ū + (1 − β₂) |I − Ī|,   score of an entry = Ī · Ū
///
/// AdaLoRA's importance (Zhang et al., arXiv 2303.10512) of the components of adapters: the mean of the scores over the row of A, plus that
/// over the column of B. AdaLoRA adds the score of a singular value E for each component; a plain adapter has none, its size being in A
/// and B.
///
/// A component's averages move in the steps that trained it, as its moments do in an active_only optimiser. AdaLoRA gives its budget to the
/// best components during training; this only says which they are, for permute_components or truncate_each.
template <Trainable T>
class ImportanceTracker {
 public:
  /// Throws std::invalid_argument if an option is out of its range.
  explicit ImportanceTracker(const T& trained, ImportanceOptions options = {})
      : options_(options), sensitivity_(zeros_like(trained)), uncertainty_(zeros_like(trained)) {
    require_option(options.beta1 >= 0 && options.beta1 < 1, options.beta1, "ImportanceTracker: beta1", "a number in [0, 1)");
    require_option(options.beta2 >= 0 && options.beta2 < 1, options.beta2, "ImportanceTracker: beta2", "a number in [0, 1)");
  }

  /// Between the last backward of a step and the optimiser's step. With nothing changed, throws ShapeError if something does not have the
  /// shapes of `trained`, NonFiniteError if a gradient is not finite. Costs a pass over the trained components.
  void update(const T& trained, const typename T::Gradients& gradients) {
    require_averages(trained);
    require_shapes(trained, "ImportanceTracker: gradient of", gradients);
    if (!std::isfinite(norm(trained, gradients))) {
      throw NonFiniteError("ImportanceTracker: gradients: expected finite numbers, got a NaN or an infinity");
    }
    for_each_parameter(
        [&](Parameter parameter, const auto& p, const auto& g, auto& sensitivity, auto& uncertainty) {
          if (parameter.rank_axis == RankAxis::none) return;
          using S = typename std::remove_cvref_t<decltype(p)>::Scalar;
          const S beta1 = static_cast<S>(options_.beta1), beta2 = static_cast<S>(options_.beta2);
          detail::for_each_trained_range(parameter.rank_axis, g, [&](Index begin, Index end) {
            const auto block = [&](auto& matrix) { return detail::component_block(parameter.rank_axis, matrix, begin, end).array(); };
            auto smooth = block(sensitivity), spread = block(uncertainty);
            const auto now = (block(p) * block(g)).abs();
            smooth = beta1 * smooth + (1 - beta1) * now;
            spread = beta2 * spread + (1 - beta2) * (now - smooth).abs();
          });
        },
        trained, gradients, sensitivity_, uncertainty_);
  }

  /// The score of each component of each adapter, in the order of adapter_ranks. Throws ShapeError if `trained` has other shapes than the
  /// averages.
  std::vector<std::vector<double>> scores(const T& trained) const {
    require_averages(trained);
    std::vector<std::vector<double>> result;
    detail::zip_adapters(
        [&](std::size_t k, std::string_view, Parameter parameter, const auto& p, const auto& sensitivity, const auto& uncertainty) {
          const Index components = detail::component_count(parameter.rank_axis, p);
          if (k == result.size()) result.emplace_back(static_cast<std::size_t>(components));
          for (Index i = 0; i < components; ++i) {
            const auto of_component = [&](auto& matrix) {
              return detail::component_block(parameter.rank_axis, matrix, i, i + 1).template cast<double>().array();
            };
            result[k][static_cast<std::size_t>(i)] += (of_component(sensitivity) * of_component(uncertainty)).mean();
          }
        },
        trained, sensitivity_, uncertainty_);
    return result;
  }

  /// The components of each adapter, the one of the highest score first, equal ones as they were.
  std::vector<std::vector<Index>> order(const T& trained) const {
    std::vector<std::vector<Index>> result;
    for (const std::vector<double>& of_adapter : scores(trained)) {
      std::vector<Index>& order = result.emplace_back(of_adapter.size());
      std::iota(order.begin(), order.end(), Index{0});
      const auto score = [&](Index i) { return of_adapter[static_cast<std::size_t>(i)]; };
      std::stable_sort(order.begin(), order.end(), [&](Index i, Index j) { return score(i) > score(j); });
    }
    return result;
  }

  /// What a checkpoint keeps of it (io/checkpoint/checkpoint.hpp).
  template <class Archive>
  void state(Archive& archive) {
    archive.same("beta1", options_.beta1);
    archive.same("beta2", options_.beta2);
    archive.template parameters<T>("sensitivity", sensitivity_);
    archive.template parameters<T>("uncertainty", uncertainty_);
  }

 private:
  void require_averages(const T& trained) const { require_shapes(trained, "ImportanceTracker: averages of", sensitivity_, uncertainty_); }

  ImportanceOptions options_;
  typename T::Gradients sensitivity_, uncertainty_;
};

}  // namespace dylora

#endif
