#ifndef DYLORA_ADAPTERS_CHECKED_HPP
#define DYLORA_ADAPTERS_CHECKED_HPP

#include <concepts>

#include "dylora/adapters/local_workspace.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/named.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

/// What every adapter refuses that computes at a rank, once. A base of adapters that are made of others, and of the mix-ins that write an
/// adapter's verbs for it (factored.hpp, per_rank.hpp). All ask before anything is touched. The adapter has
///
///     static constexpr std::string_view name      what messages begin with
///     in_features, out_features, max_rank         as every Adapter
///
/// and where check_call or check_backward serves it,
///
///     Cache with ranks and samples                those of the forward, ranks no higher than components()
///     components()                                unless it has a check_backward of its own
///
/// An adapter that has more to refuse than check_call does has a check_backward of its own, which hides this one and calls check_call.
template <class Derived, std::floating_point S>
struct Checked : LocalWorkspace<Derived, S> {
  /// Throws what add_backward would throw for these arguments, and touches nothing.
  template <class Cache, class Gradients, class Workspace>
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& /*workspace*/) const {
    check_call(x, dy, cache, gradients, self().components());
  }

 protected:
  /// Throws ShapeError unless x has in_features rows and the ranks are for its columns, std::invalid_argument if one is above max_rank.
  void check_forward(ConstMatrixRef<S> x, const BatchRanks& ranks) const {
    require_ranks(ranks, x.cols(), self().max_rank(), detail::named<Derived, "::add_forward">());
    require_equal(x.rows(), self().in_features(), detail::named<Derived, "::add_forward: rows of x">());
  }

  /// Throws ShapeError unless y is out × n, as the output for these samples of x is.
  void check_y(ConstMatrixRef<S> x, const MatrixRef<S>& y) const {
    require_equal(y.rows(), self().out_features(), detail::named<Derived, "::add_forward: rows of y">());
    require_equal(y.cols(), x.cols(), detail::named<Derived, "::add_forward: samples in y">());
  }

  /// What every backward refuses: dy, x and gradients that do not fit the adapter, a cache that was not filled with as many samples, and
  /// one whose ranks are above the components that there are now.
  template <class Cache, class Gradients>
  void check_call(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients, Index components) const {
    check_arguments(x, dy, cache.samples, gradients);
    require_ranks(cache.ranks, dy.cols(), components, detail::named<Derived, "::add_backward: the cache">());
    // And where it was cut to nothing since, which require_ranks takes for no adapter at all.
    require_in_range(cache.ranks.highest(), 0, components, detail::named<Derived, "::add_backward: rank of the cache">());
  }

  /// The same but for the ranks, where the cache is of a forward with so many samples.
  template <class Gradients>
  void check_arguments(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, Index samples, const Gradients& gradients) const {
    require_equal(dy.rows(), self().out_features(), detail::named<Derived, "::add_backward: rows of dy">());
    require_equal(dy.cols(), samples,
                  detail::named<Derived, "::add_backward: samples in dy, against the cache (was it filled by add_forward?)">());
    require_equal(x.rows(), self().in_features(), detail::named<Derived, "::add_backward: rows of x">());
    require_equal(x.cols(), dy.cols(), detail::named<Derived, "::add_backward: samples in x">());
    require_shapes(self(), detail::named<Derived, "::add_backward: gradient of">(), gradients);
  }

  /// Throws ShapeError unless dx is in × n, as the gradient of these samples' input is.
  void check_dx(ConstMatrixRef<S> dy, const MatrixRef<S>& dx) const {
    require_equal(dx.rows(), self().in_features(), detail::named<Derived, "::add_backward: rows of dx">());
    require_equal(dx.cols(), dy.cols(), detail::named<Derived, "::add_backward: samples in dx">());
  }

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }
};

}  // namespace dylora

#endif
