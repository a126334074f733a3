#ifndef DYLORA_ADAPTERS_DROPOUT_HPP
#define DYLORA_ADAPTERS_DROPOUT_HPP

#include <optional>
#include <utility>

#include "dylora/adapters/adapter.hpp"
#include "dylora/adapters/decorator.hpp"
#include "dylora/adapters/dropout_mask.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/buffer.hpp"

namespace dylora {

template <class AdapterOptions>
struct DropoutOptions {
  AdapterOptions adapter = {};
  double probability = 0.1;  ///< p in [0, 1): how often an input of the adapter is dropped
};

/// Δ(M ∘ x), with M zero with probability p and 1 / (1 − p) otherwise: dropout on the input of any adapter, never on the base
/// (LoRA, arXiv 2106.09685, as loralib and PEFT place it).
///
///     Linear<float, Dropout<LowRank<float>>> layer(W, {.adapter = {.max_rank = 8}, .probability = 0.1}, rng);
///     cache.adapter.rng = Rng(seed);   // from now on each forward with this cache draws a fresh mask
///
/// There is no train/eval mode: whether a call drops is a property of the cache it was given. A cache without an Rng, and hence every
/// inference, drops nothing. p is rounded to a multiple of 2⁻¹⁶.
template <class Inner>
  requires Adapter<Inner>
struct Dropout : Decorator<Dropout<Inner>, Inner> {
  using Scalar = typename Inner::Scalar;
  using S = Scalar;
  using Options = DropoutOptions<typename Inner::Options>;

  struct Gradients {
    typename Inner::Gradients inner;
  };

  struct Workspace {
    typename Inner::Workspace inner;
    Buffer<S> dx;  // of M ∘ x
  };

  struct Cache {
    std::optional<Rng> rng;
    bool dropped = false;
    DropoutMask<S> mask;
    typename Inner::Cache inner;
  };

  Inner inner;
  double probability;

  /// Throws std::invalid_argument unless 0 ≤ p < 1.
  Dropout(Inner inner_, double probability_) : inner(std::move(inner_)), probability(probability_) {
    DropoutMask<S>::require_probability(probability, "Dropout: probability");
  }
  Dropout(Index in_features, Index out_features, Options options, Rng& rng)
      : Dropout(Inner(in_features, out_features, options.adapter, rng), options.probability) {}

  /// y += Δ(M ∘ x). As the inner adapter's, with a pass over x for the mask, four elements of which cost one random word.
  void add_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    cache.dropped = cache.rng && cache.mask.draw(x, probability, *cache.rng);
    if (!cache.dropped) return inner.add_forward(x, ranks, cache.inner, y);
    inner.add_forward(cache.mask.x(), ranks, cache.inner, y);
  }

  using Decorator<Dropout, Inner>::add_backward;

  /// dx += M ∘ ∂Δ/∂(M ∘ x); gradients += those of the inner adapter at M ∘ x.
  void add_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dx) const {
    if (!cache.dropped) return inner.add_backward(x, dy, cache.inner, gradients.inner, workspace.inner, dx);
    const auto dropped_x = cache.mask.x();
    require_equal(dx.rows(), dropped_x.rows(), "Dropout::add_backward: rows of dx");
    require_equal(dx.cols(), dropped_x.cols(), "Dropout::add_backward: samples in dx");
    auto dropped_dx = workspace.dx.resize(dx.rows(), dx.cols());
    dropped_dx.setZero();
    inner.add_backward(dropped_x, dy, cache.inner, gradients.inner, workspace.inner, dropped_dx);
    cache.mask.add_backward(dropped_dx, dx);
  }

  /// Throws as the inner adapter's, for x as it was dropped.
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& workspace) const {
    inner.check_backward(cache.dropped ? ConstMatrixRef<S>(cache.mask.x()) : x, dy, cache.inner, gradients.inner, workspace.inner);
  }

  static void members(const auto& f, auto&... t) {
    f(Child<Inner>{}, t.inner...);
    f(Setting{.name = "dropout probability", .only_in_training = true}, &Dropout::probability);
  }
};

}  // namespace dylora

#endif
