#include "dylora/train/train_step.hpp"

#include <limits>
#include <vector>

#include "dylora/layers/linear.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/loss.hpp"
#include "support/catch.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

using L = Linear<double>;

/// A layer in training, with everything that a step needs.
struct Training {
  L layer = MakeLayer<L>::make(1, law_rank);
  AdamW<L> optimizer{layer, {.lr = 0.05, .weight_decay = 0.1}};
  L::Gradients gradients = zeros_like(layer);
  L::Cache cache;
  Rng rng{7};
  std::vector<RankSlice> ranks;
  std::vector<double> losses;

  Matrix<double> x(Index i) const { return noise<double>(7, 4, 10 + static_cast<std::uint64_t>(i)); }
  Matrix<double> target(Index i) const { return noise<double>(6, 4, 20 + static_cast<std::uint64_t>(i)); }

  /// A micro-batch like any other.
  double micro_batch(Index i, RankSlice rank, double weight) {
    Matrix<double> dy(6, 4);
    const double loss = mse<double>(layer.forward(x(i), rank, cache), target(i), dy, weight);
    (void)layer.backward(dy, cache, gradients);
    ranks.push_back(rank);
    losses.push_back(loss);
    return loss;
  }

  template <class Sampler>
  double step(Index micro_batches, const Sampler& sampler) {
    return train_step(layer, optimizer, gradients, micro_batches, sampler, rng,
                      [&](Index i, RankSlice rank, double w) { return micro_batch(i, rank, w); });
  }
};

}  // namespace

TEST_CASE("each micro-batch gets a rank of its own from the sampler") {
  Training training;
  (void)training.step(6, UniformRank{1, 5});
  Rng rng(7);
  REQUIRE(training.ranks.size() == 6);
  for (const RankSlice rank : training.ranks) CHECK(rank == UniformRank{1, 5}(rng));
  CHECK(std::any_of(training.ranks.begin(), training.ranks.end(), [&](RankSlice rank) { return !(rank == training.ranks[0]); }));
}

TEST_CASE("a step is one optimiser step with the mean of the gradients and returns the mean of the losses") {
  Training training, by_hand;
  randomize<L>(training.layer, 3);
  by_hand.layer = training.layer;
  fill_values<L>(training.gradients, 99);  // cleared first
  const double loss = training.step(4, UniformRank{1, 5});
  CHECK(training.optimizer.steps() == 1);
  CHECK(loss == Approx((training.losses[0] + training.losses[1] + training.losses[2] + training.losses[3]) / 4).epsilon(1e-15));

  auto sum = zeros_like(by_hand.layer);
  for (Index i = 0; i < 4; ++i) {
    set_zero(by_hand.layer, by_hand.gradients);
    (void)by_hand.micro_batch(i, training.ranks[static_cast<std::size_t>(i)], 1);
    add(by_hand.layer, sum, by_hand.gradients);
  }
  for_each_value<L>(sum, 0, 5, [](double& g) { g /= 4; });
  CHECK(gap(values<L>(training.gradients), values<L>(sum)) < 1e-14);
  by_hand.optimizer.step(by_hand.layer, sum);
  CHECK(gap(values<L>(training.layer), values<L>(by_hand.layer)) < 1e-13);
}

TEST_CASE("one micro-batch is the algorithm of the paper") {
  Training training, by_hand;
  for (int step = 0; step < 20; ++step) {
    const double loss = training.step(1, FrozenPrefix{UniformRank{1, 5}});
    const RankSlice rank = FrozenPrefix{UniformRank{1, 5}}(by_hand.rng);
    set_zero(by_hand.layer, by_hand.gradients);
    CHECK(by_hand.micro_batch(0, rank, 1) == loss);
    by_hand.optimizer.step(by_hand.layer, by_hand.gradients);
  }
  CHECK(same_bits(values<L>(training.layer), values<L>(by_hand.layer)));
}

TEST_CASE("a step in frozen mode updates exactly the components that were drawn") {
  Training training;
  randomize<L>(training.layer, 3);
  const L before = training.layer;
  (void)training.step(3, FrozenPrefix{UniformRank{1, 5}});
  for (Index i = 0; i < 5; ++i) {
    const bool drawn = std::any_of(training.ranks.begin(), training.ranks.end(), [&](RankSlice rank) { return rank.active == i + 1; });
    CHECK(same_bits(values<L>(training.layer, i, i + 1), values<L>(before, i, i + 1)) == !drawn);
  }
}

TEST_CASE("a step in nested mode updates the components below the largest rank drawn") {
  Training training;
  randomize<L>(training.layer, 3);
  const L before = training.layer;
  (void)training.step(3, UniformRank{1, 4});
  Index largest = 0;
  for (const RankSlice rank : training.ranks) largest = std::max(largest, rank.active);
  CHECK(same_bits(values<L>(training.layer, largest), values<L>(before, largest)));
  CHECK((values<L>(training.layer, 0, largest).array() != values<L>(before, 0, largest).array()).all());
}

