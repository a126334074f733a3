#include <dylora/dylora.hpp>

int main() {
  using namespace dylora;
  Rng rng(1);
  const MatrixX<float> W = random_uniform<float>(64, 128, 0.5, rng), x = random_uniform<float>(128, 512, 0.5, rng),
                       target = random_uniform<float>(64, 512, 0.5, rng);
  Linear<float> layer(W, {.max_rank = 8}, rng);
  auto gradients = zeros_like(layer);
  Linear<float>::Cache cache;
  AdamW optimizer(layer, {.lr = 5e-3});
  const UniformRank sample_rank{1, 8};
  double loss = 0;
  for (int step = 0; step < 100; ++step) {
    const auto [value, gradient] = mse(layer.forward(x, sample_rank(rng), cache), target);
    set_zero(layer, gradients);
    layer.backward(gradient, cache, gradients);
    optimizer.step(layer, gradients);
    loss = value;
  }
  return loss < 1 ? 0 : 1;
}
