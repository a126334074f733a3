#ifndef DYLORA_RANKS_SEARCH_HPP
#define DYLORA_RANKS_SEARCH_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"
#include "dylora/ranks/truncate.hpp"

/// A rank for each adapter of a trained model under a budget, without training again: not every layer needs as many components.
///
///     const RankSearch search = search_ranks(model, {.budget = total_cost(adapter_ranks(model), 4, parameters_per_component)},
///                                            [&] { return validation_loss(model, 8); });
///     for (const RankChoice& point : search.curve) std::cout << point.cost << ' ' << point.loss << '\n';
///     truncate_each(model, search.best.ranks);
///     model.forward(x, 8);          // every adapter uses what it kept
namespace dylora {

/// What one component of an adapter costs, in the unit of the budget.
using ComponentCost = double (*)(const AdapterRank&);

inline double parameters_per_component(const AdapterRank& adapter) { return static_cast<double>(adapter.component_size); }

/// Flops per token, where each parameter is used once per token, in a multiplication and an addition: LowRank in a linear projection.
inline double flops_per_component(const AdapterRank& adapter) { return 2 * static_cast<double>(adapter.component_size); }

/// The cost of all components at ranks[i] each. Throws ShapeError unless there is a rank for each adapter.
inline double total_cost(const std::vector<AdapterRank>& adapters, const std::vector<Index>& ranks, ComponentCost cost) {
  require_equal(static_cast<Index>(ranks.size()), static_cast<Index>(adapters.size()), "total_cost: number of ranks, against the adapters");
  double sum = 0;
  for (std::size_t i = 0; i < ranks.size(); ++i) sum += static_cast<double>(ranks[i]) * cost(adapters[i]);
  return sum;
}

/// The cost of a uniform rank; adapters with fewer components count with those.
inline double total_cost(const std::vector<AdapterRank>& adapters, Index rank, ComponentCost cost) {
  double sum = 0;
  for (const AdapterRank& adapter : adapters) sum += static_cast<double>(std::min(rank, adapter.rank)) * cost(adapter);
  return sum;
}

struct RankSearchOptions {
  double budget;                                  ///< the most that the chosen components may cost together
  ComponentCost cost = parameters_per_component;  ///< or flops_per_component, or yours; above 0
  Index lowest_rank = 0;                          ///< what no adapter is cut below; adapters that have less keep it
  Index max_exchanges = 32;                       ///< how often, at most, a component is taken from one adapter in favour of others
  Index tried_exchanges = 8;                      ///< how many exchanges are measured before the search gives up
};

/// A rank for each adapter, in the order of adapter_ranks.
struct RankChoice {
  std::vector<Index> ranks;
  double cost;
  double loss;  ///< as measured
};

struct RankSearch {
  std::vector<AdapterRank> adapters;  ///< as they were
  std::vector<RankChoice> curve;      ///< from all components down to the lowest ranks, one component fewer at each point
  RankChoice best;                    ///< the lowest loss found within the budget
  Index evaluations = 0;              ///< how often the loss was measured
};

namespace detail {

/// The search: the model's parameters are cut in place, and put back when it ends, however it ends.
template <Trainable T, class Loss>
class RankSearcher {
 public:
  RankSearcher(T& trained, const RankSearchOptions& options, Loss& loss)
      : trained_(trained), options_(options), loss_(loss), adapters_(adapter_ranks(trained)) {
    for (const AdapterRank& adapter : adapters_) {
      full_.push_back(adapter.rank);
      lowest_.push_back(std::min(options.lowest_rank, adapter.rank));
      const double cost = options.cost(adapter);
      require_option(cost > 0 && std::isfinite(cost), cost, "search_ranks: cost of a component of " + adapter.name, "a finite number > 0");
      cost_.push_back(cost);
    }
    require_in_range(options.lowest_rank, 0, std::numeric_limits<Index>::max(), "search_ranks: lowest_rank");
    require_in_range(options.max_exchanges, 0, std::numeric_limits<Index>::max(), "search_ranks: max_exchanges");
    require_in_range(options.tried_exchanges, 1, std::numeric_limits<Index>::max(), "search_ranks: tried_exchanges");
    require_option(affordable(lowest_), options.budget, "search_ranks: budget",
                   "at least the cost of the lowest ranks, " + std::to_string(cost_of(lowest_)));
    take_snapshot(trained, whole_);
  }
  RankSearcher(const RankSearcher&) = delete;
  RankSearcher& operator=(const RankSearcher&) = delete;
  ~RankSearcher() { assign_components(trained_, whole_, full_); }

