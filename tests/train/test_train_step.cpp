#include "dylora/train/train_step.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "dylora/layers/linear.hpp"
#include "dylora/ranks/groups.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/loss.hpp"
#include "dylora/train/sgd.hpp"
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

  MatrixX<double> x(Index i) const { return noise<double>(7, 4, 10 + static_cast<std::uint64_t>(i)); }
  MatrixX<double> target(Index i) const { return noise<double>(6, 4, 20 + static_cast<std::uint64_t>(i)); }

  /// A micro-batch like any other.
  double micro_batch(Index i, RankSlice rank, double weight) {
    MatrixX<double> dy(6, 4);
    const double loss = mse<double>(layer.forward(x(i), rank, cache), target(i), dy, weight);
    (void)layer.backward(dy, cache, gradients);
    ranks.push_back(rank);
    losses.push_back(loss);
    return loss;
  }

  double step(const StepRanks& parts) {
    return train_step(layer, optimizer, gradients, parts, [&](Index i, RankSlice rank, double w) { return micro_batch(i, rank, w); });
  }

  template <class Sampler>
  double step(Index micro_batches, const Sampler& sampler) {
    return step(FreshRanks(sampler, micro_batches)(optimizer.steps(), rng));
  }
};

/// Trains for `steps`, one of which is first tried in ways that are refused, attempt(training): parameters and moments must then be those
/// of a training without.
template <class Attempt>
void check_refused_step_never_was(int steps, int tried, Attempt&& attempt) {
  Training training, undisturbed;
  for (int step = 0; step < steps; ++step) {
    if (step == tried) {
      const VectorX<double> before = values<L>(training.layer);
      attempt(training);
      CHECK(same_bits(values<L>(training.layer), before));
      CHECK(training.optimizer.steps() == tried);
    }
    (void)training.step(2, UniformRank{1, 5});
    (void)undisturbed.step(2, UniformRank{1, 5});
  }
  CHECK(same_bits(values<L>(training.layer), values<L>(undisturbed.layer)));
}

/// sum += weight · gradients, and their components.
void add_weighted(const L::Gradients& gradients, L::Gradients& sum, double weight) {
  for_each_parameter<L>(
      [&](Parameter, const auto& g, auto& s) {
        s += weight * g;
        s.components.insert(g.components);
      },
      gradients, sum);
}

/// 40 sequences of one column each.
struct Batch {
  MatrixX<double> x = noise<double>(7, 40, 30), target = noise<double>(6, 40, 31);
};

/// One step over the groups of a batch, each by itself; the gradients stay in `gradients`.
template <class Optimizer>
double step_by_group(L& layer, Optimizer& optimizer, L::Gradients& gradients, const std::vector<RankGroup>& groups, const Batch& batch) {
  StepRanks parts;
  for (const RankGroup& group : groups) parts.push_back({group.rank, 1, group.weight});
  L::Cache cache;
  return train_step(layer, optimizer, gradients, parts, [&](Index i, RankSlice rank, double weight) {
    const RankGroup& group = groups[static_cast<std::size_t>(i)];
    MatrixX<double> dy(6, group.count);
    const MatrixX<double> y = layer.forward(batch.x.middleCols(group.first, group.count), rank, cache);
    const double loss = mse<double>(y, batch.target.middleCols(group.first, group.count), dy, weight);
    (void)layer.backward(dy, cache, gradients);
    return loss;
  });
}

