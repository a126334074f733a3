#ifndef DYLORA_LAYERS_LAYER_HPP
#define DYLORA_LAYERS_LAYER_HPP

#include <concepts>
#include <utility>

#include "dylora/adapters/adapter.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/named.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"

/// What a training loop asks of a layer, and a composite of its parts. A type needs no base class and no registration.
namespace dylora {

/// Something that maps and differentiates, and keeps what its backward needs in a cache that the caller owns: what users call, and what to
/// model when writing a layer. max_rank is the largest rank that forward accepts, 0 if it has no adapter and takes any; a part of it that
/// has fewer components uses all it has. Outputs must not overlap inputs. Backward is the vector-Jacobian product: the gradient of
/// ⟨forward(x), dy⟩. Its scratch memory is in a workspace of the caller's, as an adapter's is.
template <class L>
concept Layer = Trainable<L> &&
                requires(const L& layer, ConstMatrixRef<typename L::Scalar> in, MatrixRef<typename L::Scalar> out, const BatchRanks& ranks,
                         typename L::Cache& cache, const typename L::Cache& filled, typename L::Gradients& gradients,
                         typename L::Workspace& workspace) {
                  { layer.in_features() } -> std::same_as<Index>;
                  { layer.out_features() } -> std::same_as<Index>;
                  { layer.max_rank() } -> std::same_as<Index>;
                  { layer.forward(in, ranks) } -> std::same_as<MatrixX<typename L::Scalar>>;
                  { layer.forward(in, ranks, cache) } -> std::same_as<MatrixX<typename L::Scalar>>;
                  { layer.backward(in, filled, gradients) } -> std::same_as<MatrixX<typename L::Scalar>>;
                  layer.forward(in, ranks, cache, out);
                  layer.backward(in, filled, gradients, workspace, out);
                };

/// A layer that can also work on an input which the caller keeps, so that an activation read by several projections is stored once: what
/// to model, besides Layer, for use inside a composite such as Attention. Its cache then holds no copy of x. The parts of one composite may
/// have different numbers of components, so apply takes a rank above max_rank as all there are. A composite asks check_backward of all its
/// parts before the first of them adds anything: it throws what the others would throw for these arguments, and touches nothing.
template <class P>
concept Projection = Trainable<P> && requires(const P& projection, ConstMatrixRef<typename P::Scalar> in, MatrixRef<typename P::Scalar> out,
                                              const BatchRanks& ranks, typename P::Cache& cache, const typename P::Cache& filled,
                                              typename P::Gradients& gradients, typename P::Workspace& workspace) {
  { projection.in_features() } -> std::same_as<Index>;
  { projection.out_features() } -> std::same_as<Index>;
  { projection.max_rank() } -> std::same_as<Index>;
  projection.apply(in, ranks, cache, out);                             // (x, …, y)         y = projection(x)
  projection.set_backward(in, in, filled, gradients, workspace, out);  // (x, dy, …, dx)    gradients += ∂/∂θ, dx = ∂/∂x
  projection.add_backward(in, in, filled, gradients, workspace, out);  //                   gradients += ∂/∂θ, dx += ∂/∂x
  projection.add_gradients(in, in, filled, gradients, workspace);      // (x, dy, …)        gradients += ∂/∂θ alone
  projection.check_backward(in, in, filled, std::as_const(gradients), std::as_const(workspace));  // of x and dy, reads shapes alone
};

/// In the place of dx, where nothing below the layer learns: layer.backward(dy, cache, gradients, workspace, no_dx).
struct NoInputGradient {};
inline constexpr NoInputGradient no_dx;

namespace detail {

/// What a backward does with ∂/∂x.
enum class Dx { set, add, none };

/// A matrix of this shape for who reads the shape alone.
template <class S>
Eigen::Map<const MatrixX<S>> of_shape(Index rows, Index cols) {
  return {nullptr, rows, cols};
}

}  // namespace detail

/// The backward of a layer for a caller that has no workspace: with one of its own, which it allocates at each call.
///
/// A base of the layer, which brings it beside the verbs that it is made from: using BackwardWithoutWorkspace<Derived, S>::backward. What
/// the layer needs is asked of `Complete` at the call, since in the midst of its own definition clang would take it for a type that needs
/// nothing.
template <class Derived, std::floating_point S>
struct BackwardWithoutWorkspace {
  template <class Cache, class Gradients, class Complete = Derived>
  void backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, MatrixRef<S> dx) const
    requires SelfContained<Complete>
  {
    typename Complete::Workspace workspace;
    self().backward(dy, cache, gradients, workspace, dx);
  }
  template <class Cache, class Gradients, class Complete = Derived>
  void backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, NoInputGradient) const
    requires SelfContained<Complete>
  {
    typename Complete::Workspace workspace;
    self().backward(dy, cache, gradients, workspace, no_dx);
  }

  /// Returns dx, in × n.
  template <class Cache, class Gradients, class Complete = Derived>
  MatrixX<S> backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients) const
    requires SelfContained<Complete>
  {
    MatrixX<S> dx(self().in_features(), dy.cols());
    backward(dy, cache, gradients, dx);
    return dx;
  }

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }
};

