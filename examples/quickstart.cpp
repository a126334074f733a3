#include <dylora/dylora.hpp>
#include <iostream>

int main() {
  using namespace dylora;
  Rng rng(42);

  // A frozen pretrained weight, and a task that differs from it by an unknown rank-6 change.
  const MatrixX<float> W = random_uniform<float>(64, 128, 0.5, rng);  // out × in
  const MatrixX<float> U = random_uniform<float>(64, 6, 0.5, rng);
  const MatrixX<float> V = random_uniform<float>(6, 128, 0.5, rng);
  const MatrixX<float> x = random_uniform<float>(128, 512, 0.5, rng);  // one column per sample
  const MatrixX<float> target = (W + U * V) * x;

  Linear<float> layer(W, {.max_rank = 16, .alpha = 16}, rng);
  auto gradients = zeros_like(layer);  // gradients belong to you, not to the layer
  Linear<float>::Cache cache;          // so do the activations of a call
  AdamW optimizer(layer, {.lr = 5e-3});
  const UniformRank sample_rank{1, 16};

  for (int step = 0; step < 2000; ++step) {
    const RankSlice rank = sample_rank(rng);  // DyLoRA: a new rank at every step, and only that many components take part
    const auto loss = mse(layer.forward(x, rank, cache), target);
    set_zero(layer, gradients);
    layer.backward(loss.gradient, cache, gradients);
    optimizer.step(layer, gradients);
  }

  // Trained once, usable at every rank. Inference is const: each thread may pick its own.
  for (Index rank : {1, 2, 4, 6, 8, 16}) std::cout << "rank " << rank << "  mse " << mse(layer.forward(x, rank), target).value << '\n';

  const DenseWeight<float> deployed = layer.merged(8);  // W + ΔW at rank 8, as a weight of its own
  std::cout << "merged " << (deployed.W * x - layer.forward(x, 8)).norm() / target.norm() << '\n';
}
