// An adapter of your own: what it computes, its gradient, its parameters. The library needs nothing else to nest, train, clip and check it.

#include <dylora/dylora.hpp>
#include <dylora/testing/gradient_check.hpp>
#include <iostream>

using namespace dylora;

/// Δ_b(x) = B_b · diag(g_b) · A_b · x over a frozen random basis A, B: only the gains g are trained, one per rank component.
template <class S>
struct RandomBasis {
  using Scalar = S;
  struct Gradients {
    Gradient<Vector<S>> gain;
  };
  struct Cache {
    BatchRanks ranks = RankSlice::none();
    Matrix<S> h;  // A_b x, b the rank of each column
  };

  Matrix<S> A, B;
  Vector<S> gain;

  RandomBasis(Index in, Index out, Index rank, Rng& rng)
      : A(random_uniform<S>(rank, in, 1, rng)), B(random_uniform<S>(out, rank, 1, rng)), gain(Vector<S>::Zero(rank)) {}

  Index in_features() const { return A.cols(); }
  Index out_features() const { return B.rows(); }
  Index max_rank() const { return A.rows(); }

  // A batch may hold columns of several ranks: each run of them is computed by itself.
  void add_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache, MatrixRef<S> y) const {
    require_ranks(ranks, x.cols(), max_rank(), "RandomBasis::add_forward");
    cache.ranks = ranks.at_most(gain.size());  // fewer gains than max_rank if they were cut
    cache.h.resize(max_rank(), x.cols());
    cache.ranks.for_each_run(x.cols(), [&](Index begin, Index n, RankSlice rank) {
      const Index b = rank.active;
      auto h = cache.h.block(0, begin, b, n);
      set_product(h, A.topRows(b), x.middleCols(begin, n));
      const Matrix<S> scaled = B.leftCols(b) * gain.head(b).asDiagonal();
      add_product(y.middleCols(begin, n), scaled, h);
    });
  }

  void add_backward(ConstMatrixRef<S> /*x*/, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, MatrixRef<S> dx) const {
    cache.ranks.for_each_run(dy.cols(), [&](Index begin, Index n, RankSlice rank) {
      const Index b = rank.active, t = rank.trainable_from;
      Matrix<S> dh(b, n);
      set_product(dh, B.leftCols(b).transpose(), dy.middleCols(begin, n));
      for (Index i = t; i < b; ++i) gradients.gain[i] += dh.row(i).dot(cache.h.row(i).segment(begin, n));
      gradients.gain.components.insert(rank);
      dh.array().colwise() *= gain.head(b).array();
      add_product(dx.middleCols(begin, n), A.topRows(b).transpose(), dh);
    });
  }

  template <class F, class... T>
  static void zip_parameters(F&& f, T&... t) {
    f(Parameter{"gain", RankAxis::rows}, t.gain...);
  }
};

int main() {
  Rng rng(7);
  RandomBasis<double> adapter(12, 10, 6, rng);
  adapter.gain.setLinSpaced(6, 0.5, 1.5);

  // Certified at every rank, nested and frozen, by the library's own check.
  for (Index b = 1; b <= 6; ++b) {
    for (const RankSlice rank : {RankSlice(b), RankSlice(b, b - 1)}) {
      const GradientReport report = check_gradients(adapter, random_uniform<double>(12, 5, 1, rng), rank, rng);
      if (!(report.error < 1e-6)) {
        std::cerr << "rank " << b << ": " << report.where << '\n';
        return 1;
      }
    }
  }
  std::cout << "backward is the derivative of forward at ranks 1 to 6\n";

  // And trained like any other, here as the adapter of a Linear.
  const Matrix<double> W = random_uniform<double>(10, 12, 0.5, rng), x = random_uniform<double>(12, 256, 1, rng);
  Linear<double, RandomBasis<double>> layer(W, RandomBasis<double>(12, 10, 6, rng));
  const Matrix<double> target = W * x + layer.adapter.B * layer.adapter.A * x;  // reached by gains of 1
  Linear<double, RandomBasis<double>>::Cache cache;
  auto gradients = zeros_like(layer);
  AdamW optimizer(layer, {.lr = 2e-2});
  for (int step = 0; step < 500; ++step) {
    train_step(layer, optimizer, gradients, FreshRanks{UniformRank{1, 6}}(step, rng), [&](Index, RankSlice rank, double) {
      const auto loss = mse(layer.forward(x, rank, cache), target);
      layer.backward(loss.gradient, cache, gradients);
      return loss.value;
    });
  }
  for (const Index rank : {1, 3, 6}) std::cout << "rank " << rank << "  mse " << mse(layer.forward(x, rank), target).value << '\n';
}
