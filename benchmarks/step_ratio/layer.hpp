#ifndef DYLORA_BENCHMARKS_STEP_RATIO_LAYER_HPP
#define DYLORA_BENCHMARKS_STEP_RATIO_LAYER_HPP

#include <dylora/dylora.hpp>
#include <functional>
#include <map>
#include <string>

#include "peers/sgemm.hpp"

namespace step_ratio {

using namespace dylora;

struct Shape {
  Index in, out, tokens;

  std::string name() const { return std::to_string(in) + "->" + std::to_string(out) + "x" + std::to_string(tokens); }

  /// Of a step at a rank: twice 2·n·in·out for the weight; 2·n·b·(in + out) for the adapter's forward, and twice that for its backward.
  double step_flops(Index rank) const { return static_cast<double>(2 * tokens * (2 * in * out + 3 * rank * (in + out))); }
};

/// The same work for each kind of contender.
struct Work {
  std::function<void(const peers::Library&)> library;  ///< the weight alone
  std::function<void()> own;                           ///< the weight alone, by dylora's products
  std::function<void(Index rank)> adapted;
};

/// A layer whose numbers are all drawn, those of B too.
template <class Storage>
Linear<float, LowRank<float>, DenseWeight<float, Storage>> adapted(const Shape& shape, Index max_rank, Rng& rng) {
  Linear<float, LowRank<float>, DenseWeight<float, Storage>> layer(random_uniform<float, Storage>(shape.out, shape.in, 0.5, rng),
                                                                   {.max_rank = max_rank}, rng);
  layer.adapter.B = random_uniform<float>(shape.out, max_rank, 0.5, rng);
  return layer;
}

/// One layer and what goes through it, shared by all contenders, so that all work in the same memory.
class Layer {
 public:
  Layer(const Shape& shape, Index max_rank, Rng rng)
      : layer_(adapted<MatrixX<float>>(shape, max_rank, rng)),
        gradients_(zeros_like(layer_)),
        x_(random_uniform<float>(shape.in, shape.tokens, 0.5, rng)),
        dy_(random_uniform<float>(shape.out, shape.tokens, 0.5, rng)),
        y_(shape.out, shape.tokens),
        dx_(shape.in, shape.tokens) {}

  /// Forward and backward, as in training.
  Work step() {
    return {.library =
                [this](const peers::Library& library) {
                  library.forward(weight(), x_, y_);
                  library.backward(weight(), dy_, dx_);
                },
            .own =
                [this] {
                  set_product(y_, weight(), x_);
                  set_product(dx_, weight().transpose(), dy_);
                },
            .adapted =
                [this](Index rank) {
                  layer_.forward(x_, rank, cache_, y_);
                  layer_.backward(dy_, cache_, gradients_, workspace_, dx_);
                }};
  }

  /// Of what a step at a rank gives, by name, the gradients of that step alone.
  std::map<std::string, double> norms(Index rank) {
    set_zero(layer_, gradients_);
    step().adapted(rank);
    const auto& [A, B] = gradients_.adapter;
    return {{"y", y_.norm()}, {"dx", dx_.norm()}, {"dA", A.norm()}, {"dB", B.norm()}};
  }

  /// Forward alone, as in inference.
  Work forward() {
    return {.library = [this](const peers::Library& library) { library.forward(weight(), x_, y_); },
            .own = [this] { set_product(y_, weight(), x_); },
            .adapted = [this](Index rank) { layer_.apply(x_, rank, cache_, y_); }};
  }

 private:
  const MatrixX<float>& weight() const { return layer_.base.W; }

  Linear<float> layer_;
  Linear<float>::Gradients gradients_;
  Linear<float>::Cache cache_;
  Linear<float>::Workspace workspace_;
  MatrixX<float> x_, dy_, y_, dx_;
};

}  // namespace step_ratio

#endif
