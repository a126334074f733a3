#include "dylora/methods/adalora/importance.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/adapters/stacked.hpp"
#include "dylora/io/checkpoint/archive.hpp"
#include "dylora/io/checkpoint/file.hpp"
#include "dylora/layers/attention/attention.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/ranks/permute.hpp"
#include "dylora/ranks/truncate.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/loss.hpp"
#include "dylora/train/train_step.hpp"
#include "methods/adalora/trained_layer.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

/// The gradients of a backward at this slice.
Linear<double>::Gradients gradients_of(const Linear<double>& layer, RankSlice rank, std::uint64_t seed) {
  Linear<double>::Cache cache;
  auto gradients = zeros_like(layer);
  (void)layer.forward(noise<double>(in, 5, seed), rank, cache);
  (void)layer.backward(noise<double>(out, 5, seed + 100), cache, gradients);
  return gradients;
}

/// The averages of one entry, by the formula.
struct Entry {
  double sensitivity = 0, uncertainty = 0;
  void update(double p, double g, double beta1, double beta2) {
    const double now = std::abs(p * g);
    sensitivity = beta1 * sensitivity + (1 - beta1) * now;
    uncertainty = beta2 * uncertainty + (1 - beta2) * std::abs(now - sensitivity);
  }
  double score() const { return sensitivity * uncertainty; }
};

}  // namespace

TEST_CASE("oracle of AdaLoRA: the scores are those of a straightforward reference") {
  Linear<double> layer = trained_layer();
  constexpr double beta1 = 0.7, beta2 = 0.6;
  ImportanceTracker tracker(layer, {.beta1 = beta1, .beta2 = beta2});
  AdamW optimizer(layer, {.lr = 0.01});
  std::vector<std::vector<Entry>> a(max_rank, std::vector<Entry>(in)), b(max_rank, std::vector<Entry>(out));
  std::uint64_t seed = 10;
  for (const RankSlice rank : {RankSlice(4), RankSlice(2), RankSlice(3, 2), RankSlice(4), RankSlice(1), RankSlice(4, 3)}) {
    const auto gradients = gradients_of(layer, rank, seed++);
    tracker.update(layer, gradients);
    for (Index k = rank.trainable_from; k < rank.active; ++k) {  // those that took part
      const auto at = static_cast<std::size_t>(k);
      for (Index j = 0; j < in; ++j)
        a[at][static_cast<std::size_t>(j)].update(layer.adapter.A(k, j), gradients.adapter.A(k, j), beta1, beta2);
      for (Index i = 0; i < out; ++i)
        b[at][static_cast<std::size_t>(i)].update(layer.adapter.B(i, k), gradients.adapter.B(i, k), beta1, beta2);
    }
    optimizer.step(layer, gradients);
  }
  const auto scores = tracker.scores(layer);
  REQUIRE(scores.size() == 1);
  REQUIRE(scores[0].size() == max_rank);
  for (std::size_t k = 0; k < max_rank; ++k) {
    double expected = 0;
    for (const Entry& entry : a[k]) expected += entry.score() / in;
    for (const Entry& entry : b[k]) expected += entry.score() / out;
    CHECK(scores[0][k] == Approx(expected).epsilon(1e-12));
    CHECK(expected > 0);
  }
}