/// The same in one forward and one backward.
template <class Optimizer>
double step_at_once(L& layer, Optimizer& optimizer, L::Gradients& gradients, const std::vector<RankGroup>& groups, const Batch& batch) {
  L::Cache cache;
  return train_step(layer, optimizer, gradients, [&] {
    const MatrixX<double> y = layer.forward(batch.x, batch_ranks(groups, Sequences::equal(batch.x.cols(), 1)), cache);
    MatrixX<double> dy(y.rows(), y.cols());
    double loss = 0, weights = 0;
    for (const RankGroup& group : groups) {
      loss += group.weight * mse<double>(y.middleCols(group.first, group.count), batch.target.middleCols(group.first, group.count),
                                         dy.middleCols(group.first, group.count), group.weight);
      weights += group.weight;
    }
    (void)layer.backward(dy, cache, gradients);
    return loss / weights;
  });
}

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
  fill_components<L>(training.gradients, 99);  // cleared first
  const double loss = training.step(4, UniformRank{1, 5});
  CHECK(training.optimizer.steps() == 1);
  CHECK(loss == Approx((training.losses[0] + training.losses[1] + training.losses[2] + training.losses[3]) / 4).epsilon(1e-15));

  auto sum = zeros_like(by_hand.layer);
  for (Index i = 0; i < 4; ++i) {
    set_zero(by_hand.layer, by_hand.gradients);
    (void)by_hand.micro_batch(i, training.ranks[static_cast<std::size_t>(i)], 1);
    accumulate_gradients(by_hand.layer, sum, by_hand.gradients);
  }
  for_each_value<L>(sum, 0, 5, [](double& g) { g /= 4; });
  CHECK(gap(values<L>(training.gradients), values<L>(sum)) < 1e-14);
  by_hand.optimizer.step(by_hand.layer, sum);
  CHECK(gap(values<L>(training.layer), values<L>(by_hand.layer)) < 1e-13);
}

TEST_CASE("the weights of a plan enter the gradients as they are and the loss returned as a weighted mean") {
  for (const StepRanks& parts : {StepRanks{{4, 0.5, 2}, {1, 0.25, 0.5}, {{3, 1}, 0.25, 0}}, StepRanks{{5, 0.1, 0.25}, {2, 0.9, 0.125}},
                                 StepRanks{{1, 0.2, 1}, {2, 0.2, 0}, {3, 0.2, 0.2}, {4, 0.2, 0.4}, {5, 0.2, 0.1}}}) {
    Training training, by_hand;
    randomize<L>(training.layer, 3);
    by_hand.layer = training.layer;
    const double loss = training.step(parts);
    auto sum = zeros_like(by_hand.layer);
    double weighted = 0, weights = 0;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      set_zero(by_hand.layer, by_hand.gradients);
      weighted += parts[i].weight * by_hand.micro_batch(static_cast<Index>(i), parts[i].rank, 1);
      weights += parts[i].weight;
      add_weighted(by_hand.gradients, sum, parts[i].weight);
    }
    CHECK(loss == Approx(weighted / weights).epsilon(1e-14));
    CHECK(gap(values<L>(training.gradients), values<L>(sum)) < 1e-13);
    CHECK(trained_components<L>(training.gradients) == trained_components<L>(sum));
    by_hand.optimizer.step(by_hand.layer, sum);
    CHECK(gap(values<L>(training.layer), values<L>(by_hand.layer)) < 1e-12);
  }
}

TEST_CASE("the shares of a plan are nothing to its micro-batches") {
  Training one, other;
  CHECK(one.step({{4, 0.5, 1}, {2, 0.5, 3}}) == other.step({{4, 0.9, 1}, {2, 0.01, 3}}));
  CHECK(same_bits(values<L>(one.layer), values<L>(other.layer)));
}

TEST_CASE("a micro-batch of weight 0 is skipped and its components do not count as trained") {
  Training training, without;
  randomize<L>(training.layer, 3);
  without.layer = training.layer;
  const double loss = training.step({{3, 0.5, 1}, {5, 0.5, 0}});
  CHECK(training.ranks == std::vector<RankSlice>{3});
  CHECK_FALSE(training.gradients.adapter.A.components.contains(4));
  CHECK(loss == without.step({{3, 1, 1}}));
  CHECK(same_bits(values<L>(training.gradients), values<L>(without.gradients)));
  CHECK(same_bits(values<L>(training.layer), values<L>(without.layer)));
}

TEST_CASE("a step over one batch clears the gradients and takes one optimiser step and returns the loss as it came") {
  Training training, by_hand;
  randomize<L>(training.layer, 3);
  by_hand.layer = training.layer;
  for (int step = 0; step < 5; ++step) {
    fill_components<L>(training.gradients, 99);
    training.gradients.adapter.A.components.insert(0, law_rank);
    const double loss = train_step(training.layer, training.optimizer, training.gradients, [&] {
      CHECK(values<L>(training.gradients).isZero(0));
      CHECK(training.gradients.adapter.A.components.empty());
      return training.micro_batch(step, 3, 1);
    });
    CHECK(training.optimizer.steps() == step + 1);
    set_zero(by_hand.layer, by_hand.gradients);
    CHECK(loss == by_hand.micro_batch(step, 3, 1));
    by_hand.optimizer.step(by_hand.layer, by_hand.gradients);
    CHECK(same_bits(values<L>(training.gradients), values<L>(by_hand.gradients)));
    CHECK(same_bits(values<L>(training.layer), values<L>(by_hand.layer)));
  }
  const auto negative = [&] { return train_step(training.layer, training.optimizer, training.gradients, [] { return -3.5; }); };
  CHECK(negative() == -3.5);
}