TEST_CASE("what is no number stops a step with its place and the step never was") {
  Training training, undisturbed;
  for (int step = 0; step < 6; ++step) {
    if (step == 3) {
      const Vector<double> before = values<L>(training.layer);
      const auto refused = [&](auto&& spoil) {
        Rng rng(1);
        return [&, rng]() mutable {
          return train_step(training.layer, training.optimizer, training.gradients, 3, BlockRank{UniformRank{2, 2}, 2}, rng,
                            [&](Index i, RankSlice rank, double weight) {
                              const double loss = training.micro_batch(i, rank, weight);
                              return i == 1 ? spoil(loss) : loss;
                            });
        };
      };
      for (const double bad : {nan<double>, std::numeric_limits<double>::infinity()}) {
        CHECK_THROWS_SAYING(NonFiniteError, refused([&](double) { return bad; })(), "step 3", "micro-batch 1", "rank 4", "loss",
                            "expected a finite number", "as they were");
      }
      CHECK_THROWS_SAYING(NonFiniteError, refused([](double) -> double { throw NonFiniteError("the caller's own check"); })(), "step 3",
                          "micro-batch 1", "rank 4", "the caller's own check");
      CHECK_THROWS_SAYING(NonFiniteError, refused([&](double loss) {
                            training.gradients.adapter.A(2, 3) = nan<double>;
                            return loss;
                          })(),
                          "step 3", "gradient of lora_A", "as they were");
      CHECK(same_bits(values<L>(training.layer), before));
      CHECK(training.optimizer.steps() == 3);
    }
    (void)training.step(2, UniformRank{1, 5});
    (void)undisturbed.step(2, UniformRank{1, 5});
  }
  CHECK(same_bits(values<L>(training.layer), values<L>(undisturbed.layer)));
}

TEST_CASE("an overflow in a micro-batch is refused with the name of the parameter") {
  Training training;
  randomize<L>(training.layer, 3);
  training.layer.adapter.B.col(0).setConstant(1e300);
  const Vector<double> before = values<L>(training.layer);
  const auto step = [&] {
    return train_step(training.layer, training.optimizer, training.gradients, 1, UniformRank{1, 1}, training.rng,
                      [&](Index, RankSlice rank, double) {
                        (void)training.layer.forward(training.x(0), rank, training.cache);
                        (void)training.layer.backward(Matrix<double>::Constant(6, 4, 1e300), training.cache, training.gradients);
                        return 0.0;
                      });
  };
  CHECK_THROWS_SAYING(NonFiniteError, step(), "step 0", "gradient of lora_A");
  CHECK(same_bits(values<L>(training.layer), before));
}

TEST_CASE("a step needs at least one micro-batch") {
  Training training;
  CHECK_THROWS_SAYING(std::invalid_argument, training.step(0, UniformRank{1, 5}), "train_step: micro_batches", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, training.step(-1, UniformRank{1, 5}), "train_step: micro_batches", "got -1");
}

/// With a constant scale, squared error and whitened inputs the nested objective has one optimum for all ranks: at each b the best rank-b
/// approximation of the change (Eckart and Young).
TEST_CASE("trained at all ranks with a constant scale an adapter is the best approximation at each of them") {
  const Index n = 8, max_rank = 4;
  Rng rng(3);
  Linear<double> layer(Matrix<double>(noise<double>(n, n, 1)), {.max_rank = max_rank, .alpha = 4, .scale = alpha_over_max_rank}, rng);
  // The change: known singular values along orthogonal directions.
  const Vector<double> u = Vector<double>::Constant(n, 1 / std::sqrt(8.0));
  const Matrix<double> U = Matrix<double>::Identity(n, n) - 2 * u * u.transpose();
  Vector<double> sigma(n);
  sigma << 4, 3, 2, 1, 0.5, 0.25, 0, 0;
  const Matrix<double> change = U * sigma.asDiagonal();
  const Matrix<double> x = Matrix<double>::Identity(n, n), target = (layer.base.W + change) * x;
  auto gradients = zeros_like(layer);
  Linear<double>::Cache cache;
  AdamW optimizer(layer, {.lr = 0.02});
  // Every rank in every step: the expectation of the paper's objective, without its noise.
  Matrix<double> dy(n, n);
  for (int step = 0; step < 3000; ++step) {
    optimizer.set_learning_rate(0.02 * (1 - step / 3000.0));
    set_zero(layer, gradients);
    for (Index b = 1; b <= max_rank; ++b) {
      (void)mse<double>(layer.forward(x, b, cache), target, dy, 1.0 / max_rank);
      (void)layer.backward(dy, cache, gradients);
    }
    optimizer.step(layer, gradients);
  }
  for (Index b = 1; b <= max_rank; ++b) {
    const double best = sigma.tail(n - b).norm();
    CHECK((layer.adapter.delta(b) - change).norm() == Approx(best).epsilon(0.01));
  }
}

}  // namespace dylora::test
