#ifndef DYLORA_ADAPTERS_LOCAL_WORKSPACE_HPP
#define DYLORA_ADAPTERS_LOCAL_WORKSPACE_HPP

#include <concepts>

#include "dylora/adapters/adapter.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

/// The backward of an adapter for a caller that has no workspace: with one of its own, which it allocates at each call.
///
/// A base of the adapter, struct Flow : LocalWorkspace<Flow<S>, S>, which brings it beside the verb that it is made from:
///
///     using LocalWorkspace<Flow, S>::add_backward;
///
/// What the adapter needs is asked of `Complete` at the call, since in the midst of its own definition clang would take it for a type that
/// needs nothing.
template <class Derived, std::floating_point S>
struct LocalWorkspace {
  template <class Cache, class Gradients, class Complete = Derived>
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, MatrixRef<S> dx) const
    requires SelfContained<Complete>
  {
    typename Complete::Workspace workspace;
    static_cast<const Complete&>(*this).add_backward(x, dy, cache, gradients, workspace, dx);
  }
};

}  // namespace dylora

#endif
