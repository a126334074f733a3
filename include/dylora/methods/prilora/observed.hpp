#ifndef DYLORA_METHODS_PRILORA_OBSERVED_HPP
#define DYLORA_METHODS_PRILORA_OBSERVED_HPP

#include <utility>

#include "dylora/adapters/adapter.hpp"
#include "dylora/adapters/decorator.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

/// Δ(x), and what its inputs were like: every backward also adds Σ xⱼ² over its samples to gradients.input_squares, for each feature j.
///
/// What pruning by importance needs to know (methods/prilora/pruning.hpp). The statistics are kept with the gradients, so the layer stays
/// const and whoever traverses a model with its gradients finds them; whoever reads them clears them. Inference gathers nothing.
///
///     Linear<float, Observed<LowRank<float>>> layer(W, {.max_rank = 8}, rng);
///     Linear<float, Observed<Dropout<LowRank<float>>>> dropping(W, {.adapter = {.max_rank = 8}}, rng);    // sees x before the mask
///
/// Every column counts, those at rank none and those of padding too. accumulate_gradients does not sum what workers have seen.
template <class Inner>
  requires Adapter<Inner>
struct Observed : Decorator<Observed<Inner>, Inner> {
  using Scalar = typename Inner::Scalar;
  using S = Scalar;
  using Options = typename Inner::Options;
  using Cache = typename Inner::Cache;
  using Workspace = typename Inner::Workspace;

  struct Gradients {
    typename Inner::Gradients inner;
    VectorX<double> input_squares;  ///< in; no elements before the first backward
  };

  Inner inner;

  explicit Observed(Inner inner_) : inner(std::move(inner_)) {}
  Observed(Index in_features, Index out_features, Options options, Rng& rng) : inner(in_features, out_features, std::move(options), rng) {}

  using Decorator<Observed, Inner>::add_backward;

  /// The adapter's, and a pass over x.
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    inner.add_backward(x, dy, cache, gradients.inner, workspace, dx);
    observe(x, gradients);
  }

  void prepare_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace) const
    requires FactoredAdapter<Inner>
  {
    inner.prepare_backward(x, dy, cache, gradients.inner, workspace);
    observe(x, gradients);
  }

  static void members(const auto& f, auto&... t) { f(Child<Inner>{}, t.inner...); }

 private:
  static void observe(ConstMatrixRef<S> x, Gradients& gradients) {
    if (gradients.input_squares.size() != x.rows()) gradients.input_squares.setZero(x.rows());
    for (Index i = 0; i < x.cols(); ++i) gradients.input_squares.array() += x.col(i).array().template cast<double>().square();
  }
};

}  // namespace dylora

#endif
