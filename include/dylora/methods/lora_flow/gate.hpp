#ifndef DYLORA_METHODS_LORA_FLOW_GATE_HPP
#define DYLORA_METHODS_LORA_FLOW_GATE_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "dylora/adapters/local_workspace.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/buffer.hpp"
#include "dylora/linalg/product.hpp"

namespace dylora {

struct FlowGateOptions {
  Index adapters = 2;              ///< k ≥ 1, how many adapters the gate weighs
  std::vector<double> start = {};  ///< the weight of each at the start, finite, of any sum; none means 1/k each
};

/// The start of a gate of k adapters that is at one of them alone: 1 for it, 0 for the others.
/// Throws std::invalid_argument unless 0 ≤ adapter < k.
inline std::vector<double> only_adapter(Index adapter, Index adapters) {
  require_in_range(adapter, 0, adapters - 1, "only_adapter: adapter");
  std::vector<double> start(static_cast<std::size_t>(adapters), 0.0);
  start[static_cast<std::size_t>(adapter)] = 1;
  return start;
}

/// Ω = softmax(W_g h) + b_g: for each token (a column of h), the weights of k adapters.
///
/// LoRA-Flow (Wang et al., arXiv 2402.11455), as its released code has it: the bias is added after the softmax, so that a weight may be
/// negative and they need not sum to 1. One gate serves all adapted projections of a transformer block
/// (methods/lora_flow/gated_adapters.hpp) and is all that is trained. What h is, is up to the caller: the code takes the residual stream at
/// the block's input, before the layer norm.
///
///     FlowGate<float> gate(width, {.adapters = 2, .start = only_adapter(1, 2)});
///     FlowGate<float>::Cache cache;
///     auto gradients = zeros_like(gate);
///     gate.forward(h, ranks, cache);                             // cache.weights, k × n
///     gate.add_backward(h, d_weights, cache, gradients, dh);
///
/// Fresh, W_g = 0 and b_g = start − 1/k: every token has the weights of the start. Columns at RankSlice::none() have no weights (zeros),
/// and nothing comes back from them. The same vector added to every row of W_g changes nothing.
template <std::floating_point S>
struct FlowGate : LocalWorkspace<FlowGate<S>, S> {
  using Scalar = S;
  using Options = FlowGateOptions;

  struct Gradients {
    Gradient<RowMatrix<S>> weight;
    Gradient<VectorX<S>> bias;
  };

  struct Workspace {
    Buffer<S> d_logits;
  };

  /// Filled by one forward, read by any number of add_backward.
  struct Cache {
    BatchRanks ranks = RankSlice::none();
    Index samples = 0;
    Buffer<S> softmax;  // k × n
    Buffer<S> weights;  // Ω, k × n: the result of forward
  };

  RowMatrix<S> weight;  // W_g, k × in
  VectorX<S> bias;      // b_g, k

  /// Fresh. Throws std::invalid_argument if there is no adapter to weigh or a start is not finite, ShapeError for a start of another size.
  FlowGate(Index in_features, const Options& options) {
    const Index k = options.adapters;
    require_in_range(k, 1, std::numeric_limits<Index>::max(), "FlowGate: adapters");
    weight.setZero(k, in_features);
    bias.setZero(k);
    if (options.start.empty()) return;
    require_equal(static_cast<Index>(options.start.size()), k, "FlowGate: weights in start, against the adapters");
    for (Index i = 0; i < k; ++i) {
      const double start = options.start[static_cast<std::size_t>(i)];
      require_option(std::isfinite(start), start, "FlowGate: start", "finite weights");
      bias[i] = static_cast<S>(start) - S(1) / static_cast<S>(k);
    }
  }

  /// From trained values. Throws ShapeError if they disagree about the number of adapters.
  FlowGate(RowMatrix<S> weight_, VectorX<S> bias_) : weight(std::move(weight_)), bias(std::move(bias_)) { check_parameters(); }

  Index in_features() const { return weight.cols(); }
  Index adapters() const { return weight.rows(); }

  /// cache.weights = softmax(W_g h) + b_g, one column for each of h.
  ///
  /// h in × n, keep it until add_backward; cache overwritten. Of the ranks only matters which columns have one.
  /// Throws ShapeError if h or the ranks do not fit. Costs 2·k·n·in flops.
  void forward(ConstMatrixRef<S> h, const BatchRanks& ranks, Cache& cache) const {
    cache.samples = 0;  // if this call throws, the cache counts as not filled
    check_parameters();
    require_equal(h.rows(), in_features(), "FlowGate::forward: rows of h");
    require_ranks(ranks, h.cols(), 0, "FlowGate::forward");
    auto softmax = cache.softmax.resize(adapters(), h.cols()), weights = cache.weights.resize(adapters(), h.cols());
    ranks.for_each_run(h.cols(), [&](Index begin, Index n, RankSlice rank) {
      if (rank.active == 0) return weights.middleCols(begin, n).setZero(), void();
      set_dot_products(softmax.middleCols(begin, n), weight, h.middleCols(begin, n));
      for (Index column = begin; column < begin + n; ++column) {
        to_softmax(softmax.col(column).data());
        weights.col(column) = softmax.col(column) + bias;
      }
    });
    cache.ranks = ranks;
    cache.samples = h.cols();
  }