TEMPLATE_TEST_CASE("one batch divided into groups is a step of micro-batches bit for bit", "", AdamW<L>, Sgd<L>) {
  const Batch batch;
  const std::vector<StepRanks> plans{{{1, 1, 1}},
                                     {{5, 0.5, 0.5}, {1, 0.25, 0.25}, {3, 0.25, 0.25}},
                                     {{5, 0.6, 2}, {{4, 3}, 0.1, 0.3}, {2, 0.3, 0.7}},
                                     {{4, 0.5, 1}, {{4, 2}, 0.25, 0.1}, {RankSlice::none(), 0.25, 0.5}},
                                     {{2, 0.98, 0.1}, {1, 0.01, 0}, {5, 0.01, 3}}};
  for (std::size_t plan = 0; plan < plans.size(); ++plan) {
    INFO("plan " << plan);
    L grouped = MakeLayer<L>::make(1, law_rank);
    randomize<L>(grouped, 3);
    L at_once = grouped;
    auto grouped_gradients = zeros_like(grouped), at_once_gradients = zeros_like(at_once);
    TestType grouped_optimizer(grouped, {.lr = 0.05, .weight_decay = 0.1}), at_once_optimizer(at_once, {.lr = 0.05, .weight_decay = 0.1});
    for (int step = 0; step < 4; ++step) {
      const auto groups = divide_sequences(plans[plan], batch.x.cols());
      const double loss = step_by_group(grouped, grouped_optimizer, grouped_gradients, groups, batch);
      CHECK(step_at_once(at_once, at_once_optimizer, at_once_gradients, groups, batch) == loss);
      CHECK(same_bits(values<L>(at_once_gradients), values<L>(grouped_gradients)));
      CHECK(trained_components<L>(at_once_gradients) == trained_components<L>(grouped_gradients));
      CHECK(same_bits(values<L>(at_once), values<L>(grouped)));
    }
  }
}

TEST_CASE("the gradient of a batch divided into groups is that of the weighted sum of their mean losses") {
  const Batch batch;
  Rng rng(5);
  L layer = MakeLayer<L>::make(1, law_rank);
  randomize<L>(layer, 3);
  const auto groups = divide_sequences(WeightedRanks{Sandwich{1, law_rank}, {1, 2, 0.5, 3, 0.25}}(0, rng), batch.x.cols());
  const auto loss = [&](const L& at) {
    double sum = 0;
    for (const RankGroup& group : groups) {
      const MatrixX<double> y = at.forward(batch.x.middleCols(group.first, group.count), group.rank);
      sum += group.weight * mse(y, batch.target.middleCols(group.first, group.count)).value;
    }
    return sum;
  };
  L stepped = layer;
  auto gradients = zeros_like(layer);
  Sgd optimizer(layer, {.lr = 0});
  (void)step_at_once(stepped, optimizer, gradients, groups, batch);
  std::vector<double> differences;
  constexpr double h = 1e-5;
  L moved = layer;
  for_each_parameter(
      [&](Parameter, auto& p) {
        for (Index j = 0; j < p.cols(); ++j) {
          for (Index i = 0; i < p.rows(); ++i) {
            const double before = p(i, j);
            p(i, j) = before + h;
            const double above = loss(moved);
            p(i, j) = before - h;
            const double below = loss(moved);
            p(i, j) = before;
            differences.push_back((above - below) / (2 * h));
          }
        }
      },
      moved);
  const VectorX<double> expected = Eigen::Map<const VectorX<double>>(differences.data(), static_cast<Index>(differences.size()));
  CHECK(gap(values<L>(gradients), expected) < 1e-8);
}

