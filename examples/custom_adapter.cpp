// An adapter of your own, written at one rank: the library makes it work at every rank, mixed in a batch, and trains, cuts and checks it.
#include <dylora/dylora.hpp>
#include <dylora/testing/gradient_check.hpp>
#include <iostream>
using namespace dylora;
/// Δ_b(x) = B_b · diag(g_b) · A_b · x over a frozen random basis A, B: only the gains g are trained, one for each rank component.
struct RandomBasis : PerRank<RandomBasis, double> {
  MatrixX<double> A, B;  // max_rank × in, out × max_rank
  VectorX<double> gain;
  struct Gradients {
    Gradient<VectorX<double>> gain;
  };
  static void members(const auto& f, auto&... t) {
    f(Parameter{"gain", RankAxis::rows}, t.gain...), f(Constant{"A"}, &RandomBasis::A), f(Constant{"B"}, &RandomBasis::B);
  }
  void add_forward_at(Index b, In x, Out y) const { y += B.leftCols(b) * (gain.head(b).asDiagonal() * (A.topRows(b) * x)); }
  void add_backward_at(RankSlice rank, In x, In dy, Gradients& gradients, Out dx) const {
    const MatrixX<double> h = A.topRows(rank.active) * x, dh = B.leftCols(rank.active).transpose() * dy;
    gradients.gain.segment(rank.trainable_from, rank.trainable()) += h.cwiseProduct(dh).rowwise().sum().tail(rank.trainable());
    dx += A.topRows(rank.active).transpose() * (gain.head(rank.active).asDiagonal() * dh);  // also through what is frozen
  }
};
int main() {
  Rng rng(7);
  const MatrixX<double> A = random_uniform<double>(6, 12, 1, rng), B = random_uniform<double>(10, 6, 1, rng);
  const MatrixX<double> W = random_uniform<double>(10, 12, 0.5, rng), x = random_uniform<double>(12, 64, 1, rng);
  const MatrixX<double> target = (W + B * A) * x;  // reached by gains of 1
  Linear<double, RandomBasis> layer(W, {{12, 10, 6}, A, B, VectorX<double>::Constant(6, 0.5)});
  // Certified: backward is the derivative of forward at ranks 1 to 6, nested and frozen.
  if (const auto report = check_gradients(layer.adapter, x, rng); !(report.error < 1e-6)) throw std::runtime_error(report.where);
  Linear<double, RandomBasis>::Cache cache;
  AdamW optimizer(layer, {.lr = 2e-2});
  for (int step = 0; step < 500; ++step) {  // And trained like any other, at a rank drawn anew for each step.
    auto gradients = zeros_like(layer);
    const auto loss = mse(layer.forward(x, UniformRank{1, 6}(rng), cache), target);
    layer.backward(loss.gradient, cache, gradients);
    optimizer.step(layer, gradients);
  }
  for (const Index rank : {1, 3, 6}) std::cout << "rank " << rank << "  mse " << mse(layer.forward(x, rank), target).value << '\n';
}