  RankSearch run() {
    RankSearch result;
    result.adapters = adapters_;
    descend(result.curve);
    result.best = fill(measured(uniform()));
    const RankChoice* point = nullptr;
    for (const RankChoice& other : result.curve) {
      if (other.cost <= options_.budget && (point == nullptr || other.loss < point->loss)) point = &other;
    }
    RankChoice greedy = fill(*point);
    if (greedy.loss < result.best.loss) result.best = std::move(greedy);
    for (Index i = 0; i < options_.max_exchanges; ++i) {
      std::optional<RankChoice> better = exchange(result.best);
      if (!better) break;
      result.best = fill(std::move(*better));
    }
    result.evaluations = static_cast<Index>(losses_.size());
    return result;
  }

 private:
  /// Takes away, one at a time, the component whose loss per cost is least. What a removal costs mostly grows as others go, so a removal
  /// measured earlier is a lower bound, and only the most promising ones are measured again.
  void descend(std::vector<RankChoice>& curve) {
    RankChoice now = measured(full_);
    curve.push_back(now);
    std::vector<double> rise(full_.size(), -std::numeric_limits<double>::infinity());  // loss per cost when last measured
    while (now.ranks != lowest_) {
      std::vector<std::optional<RankChoice>> tried(full_.size());
      std::size_t chosen = 0;
      for (;;) {
        chosen = full_.size();
        for (std::size_t i = 0; i < full_.size(); ++i) {
          if (now.ranks[i] > lowest_[i] && (chosen == full_.size() || rise[i] < rise[chosen])) chosen = i;
        }
        if (tried[chosen]) break;
        tried[chosen] = measured(changed(now.ranks, chosen, -1));
        rise[chosen] = (tried[chosen]->loss - now.loss) / cost_[chosen];
      }
      now = std::move(*tried[chosen]);
      curve.push_back(now);
    }
  }

  /// The largest rank for all that the budget allows: where the search must not end up worse.
  std::vector<Index> uniform() const {
    std::vector<Index> ranks = lowest_;
    for (Index rank = 0;; ++rank) {
      std::vector<Index> higher = lowest_;
      for (std::size_t i = 0; i < full_.size(); ++i) higher[i] = std::clamp(rank, lowest_[i], full_[i]);
      if (!affordable(higher)) return ranks;
      ranks = std::move(higher);
      if (ranks == full_) return ranks;
    }
  }

  /// Adds what lowers the loss most per cost as long as the budget has room.
  RankChoice fill(RankChoice now) {
    for (;;) {
      std::optional<RankChoice> best;
      double best_fall = 0;
      for (std::size_t i = 0; i < full_.size(); ++i) {
        if (now.ranks[i] == full_[i] || !affordable(changed(now.ranks, i, 1))) continue;
        RankChoice more = measured(changed(now.ranks, i, 1));
        const double fall = (now.loss - more.loss) / cost_[i];
        if (fall > best_fall) {
          best_fall = fall;
          best = std::move(more);
        }
      }
      if (!best) return now;
      now = std::move(*best);
    }
  }

