#ifndef DYLORA_ADAPTERS_DECORATOR_HPP
#define DYLORA_ADAPTERS_DECORATOR_HPP

#include <utility>

#include "dylora/adapters/adapter.hpp"
#include "dylora/adapters/factors.hpp"
#include "dylora/adapters/local_workspace.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

/// What an adapter that wraps one other adapter, its public member `inner`, passes on as it is. A base of the wrapping adapter, which
/// overrides what differs by a member of the same name:
///
///     struct Observed : Decorator<Observed<Inner>, Inner>
///
/// The verbs take the inner adapter's Cache and Workspace. A decorator with a Cache or a Workspace of its own has to have all verbs, and is
/// no FactoredAdapter unless it has the parts too. Its Gradients hold the inner adapter's as `inner`.
template <class Derived, class Inner>
  requires Adapter<Inner>
struct Decorator : LocalWorkspace<Derived, typename Inner::Scalar> {
  using S = typename Inner::Scalar;
  using Workspace = typename Inner::Workspace;

  static constexpr bool needs_linked_cache = !SelfContained<Inner>;

  Index in_features() const { return wrapped().in_features(); }
  Index out_features() const { return wrapped().out_features(); }
  Index max_rank() const { return wrapped().max_rank(); }

  void add_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, typename Inner::Cache& cache, MatrixRef<S> y) const {
    wrapped().add_forward(x, ranks, cache, y);
  }
  using LocalWorkspace<Derived, S>::add_backward;
  template <class Gradients>
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const typename Inner::Cache& cache, Gradients& gradients,
                    Workspace& workspace, MatrixRef<S> dx) const {
    wrapped().add_backward(x, dy, cache, gradients.inner, workspace, dx);
  }
  template <class Gradients>
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const typename Inner::Cache& cache, const Gradients& gradients,
                      const Workspace& workspace) const {
    wrapped().check_backward(x, dy, cache, gradients.inner, workspace);
  }

  void prepare_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, typename Inner::Cache& cache) const
    requires FactoredAdapter<Inner>
  {
    wrapped().prepare_forward(x, ranks, cache);
  }
  LowRankTerm<S> forward_term(const typename Inner::Cache& cache, const RankRun& run) const
    requires FactoredAdapter<Inner>
  {
    return wrapped().forward_term(cache, run);
  }
  template <class Gradients>
  void prepare_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const typename Inner::Cache& cache, Gradients& gradients,
                        Workspace& workspace) const
    requires FactoredAdapter<Inner>
  {
    wrapped().prepare_backward(x, dy, cache, gradients.inner, workspace);
  }
  LowRankTerm<S> backward_term(const typename Inner::Cache& cache, const Workspace& workspace, const RankRun& run) const
    requires FactoredAdapter<Inner>
  {
    return wrapped().backward_term(cache, workspace, run);
  }

  MatrixX<S> delta(RankSlice rank) const
    requires MergeableAdapter<Inner>
  {
    return wrapped().delta(rank);
  }

  Index components() const
    requires PortableAdapter<Inner>
  {
    return wrapped().components();
  }
  LowRankFactors<S> factors(Index rank) const
    requires PortableAdapter<Inner>
  {
    return wrapped().factors(rank);
  }
  void set_factors(LowRankFactors<S> factors)
    requires PortableAdapter<Inner>
  {
    static_cast<Derived&>(*this).inner.set_factors(std::move(factors));
  }

 private:
  const Inner& wrapped() const { return static_cast<const Derived&>(*this).inner; }
};

}  // namespace dylora

#endif