TEST_CASE("weights that are no weights are refused before anything is done") {
  Training training;
  fill_components<L>(training.gradients, 99);
  const VectorX<double> before = values<L>(training.layer);
  for (const double bad : {-1.0, nan<double>, std::numeric_limits<double>::infinity()}) {
    CHECK_THROWS_SAYING(std::invalid_argument, training.step({{1, 0.5, 1}, {2, 0.5, bad}}), "train_step: weight of a micro-batch",
                        "a finite number ≥ 0", "got " + std::to_string(bad));
  }
  CHECK_THROWS_SAYING(std::invalid_argument, training.step({{1, 0.5, 0}, {2, 0.5, 0}}), "train_step: sum of the micro-batches' weights",
                      "a number > 0", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, training.step(StepRanks{}), "train_step: sum of the micro-batches' weights", "got 0");
  CHECK(training.ranks.empty());
  CHECK(training.optimizer.steps() == 0);
  CHECK(same_bits(values<L>(training.layer), before));
  CHECK((values<L>(training.gradients).array() == 99).all());
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
    CHECK(same_bits(component_values<L>(training.layer, i, i + 1), component_values<L>(before, i, i + 1)) == !drawn);
  }
}

TEST_CASE("a step in nested mode updates the components below the largest rank drawn") {
  Training training;
  randomize<L>(training.layer, 3);
  const L before = training.layer;
  (void)training.step(3, UniformRank{1, 4});
  Index largest = 0;
  for (const RankSlice rank : training.ranks) largest = std::max(largest, rank.active);
  CHECK(same_bits(component_values<L>(training.layer, largest), component_values<L>(before, largest)));
  CHECK((component_values<L>(training.layer, 0, largest).array() != component_values<L>(before, 0, largest).array()).all());
}

TEST_CASE("what is no number stops a step with its place and the step never was") {
  check_refused_step_never_was(6, 3, [](Training& training) {
    const auto refused = [&](auto&& spoil) {
      Rng rng(1);
      return [&, rng]() mutable {
        return train_step(training.layer, training.optimizer, training.gradients, FreshRanks(BlockRank{UniformRank{2, 2}, 2}, 3)(3, rng),
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
  });
}

TEST_CASE("what is no number stops a step over one batch with its number and the step never was") {
  check_refused_step_never_was(4, 2, [](Training& training) {
    const auto refused = [&](auto&& spoil) {
      return train_step(training.layer, training.optimizer, training.gradients, [&] { return spoil(training.micro_batch(0, 3, 1)); });
    };
    for (const double bad : {nan<double>, std::numeric_limits<double>::infinity()}) {
      CHECK_THROWS_SAYING(NonFiniteError, refused([&](double) { return bad; }), "step 2: loss", "expected a finite number",
                          "got " + std::to_string(bad), "as they were");
    }
    CHECK_THROWS_SAYING(NonFiniteError, refused([](double) -> double { throw NonFiniteError("the caller's own check"); }),
                        "step 2: the caller's own check");
    CHECK_THROWS_SAYING(std::out_of_range, refused([](double) -> double { throw std::out_of_range("anything else"); }), "anything else");
    CHECK_THROWS_SAYING(NonFiniteError, refused([&](double loss) {
                          training.gradients.adapter.B(2, 1) = nan<double>;
                          return loss;
                        }),
                        "step 2", "gradient of lora_B", "as they were");
  });
}

TEST_CASE("an overflow in a micro-batch is refused with the name of the parameter") {
  Training training;
  randomize<L>(training.layer, 3);
  training.layer.adapter.B.col(0).setConstant(1e300);
  const VectorX<double> before = values<L>(training.layer);
  const auto step = [&] {
    return train_step(training.layer, training.optimizer, training.gradients, StepRanks{{1, 1, 1}}, [&](Index, RankSlice rank, double) {
      (void)training.layer.forward(training.x(0), rank, training.cache);
      (void)training.layer.backward(MatrixX<double>::Constant(6, 4, 1e300), training.cache, training.gradients);
      return 0.0;
    });
  };
  CHECK_THROWS_SAYING(NonFiniteError, step(), "step 0", "gradient of lora_A");
  CHECK(same_bits(values<L>(training.layer), before));
}

}  // namespace dylora::test