  using LocalWorkspace<FlowGate, S>::add_backward;

  /// The vector-Jacobian product of forward, run after run of the cached ranks. With P the softmax and d = dΩ (d_weights):
  ///
  ///     Ω = P + b_g              db_g += Σ over tokens of d
  ///     P = softmax(l)           dl = P ∘ (d − Σ over adapters of P ∘ d)
  ///     l = W_g h                dW_g += dl · hᵀ            dh += W_gᵀ · dl
  ///
  /// h as in forward; d_weights k × n, the sum over all projections that the gate serves; gradients and dh (in × n) are added to.
  /// Throws ShapeError, with nothing added, if something does not fit or the cache was not filled. Costs 4·k·n·in flops; allocates
  /// only when the workspace grows.
  void add_backward(ConstMatrixRef<S> h, ConstMatrixRef<S> d_weights, const Cache& cache, Gradients& gradients, Workspace& workspace,
                    MatrixRef<S> dh) const {
    check_backward(h, d_weights.rows(), d_weights.cols(), cache, gradients);
    require_equal(dh.rows(), in_features(), "FlowGate::add_backward: rows of dh");
    require_equal(dh.cols(), cache.samples, "FlowGate::add_backward: samples in dh");
    const auto softmax = cache.softmax.view();
    auto d_logits = workspace.d_logits.resize(adapters(), cache.samples);
    cache.ranks.for_each_run(cache.samples, [&](Index begin, Index n, RankSlice rank) {
      if (rank.active == 0) return;
      for (Index column = begin; column < begin + n; ++column) {
        const S* const p = softmax.col(column).data();
        S mean = 0;
        for (Index i = 0; i < adapters(); ++i) mean += p[i] * d_weights(i, column);
        for (Index i = 0; i < adapters(); ++i) {
          d_logits(i, column) = p[i] * (d_weights(i, column) - mean);
          gradients.bias[i] += d_weights(i, column);
        }
      }
      const auto d_run = d_logits.middleCols(begin, n);
      add_product(gradients.weight, d_run, h.middleCols(begin, n).transpose());
      add_product(dh.middleCols(begin, n), weight.transpose(), d_run);
    });
  }

  /// Throws what add_backward would throw for these arguments and d_weights of such a shape, which need not be there yet. Touches nothing.
  void check_backward(ConstMatrixRef<S> h, Index rows_of_d, Index samples_of_d, const Cache& cache, const Gradients& gradients) const {
    require_equal(rows_of_d, adapters(), "FlowGate::add_backward: rows of d_weights");
    require_equal(samples_of_d, cache.samples,
                  "FlowGate::add_backward: samples in d_weights, against the cache (was it filled by forward?)");
    require_equal(cache.softmax.rows(), adapters(), "FlowGate::add_backward: adapters of the cache");
    require_equal(h.rows(), in_features(), "FlowGate::add_backward: rows of h");
    require_equal(h.cols(), cache.samples, "FlowGate::add_backward: samples in h");
    check_parameters();
    require_shapes(*this, "FlowGate::add_backward: gradient of", gradients);
  }

  /// The weights of every token, 1/k + b_g, while W_g is 0. Throws std::invalid_argument if it is not: they then depend on the token.
  VectorX<S> constant_weights() const {
    check_parameters();
    if (!weight.isZero(0))
      throw std::invalid_argument("FlowGate::constant_weights: weight: expected 0, as before training, got one that depends on the token");
    return (bias.array() + S(1) / static_cast<S>(adapters())).matrix();
  }

  static void members(const auto& f, auto&... t) {
    f(Parameter{"weight"}, t.weight...);
    f(Parameter{"bias"}, t.bias...);
  }

 private:
  /// One column in place; the order of every sum is fixed.
  void to_softmax(S* column) const {
    const S largest = *std::max_element(column, column + adapters());
    S sum = 0;
    for (Index i = 0; i < adapters(); ++i) sum += column[i] = std::exp(column[i] - largest);
    for (Index i = 0; i < adapters(); ++i) column[i] /= sum;
  }

  /// Both are public.
  void check_parameters() const { require_equal(bias.size(), weight.rows(), "FlowGate: size of bias, against rows of weight"); }
};

}  // namespace dylora

#endif