/// The forward and backward that keep x, from the verbs of a Projection, to which the caller brings it:
///
///     forward  = apply, then a copy of x into cache.x
///     backward = set_backward, or add_gradients, with that copy
///
/// A base of the layer, struct Linear : KeepsInput<Linear<S>, S>. The layer has a Cache with a Buffer<S> x, which its apply empties, and a
/// name that messages begin with.
template <class Derived, std::floating_point S>
struct KeepsInput : BackwardWithoutWorkspace<Derived, S> {
  using BackwardWithoutWorkspace<Derived, S>::backward;

  /// y, for inference. x in × n; b ≤ max_rank, one for all columns or one for each run of them; returns out × n.
  /// Throws ShapeError if x does not fit or has no column, std::invalid_argument for the rank. Costs what apply does; keeps nothing.
  template <class Complete = Derived>
  MatrixX<S> forward(ConstMatrixRef<S> x, const BatchRanks& ranks) const
    requires SelfContained<Complete>
  {
    require_ranks(ranks, x.cols(), self().max_rank(), detail::named<Derived, "::forward">());
    typename Complete::Cache scratch;
    MatrixX<S> y(self().out_features(), x.cols());
    self().apply(x, ranks, scratch, y);
    return y;
  }

  /// The same, and keeps in the cache (overwritten) what backward needs, a copy of x included.
  template <class Cache>
  MatrixX<S> forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const {
    MatrixX<S> y(self().out_features(), x.cols());
    forward(x, ranks, cache, y);
    return y;
  }

  /// The same into the caller's y (out × n, overwritten); but for a list of ranks, allocates only when the cache grows.
  template <class Cache>
  void forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.x.resize(self().in_features(), 0);  // if this call throws, the cache counts as not filled
    require_ranks(ranks, x.cols(), self().max_rank(), detail::named<Derived, "::forward">());
    self().apply(x, ranks, cache, y);
    cache.x.assign(x);
  }

  /// The vector-Jacobian product of the cached forward: gradients are added to, dx is overwritten.
  ///
  /// dy out × n; dx in × n. Throws ShapeError, with nothing added, if dy does not fit or the cache was not filled. Allocates only when the
  /// workspace grows.
  template <class Cache, class Gradients, class Workspace>
  void backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace, MatrixRef<S> dx) const {
    check_samples(dy, cache);
    self().set_backward(cache.x.view(), dy, cache, gradients, workspace, dx);
  }

  /// The same without dx, for the lowest layer that learns: the gradients have the same bits, and the product of the frozen weight with dy
  /// is not computed.
  template <class Cache, class Gradients, class Workspace>
  void backward(ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace, NoInputGradient) const {
    check_samples(dy, cache);
    self().add_gradients(cache.x.view(), dy, cache, gradients, workspace);
  }

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }

  template <class Cache>
  static void check_samples(ConstMatrixRef<S> dy, const Cache& cache) {
    require_samples(dy.cols(), detail::named<Derived, "::backward: dy">());
    require_equal(dy.cols(), cache.x.cols(),
                  detail::named<Derived, "::backward: samples in dy, against the cache (was it filled by forward?)">());
  }
};

}  // namespace dylora

#endif
