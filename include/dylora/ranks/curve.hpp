#ifndef DYLORA_RANKS_CURVE_HPP
#define DYLORA_RANKS_CURVE_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"

/// Loss against rank, measured, and the rank to use.
///
///     const RankCurve curve = evaluate_ranks(0, 8, batches.size(), [&](RankSlice rank, Index i) {
///       return mse(model.forward(batches[i].x, rank), batches[i].target).value;
///     });
///     curve.loss(4);                                        // mean over the batches
///     curve.excess(4, 8);                                   // how much worse rank 4 is than rank 8, and how sure that is
///     const Index rank = select_rank(curve, {.tolerance = 0.01});
namespace dylora {

/// A mean over batches, and how far off it may be: the mean over endless batches lies within two standard errors about 19 times in 20.
struct Estimate {
  double mean;
  double standard_error;  ///< infinite with a single batch, which says nothing about others
};

/// The losses of one model at several ranks, all on the same batches.
class RankCurve {
 public:
  /// losses: a row per batch, a column per rank from `lowest` on; weights: of each batch in the mean, its number of samples for example.
  /// Throws ShapeError if there are no batches, no ranks, or not a weight for each batch; std::invalid_argument for a weight that is not a
  /// finite number above 0; NonFiniteError, naming rank and batch, for a loss that is not finite.
  RankCurve(Index lowest, MatrixX<double> losses, VectorX<double> weights)
      : lowest_(lowest), losses_(std::move(losses)), weights_(std::move(weights)) {
    require_in_range(lowest, 0, std::numeric_limits<Index>::max(), "RankCurve: lowest rank");
    require_samples(losses_.rows(), "RankCurve: batches");
    require_samples(losses_.cols(), "RankCurve: ranks");
    require_equal(weights_.size(), losses_.rows(), "RankCurve: number of weights, against the batches");
    for (const double weight : weights_) {
      require_option(weight > 0 && std::isfinite(weight), weight, "RankCurve: weight of a batch", "a finite number > 0");
    }
    for (Index rank = lowest; rank <= highest(); ++rank) {
      for (Index i = 0; i < batches(); ++i) {
        if (std::isfinite(losses_(i, rank - lowest))) continue;
        throw NonFiniteError("RankCurve: loss at rank " + std::to_string(rank) + " on batch " + std::to_string(i) +
                             ": expected a finite number, got " + std::to_string(losses_(i, rank - lowest)));
      }
    }
    weights_ /= weights_.sum();
  }

  Index lowest() const { return lowest_; }  ///< 0 is the model without its adapters
  Index highest() const { return lowest_ + losses_.cols() - 1; }
  Index batches() const { return losses_.rows(); }

  /// The loss at `rank`. Throws std::invalid_argument if it was not evaluated there.
  Estimate loss(Index rank) const { return estimate(column(rank)); }

  /// loss(rank) − loss(reference), batch by batch: far more certain than either, since what makes a batch hard it does at every rank.
  Estimate excess(Index rank, Index reference) const { return estimate(column(rank) - column(reference)); }

  /// The rank of the lowest loss, among those that are not 0 unless there is no other.
  Index best() const {
    Index best = std::min(std::max<Index>(lowest_, 1), highest());
    for (Index rank = best + 1; rank <= highest(); ++rank) {
      if (loss(rank).mean < loss(best).mean) best = rank;
    }
    return best;
  }

 private:
  VectorX<double> column(Index rank) const {
    require_in_range(rank, lowest_, highest(), "RankCurve: rank");
    return losses_.col(rank - lowest_);
  }

  Estimate estimate(const VectorX<double>& values) const {
    const double mean = weights_.dot(values);
    if (batches() == 1) return {mean, std::numeric_limits<double>::infinity()};
    const auto n = static_cast<double>(batches());
    return {mean, std::sqrt((weights_.array() * (values.array() - mean)).square().sum() * n / (n - 1))};
  }

  Index lowest_;
  MatrixX<double> losses_;   // batches × ranks
  VectorX<double> weights_;  // sum to 1
};

/// Calls loss(rank, batch) at every rank in [lowest, highest] on each of `batches`; rank 0 is RankSlice::none(). Batches of unequal sizes
/// count by their weights. Throws as RankCurve does.
template <class BatchLoss>
  requires std::invocable<BatchLoss&, RankSlice, Index>
RankCurve evaluate_ranks(Index lowest, Index highest, Index batches, BatchLoss&& loss, std::span<const double> weights = {}) {
  require_in_range(lowest, 0, highest, "evaluate_ranks: lowest rank");
  require_in_range(batches, 1, std::numeric_limits<Index>::max(), "evaluate_ranks: batches");
  if (!weights.empty())
    require_equal(static_cast<Index>(weights.size()), batches, "evaluate_ranks: number of weights, against the batches");
  MatrixX<double> losses(batches, highest - lowest + 1);
  for (Index i = 0; i < batches; ++i) {
    for (Index rank = lowest; rank <= highest; ++rank) {
      losses(i, rank - lowest) = loss(rank == 0 ? RankSlice::none() : RankSlice(rank), i);
    }
  }
  VectorX<double> used = VectorX<double>::Ones(batches);
  if (!weights.empty()) used = Eigen::Map<const VectorX<double>>(weights.data(), static_cast<Index>(weights.size()));
  return {lowest, std::move(losses), std::move(used)};
}

struct SelectRankOptions {
  double tolerance = 0;        ///< how much worse than the best rank it may be, in the unit of the loss
  double standard_errors = 0;  ///< and how many standard errors of that difference besides; 1 is the rule of Breiman et al. (CART, 1984)
};

/// The smallest rank ≥ 1 whose excess over the best rank is at most tolerance + standard_errors · its standard error.
/// Throws std::invalid_argument if an option is negative or not finite, if only rank 0 was evaluated, or if standard errors are to count
/// and there is only one batch.
inline Index select_rank(const RankCurve& curve, SelectRankOptions options) {
  const auto allowed = [](double value) { return value >= 0 && std::isfinite(value); };
  require_option(allowed(options.tolerance), options.tolerance, "select_rank: tolerance", "a finite number ≥ 0");
  require_option(allowed(options.standard_errors), options.standard_errors, "select_rank: standard_errors", "a finite number ≥ 0");
  require_in_range(curve.highest(), 1, std::numeric_limits<Index>::max(), "select_rank: highest rank evaluated");
  if (options.standard_errors > 0) {
    require_in_range(curve.batches(), 2, std::numeric_limits<Index>::max(), "select_rank: batches, for a standard error");
  }
  const Index best = curve.best();
  for (Index rank = std::max<Index>(1, curve.lowest()); rank < best; ++rank) {
    const Estimate excess = curve.excess(rank, best);
    const double doubt = options.standard_errors > 0 ? options.standard_errors * excess.standard_error : 0;  // 0 · ∞ is no number
    if (excess.mean <= options.tolerance + doubt) return rank;
  }
  return best;
}

}  // namespace dylora

#endif
