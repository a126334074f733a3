// An adapter of your own: what it computes, its gradient, its parameters. The library needs nothing else to nest, train, clip and check it.

#include <dylora/dylora.hpp>
#include <dylora/testing/gradient_check.hpp>
#include <iostream>

using namespace dylora;

/// Δ_b(x) = B_b · diag(g_b) · A_b · x over a frozen random basis A, B: only the gains g are trained, one per rank component.
struct RandomBasis : Factored<RandomBasis, double> {
  static constexpr std::string_view name = "RandomBasis";
  using Scalar = double;
  struct Gradients {
    Gradient<Vector<double>> gain;
  };
  struct Workspace {
    Matrix<double> dh;  // Bᵀ dy
  };
  struct Cache {
    BatchRanks ranks = RankSlice::none();
    Index samples = 0;
    Matrix<double> h;  // A x
  };

  RowMatrix<double> A;
  Matrix<double> B;
  Vector<double> gain;

  Index in_features() const { return A.cols(); }
  Index out_features() const { return B.rows(); }
  Index max_rank() const { return A.rows(); }
  Index components() const { return gain.size(); }  // fewer than max_rank if they were cut

  void prepare_forward(ConstMatrixRef<double> x, const BatchRanks& ranks, Cache& cache) const {
    check_forward(x, ranks);
    cache.ranks = ranks.at_most(components());
    cache.samples = x.cols();
    cache.h = A.topRows(cache.ranks.highest()) * x;
  }

  // A batch may hold columns of several ranks: each run of them has a term of its own.
  void for_each_forward_term(const Cache& cache, auto&& f) const {
    cache.ranks.for_each_run(cache.samples, [&](Index begin, Index n, RankSlice rank) {
      const Matrix<double> gh = gain.head(rank.active).asDiagonal() * cache.h.block(0, begin, rank.active, n);
      f(begin, n, LowRankTerm<double>{B.leftCols(rank.active), gh});
    });
  }

  void prepare_backward(ConstMatrixRef<double> x, ConstMatrixRef<double> dy, const Cache& cache, Gradients& gradients,
                        Workspace& workspace) const {
    check_backward(x, dy, cache, gradients, workspace);
    workspace.dh = B.leftCols(cache.ranks.highest()).transpose() * dy;
    cache.ranks.for_each_run(cache.samples, [&](Index begin, Index n, RankSlice rank) {
      for (Index i = rank.trainable_from; i < rank.active; ++i)
        gradients.gain[i] += workspace.dh.row(i).segment(begin, n).dot(cache.h.row(i).segment(begin, n));
      gradients.gain.components.insert(rank);
    });
  }

  void for_each_backward_term(const Cache& cache, const Workspace& workspace, auto&& f) const {
    cache.ranks.for_each_run(cache.samples, [&](Index begin, Index n, RankSlice rank) {
      const Matrix<double> gdh = gain.head(rank.active).asDiagonal() * workspace.dh.block(0, begin, rank.active, n);
      f(begin, n, LowRankTerm<double>{A.topRows(rank.active).transpose(), gdh});
    });
  }

  static void members(const auto& f, auto&... t) { f(Parameter{"gain", RankAxis::rows}, t.gain...); }
};

int main() {
  Rng rng(7);
  const RandomBasis adapter{{},
                            random_uniform<double, RowMatrix<double>>(6, 12, 1, rng),
                            random_uniform<double>(10, 6, 1, rng),
                            Vector<double>::LinSpaced(6, 0.5, 1.5)};

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
  Linear<double, RandomBasis> layer(W, adapter);
  const Matrix<double> target = W * x + layer.adapter.B * layer.adapter.A * x;  // reached by gains of 1
  Linear<double, RandomBasis>::Cache cache;
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
