#ifndef DYLORA_METHODS_PRILORA_PROPORTIONAL_HPP
#define DYLORA_METHODS_PRILORA_PROPORTIONAL_HPP

#include <algorithm>
#include <utility>

#include "dylora/adapters/adapter.hpp"
#include "dylora/adapters/decorator.hpp"
#include "dylora/adapters/factors.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/map_ranks.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

template <class AdapterOptions>
struct ProportionalOptions {
  AdapterOptions adapter = {};  ///< of the adapter itself, with its own max_rank r
  Index max_rank = 8;           ///< R, the model's: at least r
};

/// Δ_c(x) with c = ⌈b · r / R⌉: an adapter with r components in a model whose rank b goes to R, so that each rank of the model cuts all its
/// adapters to the same share of what they have.
///
/// For adapters of different sizes, as PRILoRA's (arXiv 2401.11316; methods/prilora/rank_allocation.hpp) that grow with the depth: at every
/// b the layers keep that profile. Without it, an adapter of r components takes min(b, r) of them, and so the low ranks of all layers are
/// alike.
///
///     Linear<float, Proportional<LowRank<float>>> layer(W, {.adapter = {.max_rank = 4}, .max_rank = 12}, rng);
///     layer.forward(x, 6);                                // with 2 of its 4 components
///
/// c grows with b, so the prefixes stay nested. A trained slice [t, b) becomes [⌈t r / R⌉, ⌈b r / R⌉), which may be empty: the ranks of the
/// model are more than those of the adapter. Neighbouring runs of a batch that come to have one c are computed as one run.
///
/// To cut it (ranks/truncate.hpp) is to cut the adapter: truncate(layer, c) leaves c of its r components, and not those of rank c of the
/// model. Ranks with c or fewer are as they were, those above compute what rank ⌊c · R / r⌋ does. For all that rank b of the model has in
/// every layer, cut each to its rank_of(b).
template <class Inner>
  requires Adapter<Inner>
struct Proportional : Decorator<Proportional<Inner>, Inner> {
  using Scalar = typename Inner::Scalar;
  using S = Scalar;
  using Options = ProportionalOptions<typename Inner::Options>;
  using Cache = typename Inner::Cache;
  using Workspace = typename Inner::Workspace;

  struct Gradients {
    typename Inner::Gradients inner;
  };

  Inner inner;

  /// Throws std::invalid_argument if max_rank is less than the adapter's.
  Proportional(Inner inner_, Index max_rank) : inner(std::move(inner_)), max_rank_(max_rank) {
    require_in_range(inner.max_rank(), 0, max_rank, "Proportional: max_rank of the adapter, against that of the model");
  }
  Proportional(Index in_features, Index out_features, Options options, Rng& rng)
      : Proportional(Inner(in_features, out_features, options.adapter, rng), options.max_rank) {}

  /// R; 0 if there is no adapter.
  Index max_rank() const { return inner.max_rank() == 0 ? 0 : max_rank_; }

  /// ⌈b · r / R⌉: the adapter's rank at rank b of the model.
  Index rank_of(Index rank) const { return inner.max_rank() == 0 ? 0 : (rank * inner.max_rank() + max_rank_ - 1) / max_rank_; }

  /// y += Δ_c(x). Throws and costs as the adapter does.
  void add_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    inner.add_forward(x, checked(ranks, x.cols(), "Proportional::add_forward"), cache, y);
  }

  void prepare_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const
    requires FactoredAdapter<Inner>
  {
    inner.prepare_forward(x, checked(ranks, x.cols(), "Proportional::add_forward"), cache);
  }

  MatrixX<S> delta(RankSlice rank) const
    requires MergeableAdapter<Inner>
  {
    require_ranks(rank, inner.in_features(), max_rank(), "Proportional::delta");
    return inner.delta(slice_of(rank));
  }

  /// The largest rank of the model at which the adapter has all that it was asked for.
  Index components() const
    requires PortableAdapter<Inner>
  {
    return inner.max_rank() == 0 ? 0 : inner.components() * max_rank_ / inner.max_rank();
  }
  /// The adapter's at c, the rank that it has at rank b of the model.
  LowRankFactors<S> factors(Index rank) const
    requires PortableAdapter<Inner>
  {
    require_in_range(rank, 0, max_rank(), "Proportional::factors: rank");
    return inner.factors(rank_of(rank));
  }
  /// The adapter becomes that of these factors. The model's rank stays, or becomes theirs if it is less.
  void set_factors(LowRankFactors<S> factors)
    requires PortableAdapter<Inner>
  {
    inner.set_factors(std::move(factors));
    max_rank_ = std::max(max_rank_, inner.max_rank());
  }

  static void members(const auto& f, auto&... t) {
    f(Child<Inner>{}, t.inner...);
    f(Setting{"max_rank of the model"}, &Proportional::max_rank_);
  }

 private:
  RankSlice slice_of(RankSlice rank) const {
    const Index c = rank_of(rank.active);
    return c == 0 ? RankSlice::none() : RankSlice(c, rank_of(rank.trainable_from));
  }

  BatchRanks checked(const BatchRanks& ranks, Index columns, const char* what) const {
    require_ranks(ranks, columns, max_rank(), what);
    return detail::map_ranks(ranks, [&](RankSlice rank) { return slice_of(rank.at_most(max_rank())); });
  }

  Index max_rank_;
};

}  // namespace dylora

#endif