  /// The first choice found better than `now` among: a component less here, as many more there as the budget allows. The removals and
  /// additions are measured one by one, and their most promising pairs together.
  std::optional<RankChoice> exchange(const RankChoice& now) {
    struct Pair {
      double expected;
      std::vector<Index> ranks;
    };
    std::vector<std::optional<double>> removal(full_.size()), addition(full_.size());
    for (std::size_t i = 0; i < full_.size(); ++i) {
      if (now.ranks[i] > lowest_[i]) removal[i] = measured(changed(now.ranks, i, -1)).loss - now.loss;
      if (now.ranks[i] < full_[i]) addition[i] = measured(changed(now.ranks, i, 1)).loss - now.loss;
    }
    std::vector<Pair> pairs;
    for (std::size_t from = 0; from < full_.size(); ++from) {
      for (std::size_t to = 0; to < full_.size(); ++to) {
        if (from == to || !removal[from] || !addition[to]) continue;
        std::vector<Index> ranks = changed(now.ranks, from, -1);
        while (ranks[to] < full_[to] && affordable(changed(ranks, to, 1))) ++ranks[to];
        if (ranks[to] > now.ranks[to]) pairs.push_back({*removal[from] + *addition[to], std::move(ranks)});
      }
    }
    std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) { return a.expected < b.expected; });
    for (std::size_t i = 0; i < pairs.size() && static_cast<Index>(i) < options_.tried_exchanges; ++i) {
      RankChoice tried = measured(std::move(pairs[i].ranks));
      if (tried.loss < now.loss) return tried;
    }
    return std::nullopt;
  }

  static std::vector<Index> changed(std::vector<Index> ranks, std::size_t i, Index by) {
    ranks[i] += by;
    return ranks;
  }

  double cost_of(const std::vector<Index>& ranks) const { return total_cost(adapters_, ranks, options_.cost); }
  bool affordable(const std::vector<Index>& ranks) const { return cost_of(ranks) <= options_.budget; }

  /// The loss at `ranks`, from memory if it was measured before.
  RankChoice measured(std::vector<Index> ranks) {
    const auto [known, fresh] = losses_.try_emplace(ranks, 0);
    if (fresh) {
      assign_components(trained_, whole_, ranks);
      known->second = loss_();
    }
    const double loss = known->second, cost = cost_of(ranks);
    if (!std::isfinite(loss)) {
      std::string text;
      for (const Index rank : ranks) text += ' ' + std::to_string(rank);
      throw NonFiniteError("search_ranks: loss at the ranks" + text + ": expected a finite number, got " + std::to_string(loss));
    }
    return {std::move(ranks), cost, loss};
  }

  T& trained_;
  const RankSearchOptions& options_;
  Loss& loss_;
  std::vector<AdapterRank> adapters_;
  std::vector<Index> full_, lowest_;
  std::vector<double> cost_;
  typename T::Gradients whole_;
  std::map<std::vector<Index>, double> losses_;
};

}  // namespace detail

/// Greedy on measured loss: from all components down, each time without the one that costs least loss for what it frees; then, at the
/// budget, exchanges between adapters as long as they help, beginning at a uniform rank where that is better. `loss()` gives the loss of
/// `trained` as it is at that moment, at the rank it is to be served at, lower is better. A choice among so many fits the data a little:
/// give it more of them than an evaluation needs, training data too, and judge it on others.
///
/// While it runs, `trained` is cut and must not be used by others; when it returns or throws, all parameters are as they were.
/// Costs a few evaluations of the loss per component, and a copy of the parameters.
///
/// Throws std::invalid_argument if the budget is below the lowest ranks' cost, an option is out of its range or a cost is not above 0;
/// NonFiniteError, with the ranks, if the loss is not finite; and what `loss` throws.
template <Trainable T, class Loss>
  requires std::invocable<Loss&>
RankSearch search_ranks(T& trained, const RankSearchOptions& options, Loss&& loss) {
  return detail::RankSearcher<T, Loss>(trained, options, loss).run();
}

}  // namespace dylora

#endif