TEST_CASE("oracle of AdaLoRA: the gradient of a singular value follows from those of A and of B") {
  // y = … + s B diag(E) A x at E = 1: dE_k = s Σ h_k (Bᵀ dy)_k, which is ⟨A_k, dA_k⟩ and ⟨B_k, dB_k⟩.
  const Linear<double> layer = trained_layer();
  const MatrixX<double> x = noise<double>(in, 5, 3), dy = noise<double>(out, 5, 4);
  for (Index b = 1; b <= max_rank; ++b) {
    Linear<double>::Cache cache;
    auto gradients = zeros_like(layer);
    (void)layer.forward(x, b, cache);
    (void)layer.backward(dy, cache, gradients);
    const MatrixX<double> h = layer.adapter.A * x, back = layer.adapter.B.transpose() * dy;
    const VectorX<double> dE = layer.adapter.scale(b) * h.cwiseProduct(back).topRows(b).rowwise().sum();
    const VectorX<double> of_A = layer.adapter.A.cwiseProduct(gradients.adapter.A).topRows(b).rowwise().sum();
    const VectorX<double> of_B = layer.adapter.B.cwiseProduct(gradients.adapter.B).leftCols(b).colwise().sum();
    CHECK(gap(of_A, dE) < 4 * rounding<double>);
    CHECK(gap(of_B, dE) < 4 * rounding<double>);
    // And it is the derivative: E_k scales row k of A.
    for (Index k = 0; k < b; ++k) {
      const auto value = [&](double e) {
        Linear<double> scaled = layer;
        scaled.adapter.A.row(k) *= e;
        return scaled.forward(x, b).cwiseProduct(dy).sum();
      };
      CHECK(dE[k] == Approx((value(1 + 1e-5) - value(1 - 1e-5)) / 2e-5).epsilon(1e-7).margin(1e-9));
    }
  }
}

TEST_CASE("oracle of AdaLoRA: components in another order are the same function at full rank") {
  using Model = Attention<double, Linear<double>, Linear<double, Stacked<LowRank<double>>>>;
  Rng rng(1);
  const MatrixX<double> W = noise<double>(8, 8, 1);
  const auto projection = [&](Index rank) { return Linear<double>(W, {.max_rank = rank}, rng); };
  Model model{projection(5),
              Linear<double, Stacked<LowRank<double>>>(W, {.adapters = {{.max_rank = 4}, {.max_rank = 3}}}, rng),
              projection(0),
              projection(3),
              {.heads = 2}};
  randomize<Model>(model, 2);
  const Model before = model;
  const std::vector<std::vector<Index>> orders{{3, 0, 4, 1, 2}, {2, 3, 1, 0}, {1, 2, 0}, {}, {0, 2, 1}};
  permute_components(model, orders);
  const MatrixX<double> x = noise<double>(8, 6, 3);
  CHECK(gap(model.forward(x, Sequences::equal(2, 3), 5), before.forward(x, Sequences::equal(2, 3), 5)) < 4 * rounding<double>);
  CHECK(gap(model.forward(x, Sequences::equal(2, 3), 1), before.forward(x, Sequences::equal(2, 3), 1)) > 1e-3);
  for (Index i = 0; i < 5; ++i) {
    const Index from = orders[0][static_cast<std::size_t>(i)];
    CHECK(model.q.adapter.A.row(i) == before.q.adapter.A.row(from));
    CHECK(model.q.adapter.B.col(i) == before.q.adapter.B.col(from));
  }
  for (Index i = 0; i < 3; ++i)
    CHECK(model.k.adapter.slices[1].B.col(i) == before.k.adapter.slices[1].B.col(orders[2][static_cast<std::size_t>(i)]));
}

TEST_CASE("oracle of AdaLoRA: a component that alone does the work comes first and is the prefix that is served") {
  // The target is a change of rank 1. Only the third component begins near it; the others begin at almost nothing.
  const MatrixX<double> W = noise<double>(out, in, 1), u = noise<double>(out, 1, 2), v = noise<double>(1, in, 3);
  const MatrixX<double> x = noise<double>(in, 60, 4), target = (W + u * v) * x;
  Linear<double> layer(W, LowRank<double>(RowMatrix<double>(1e-3 * noise<double>(max_rank, in, 5)), 1e-3 * noise<double>(out, max_rank, 6),
                                          {.alpha = max_rank, .scale = alpha_over_max_rank}));
  layer.adapter.A.row(2) = 0.8 * v;
  layer.adapter.B.col(2) = 0.8 * u;
  ImportanceTracker tracker(layer);
  AdamW optimizer(layer, {.lr = 1e-3});
  Linear<double>::Cache cache;
  auto gradients = zeros_like(layer);
  for (int step = 0; step < 200; ++step) {
    train_step(layer, optimizer, gradients, [&] {
      const auto loss = mse(layer.forward(x, max_rank, cache), target);
      layer.backward(loss.gradient, cache, gradients);
      tracker.update(layer, gradients);
      return loss.value;
    });
  }
  const auto order = tracker.order(layer);
  CHECK(order[0].front() == 2);
  const double before = mse(layer.forward(x, 1), target).value;
  permute_components(layer, order);
  const double after = mse(layer.forward(x, 1), target).value;
  CHECK(after < before / 10);
}

