#ifndef DYLORA_METHODS_PRILORA_PRUNING_HPP
#define DYLORA_METHODS_PRILORA_PRUNING_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"
#include "dylora/methods/prilora/importance.hpp"

namespace dylora {

namespace detail {

template <class M>
void require_finite_entries(const Eigen::MatrixBase<M>& values, const std::string& what) {
  if (!values.allFinite()) throw NonFiniteError(what + ": expected finite numbers, got a NaN or an infinity");
}

}  // namespace detail

/// The ⌊p · in⌋ entries of least importance in each row of A become 0; among equals, first those that are 0 already, then those of a lower
/// index. Row by row, so that pruning and cutting to the first rows commute. Pruning once more changes nothing, and a row that has an entry
/// other than 0 keeps one. Throws std::invalid_argument unless 0 ≤ p < 1, ShapeError unless there is a norm for each column, NonFiniteError
/// if A or the norms hold a NaN or an infinity.
template <class S>
void prune_rows(RowMatrix<S>& A, const VectorX<double>& norms, double p) {
  require_option(p >= 0 && p < 1, p, "prune_rows: fraction", "a number in [0, 1)");
  const MatrixX<double> values = importance(A, norms);
  detail::require_finite_entries(A, "prune_rows: A");
  detail::require_finite_entries(norms, "prune_rows: norms");
  const auto share = static_cast<std::ptrdiff_t>(std::floor(p * static_cast<double>(A.cols()) + 1e-9));  // 0.29 · 100 is 29
  const std::ptrdiff_t pruned = std::min<std::ptrdiff_t>(share, std::max<Index>(A.cols(), 1) - 1);       // and p < 1 is less than all
  std::vector<Index> order(static_cast<std::size_t>(A.cols()));
  for (Index i = 0; i < A.rows(); ++i) {
    std::iota(order.begin(), order.end(), Index{0});
    const auto key = [&](Index j) { return std::tuple(values(i, j), A(i, j) != 0, j); };
    std::nth_element(order.begin(), order.begin() + pruned, order.end(), [&](Index j, Index k) { return key(j) < key(k); });
    std::for_each(order.begin(), order.begin() + pruned, [&](Index j) { A(i, j) = 0; });
  }
}

struct PruningOptions {
  double fraction = 0.5;       ///< p in [0, 1): of each row of A
  Index interval = 40;         ///< steps from one pruning to the next
  double beta = 0.9;           ///< β in [0, 1) of the running norms
  bool bias_corrected = true;  ///< e begins at 0 and is divided by 1 − βᵗ; else it begins at the first norm
  bool keeps_pruned = false;   ///< what was pruned stays 0; else it may grow again until the next pruning
};

/// e_j ← β e_j + (1 − β) ‖x_j‖₂ at each step, and every so many steps the entries of A whose |A_ij| · e_j is least become 0.
///
/// PRILoRA (Benedek and Wolf, arXiv 2401.11316), after Wanda (arXiv 2306.11695): low-rank factors whose A is sparse; B is not pruned. The
/// paper could not be read in full: the defaults, the rows as groups, and whether what was pruned grows again are unconfirmed.
///
///     Linear<float, Observed<LowRank<float>>> model(W, {.max_rank = 8}, rng);     // methods/prilora/observed.hpp
///     Pruning pruning(model, {.fraction = 0.5, .interval = 40});
///     train_step(model, optimizer, gradients, [&] {
///       …                                                                        // forward, loss, backward
///       pruning.before_step(model, gradients);
///       return loss;
///     });
///     pruning.after_step(model);
///
/// Every factor A of an adapter that observes its input is pruned, all its components at once, whatever ranks the steps had. The
/// norm of a step is over all its samples. With keeps_pruned, their gradients are 0 too, and what an optimiser's momentum makes of them is
/// taken back after each step.
template <class T>
class Pruning {
 public:
  /// Throws std::invalid_argument if an option is out of its range or nothing in the model observes its input.
  explicit Pruning(const T& model, PruningOptions options = {}) : options_(options) {
    require_option(options.fraction >= 0 && options.fraction < 1, options.fraction, "Pruning: fraction", "a number in [0, 1)");
    require_option(options.beta >= 0 && options.beta < 1, options.beta, "Pruning: beta", "a number in [0, 1)");
    require_in_range(options.interval, 1, std::numeric_limits<Index>::max(), "Pruning: interval");
    for_each_observed(model, [&](const std::string& name, const auto& A) {
      factors_.push_back({.name = name, .average = std::vector<double>(static_cast<std::size_t>(A.cols()))});
    });
    if (factors_.empty()) throw std::invalid_argument("Pruning: expected adapters that observe their inputs (Observed), got none");
  }

  const PruningOptions& options() const { return options_; }
  Index steps() const { return steps_; }

  /// After the last backward of a step: takes what the adapters have seen, which clears it, and hides from the optimiser what stays pruned.
  /// Throws NonFiniteError, naming the factor, if an input was not finite.
  void before_step(T& model, typename T::Gradients& gradients) {
    std::size_t index = 0;
    const auto visit = [&](std::string_view name, auto& adapter, auto& seen) {
      const auto take = [&](const std::string& factor_name, auto& A, auto& dA) {
        Factor& factor = factor_of(index++, factor_name, A);
        if (seen.input_squares.size() > 0) observe(factor, seen.input_squares);
        set_pruned_to_zero(factor, dA);
      };
      for_each_in(name, take, adapter, seen);
      seen.input_squares.resize(0);
    };
    visit_members(ObservedVisitor<decltype(visit)>{visit}, model, gradients);
  }

  /// After the optimiser's step: what stays pruned is 0 again, and after every `interval` steps the model is pruned.
  /// Throws as prune, and then the step is not counted.
  void after_step(T& model) {
    if ((steps_ + 1) % options_.interval == 0) {
      prune(model);
    } else {
      for_each_factor(model, [&](Factor& factor, auto& A) { set_pruned_to_zero(factor, A); });
    }
    ++steps_;
  }

  /// Prunes now. Throws, naming the factor and with nothing pruned, std::invalid_argument where its inputs were never seen and
  /// NonFiniteError where it or their norms hold a NaN or an infinity.
  void prune(T& model) {
    for_each_factor(model, [&](Factor& factor, auto& A) {
      if (factor.observations == 0) {
        throw std::invalid_argument("Pruning: " + factor.name + ": expected inputs that before_step has seen, got none");
      }
      detail::require_finite_entries(A, "Pruning: " + factor.name);
      detail::require_finite_entries(norms(factor), "Pruning: norms of the inputs of " + factor.name);
    });
    for_each_factor(model, [&](Factor& factor, auto& A) {
      set_pruned_to_zero(factor, A);
      prune_rows(A, norms(factor), options_.fraction);
      if (!options_.keeps_pruned) return;
      factor.pruned.clear();
      for (Index entry = 0; entry < A.size(); ++entry) {
        if (A.data()[entry] == 0) factor.pruned.push_back(entry);
      }
    });
  }

  /// e of the i-th factor, in traversal order.
  VectorX<double> norms(std::size_t i) const { return norms(factors_.at(i)); }

  /// What a checkpoint keeps of it (io/checkpoint/checkpoint.hpp).
  template <class Archive>
  void state(Archive& archive) {
    archive.same("fraction", options_.fraction);
    archive.same("interval", options_.interval);
    archive.same("beta", options_.beta);
    archive.same("bias_corrected", options_.bias_corrected);
    archive.same("keeps_pruned", options_.keeps_pruned);
    archive("steps", steps_, require_count);
    for (Factor& factor : factors_) {
      archive(factor.name + ".norms", factor.average, [&](const std::vector<double>& read) {
        require_equal(static_cast<Index>(read.size()), static_cast<Index>(factor.average.size()), "norms");
      });
      archive(factor.name + ".observations", factor.observations, require_count);
      archive(factor.name + ".pruned", factor.pruned, [](const std::vector<Index>& entries) {
        for (const Index entry : entries) require_count(entry);
      });
    }
  }