TEST_CASE("equal scores leave components where they are") {
  const Linear<double> layer = trained_layer();
  const ImportanceTracker tracker(layer);
  CHECK(tracker.order(layer) == std::vector<std::vector<Index>>{{0, 1, 2, 3}});
  CHECK(tracker.scores(layer) == std::vector<std::vector<double>>{{0, 0, 0, 0}});
}

TEST_CASE("a component's score depends on the steps that trained it and on no other") {
  const Linear<double> layer = trained_layer();
  ImportanceTracker all(layer), last(layer);
  all.update(layer, gradients_of(layer, RankSlice(2), 10));
  all.update(layer, gradients_of(layer, RankSlice(4, 3), 11));
  last.update(layer, gradients_of(layer, RankSlice(4, 3), 11));
  CHECK(all.scores(layer)[0][3] == last.scores(layer)[0][3]);
  CHECK(all.scores(layer)[0][2] == 0);
  CHECK(all.scores(layer)[0][0] > 0);
}

TEST_CASE("a tracker goes on from its checkpoint bit for bit") {
  const Linear<double> layer = trained_layer();
  ImportanceTracker tracker(layer), resumed(layer);
  tracker.update(layer, gradients_of(layer, RankSlice(4), 10));
  const std::string bytes = checkpoint_bytes(1, [&](auto& archive) { archive("importance", tracker); });
  read_checkpoint(std::as_bytes(std::span(bytes)), "run/file", [&](auto& archive) { archive("importance", resumed); });
  tracker.update(layer, gradients_of(layer, RankSlice(3), 11));
  resumed.update(layer, gradients_of(layer, RankSlice(3), 11));
  CHECK(tracker.scores(layer) == resumed.scores(layer));
}

TEST_CASE("gradients that do not fit are refused and nothing has changed") {
  Linear<double> layer = trained_layer();
  for (const double beta : {-0.1, 1.0, nan<double>}) {
    CHECK_THROWS_SAYING(std::invalid_argument, ImportanceTracker(layer, {.beta1 = beta}), "ImportanceTracker: beta1", "[0, 1)", "got");
    CHECK_THROWS_SAYING(std::invalid_argument, ImportanceTracker(layer, {.beta2 = beta}), "ImportanceTracker: beta2", "[0, 1)", "got");
  }
  ImportanceTracker tracker(layer);
  CHECK_THROWS_SAYING(ShapeError, tracker.update(layer, {}), "ImportanceTracker: gradient of lora_A", "expected 4 × 9", "got 0 × 0");
  auto gradients = gradients_of(layer, RankSlice(4), 10);
  gradients.adapter.B(0, 0) = nan<double>;
  CHECK_THROWS_SAYING(NonFiniteError, tracker.update(layer, gradients), "ImportanceTracker", "finite", "NaN");
  CHECK(tracker.scores(layer) == std::vector<std::vector<double>>{{0, 0, 0, 0}});
  truncate(layer, 2);
  CHECK_THROWS_SAYING(ShapeError, tracker.scores(layer), "ImportanceTracker: averages of lora_A", "expected 2 × 9", "got 4 × 9");
}

}  // namespace dylora::test