 private:
  struct Factor {
    std::string name;
    std::vector<double> average;
    Index observations = 0;
    std::vector<Index> pruned = {};  // entries that stay 0, row by row, so that cutting to the first rows leaves theirs in place
  };

  /// Calls f(name, adapter, beside...) for each adapter that observes its input.
  template <class F>
  struct ObservedVisitor {
    F& f;

    template <class A>
    auto enter(std::string_view name, A& adapter, auto&... beside) const {
      constexpr bool observes = requires(typename A::Gradients& gradients) { gradients.input_squares; };
      if constexpr (observes) f(name, adapter, beside...);
      return std::bool_constant<!observes>{};
    }
  };

  static void require_count(Index count) { require_in_range(count, 0, std::numeric_limits<Index>::max(), "Pruning: count"); }

  /// Calls f(name, A, …) for each factor A of one adapter.
  template <class F, class A, class... Beside>
  static void for_each_in(std::string_view layer, F& f, A& adapter, Beside&... beside) {
    for_each_parameter(
        [&](Parameter parameter, auto& p, auto&... others) {
          if constexpr (std::remove_cvref_t<decltype(p)>::IsRowMajor) {
            if (parameter.factor != dylora::Factor::A) return;
            f(std::string(layer) + (layer.empty() ? "" : ".") + std::string(parameter.name), p, others...);
          }
        },
        adapter, beside...);
  }

  /// Calls f(name, A) for each factor A of an adapter that observes its input.
  template <class Model, class F>
  static void for_each_observed(Model& model, F&& f) {
    const auto visit = [&](std::string_view name, auto& adapter) { for_each_in(name, f, adapter); };
    visit_members(ObservedVisitor<decltype(visit)>{visit}, model);
  }

  template <class F>
  void for_each_factor(T& model, F&& f) {
    std::size_t index = 0;
    for_each_observed(model, [&](const std::string& name, auto& A) { f(factor_of(index++, name, A), A); });
  }

  template <class M>
  Factor& factor_of(std::size_t index, const std::string& name, const M& A) {
    if (index >= factors_.size() || factors_[index].name != name) {
      throw std::invalid_argument("Pruning: expected the model that it was made for, got one with another factor " + name);
    }
    require_equal(A.cols(), static_cast<Index>(factors_[index].average.size()), "Pruning: columns of " + name);
    return factors_[index];
  }

  void observe(Factor& factor, const VectorX<double>& squares) {
    if (!squares.allFinite()) {
      throw NonFiniteError("Pruning: inputs of " + factor.name + ": expected finite numbers, got a NaN or an infinity");
    }
    const bool begins = ++factor.observations == 1 && !options_.bias_corrected;
    const double beta = begins ? 0 : options_.beta;
    for (std::size_t j = 0; j < factor.average.size(); ++j)
      factor.average[j] = beta * factor.average[j] + (1 - beta) * std::sqrt(squares[static_cast<Index>(j)]);
  }

  template <class M>
  static void set_pruned_to_zero(const Factor& factor, M& values) {
    for (const Index entry : factor.pruned) {
      if (entry < values.size()) values.data()[entry] = 0;
    }
  }

  VectorX<double> norms(const Factor& factor) const {
    const double weight = options_.bias_corrected ? 1 - std::pow(options_.beta, static_cast<double>(factor.observations)) : 1;
    return Eigen::Map<const VectorX<double>>(factor.average.data(), static_cast<Index>(factor.average.size())) / weight;
  }

  PruningOptions options_;
  std::vector<Factor> factors_;
  Index steps_ = 0;
};

}  // namespace dylora

#endif
