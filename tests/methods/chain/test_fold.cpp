#include "dylora/methods/chain/fold.hpp"

#include <Eigen/QR>
#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "dylora/adapters/dropout.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/adapters/none.hpp"
#include "dylora/adapters/stacked.hpp"
#include "dylora/io/checkpoint/archive.hpp"
#include "dylora/io/checkpoint/file.hpp"
#include "dylora/layers/attention/attention.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/methods/chain/chain.hpp"
#include "dylora/methods/chain/stages.hpp"
#include "dylora/ranks/scale.hpp"
#include "dylora/ranks/truncate.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/loss.hpp"
#include "dylora/train/sgd.hpp"
#include "support/catch.hpp"
#include "support/make.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

constexpr Index in = 9, out = 7, max_rank = 4;

/// A layer whose factors are all at random.
template <class S, class A = LowRank<S>, class W = DenseWeight<S>>
Linear<S, A, W> trained_layer(ScaleRule scale = alpha_over_rank) {
  Rng rng(1);
  Linear<S, A, W> layer(typename MakeWeight<W>::Storage(noise<S>(out, in, 1)), {.max_rank = max_rank, .alpha = 3, .scale = scale}, rng);
  randomize<Linear<S, A, W>>(layer, 2);
  return layer;
}

/// A regression on whose optimum no fold can have an influence but through the layer.
struct Regression {
  MatrixX<double> x = noise<double>(in, 40, 5), target = noise<double>(out, 40, 6);
};

/// `steps` steps of AdamW from `first`, at ranks that differ.
void train(Linear<double>& layer, AdamW<Linear<double>>& optimizer, Index first, Index steps) {
  const Regression task;
  Linear<double>::Cache cache;
  auto gradients = zeros_like(layer);
  for (Index step = first; step < first + steps; ++step) {
    set_zero(layer, gradients);
    const auto loss = mse(layer.forward(task.x, 1 + step % layer.max_rank(), cache), task.target);
    layer.backward(loss.gradient, cache, gradients);
    optimizer.step(layer, gradients);
  }
}

/// The layer after each of 20 steps, where after_step(step, layer, optimizer) may change it between two.
template <class AfterStep>
std::vector<VectorX<double>> trajectory(AfterStep after_step) {
  Linear<double> layer = trained_layer<double>();
  AdamW optimizer(layer, {.lr = 0.01});
  std::vector<VectorX<double>> states;
  for (Index step = 0; step < 20; ++step) {
    train(layer, optimizer, step, 1);
    after_step(step, layer, optimizer);
    states.emplace_back(layer.base.W.size() + parameter_count(layer));
    states.back() << layer.base.W.reshaped(), values<Linear<double>>(layer);
  }
  return states;
}

/// The first step after which two runs differ in a bit; 20 if they never do.
Index first_difference(const std::vector<VectorX<double>>& run, const std::vector<VectorX<double>>& other) {
  return std::mismatch(run.begin(), run.end(), other.begin(), same_bits<VectorX<double>, VectorX<double>>).first - run.begin();
}

/// A run of LoRA, which knows of no stages.
std::vector<VectorX<double>> plain_run() {
  return trajectory([](auto&&...) {});
}

/// A run that folds where a stage ends.
template <Stages T>
std::vector<VectorX<double>> staged_run(const T& stages) {
  return trajectory([&, rng = Rng(4)](Index step, auto& layer, auto& optimizer) mutable {
    if (!stages.ends_after(step)) return;
    fold(layer, max_rank, rng);
    optimizer = AdamW(layer, optimizer.options());
  });
}

/// The same by hand: after each of these steps Δ is added to W, and adapter and optimiser are new.
std::vector<VectorX<double>> run_by_hand(const std::vector<Index>& last_steps) {
  return trajectory([&, rng = Rng(4)](Index step, auto& layer, auto& optimizer) mutable {
    if (std::find(last_steps.begin(), last_steps.end(), step) == last_steps.end()) return;
    layer.base.W += layer.adapter.delta(max_rank);
    layer.adapter = LowRank<double>(in, out, layer.adapter.options, rng);
    optimizer = AdamW(layer, {.lr = 0.01});
  });
}

using Adapted = Linear<double>;
using Frozen = FrozenLinear<double, WeightView<double>>;  // mapped: nothing could be added to it
using Dropping = Linear<double, Dropout<LowRank<double>>>;
using Slices = Linear<double, Stacked<LowRank<double>>>;

/// A layer of each kind.
struct Whole {
  using Scalar = double;
  struct Gradients {
    Adapted::Gradients a;
    Frozen::Gradients frozen;
    Dropping::Gradients d;
    Slices::Gradients m;
  };
  Adapted a;
  Frozen frozen;
  Dropping d;
  Slices m;

  static void members(const auto& f, auto&... t) {
    f(Child<Adapted>{"a"}, t.a...);
    f(Child<Frozen>{"frozen"}, t.frozen...);
    f(Child<Dropping>{"d"}, t.d...);
    f(Child<Slices>{"m"}, t.m...);
  }
};

/// A layer that trains more than its adapter.
struct WithMagnitude {
  using Scalar = double;
  struct Gradients {
    LowRank<double>::Gradients adapter;
    VectorX<double> magnitude;
  };
  DenseWeight<double> base;
  LowRank<double> adapter;
  VectorX<double> magnitude = VectorX<double>::Ones(out);

  static void members(const auto& f, auto&... t) {
    f(Child<LowRank<double>>{}, t.adapter...);
    f(Parameter{"lora_magnitude_vector"}, t.magnitude...);
  }
};

/// The rank of a matrix, as far as rounding lets it be seen.
Index rank_of(const MatrixX<double>& m) {
  Eigen::ColPivHouseholderQR<MatrixX<double>> qr(m);
  qr.setThreshold(1e-9);
  return qr.rank();
}

/// Least squares over whitened inputs (x xᵀ = 1, so the loss is ‖W + Δ − target‖² for any x), by gradient steps on the factors.
double fit(Linear<double>& layer, const MatrixX<double>& target, int steps) {
  const MatrixX<double> x = MatrixX<double>::Identity(in, in);
  Linear<double>::Cache cache;
  auto gradients = zeros_like(layer);
  AdamW optimizer(layer, {.lr = 0.05});
  for (int step = 0; step < steps; ++step) {
    optimizer.set_learning_rate(0.05 * (1 - static_cast<double>(step) / steps));
    set_zero(layer, gradients);
    const MatrixX<double> error = layer.forward(x, layer.max_rank(), cache) - target;
    layer.backward(error, cache, gradients);
    optimizer.step(layer, gradients);
  }
  return (layer.forward(x, layer.max_rank()) - target).squaredNorm();
}

}  // namespace

TEMPLATE_TEST_CASE("oracle of PeriodicLoRA: a plain unload leaves the output as it is", "", float, double) {
  using S = TestType;
  for (Index rank = 1; rank <= max_rank; ++rank) {
    Linear<S> layer = trained_layer<S>();
    const MatrixX<S> x = noise<S>(in, 6, 3), before = layer.forward(x, rank), base = layer.base.dense() * x;
    Rng rng(4);
    fold(layer, rank, rng);
    CHECK(layer.adapter.B.isZero(0));
    const MatrixX<S> after = layer.forward(x, rank);
    CHECK(gap(in_double(after), in_double(before)) < rounding<S>);
    CHECK(gap(in_double(after), in_double(base)) > 0.01);
    const S bound = static_cast<S>(1 / std::sqrt(double(in)));  // Kaiming with a = √5, as a fresh adapter
    CHECK(layer.adapter.A.cwiseAbs().maxCoeff() <= bound);
    CHECK(layer.adapter.A.cwiseAbs().maxCoeff() > bound / 2);
  }
}

TEST_CASE("oracle of PeriodicLoRA: the published momentum leaves W + (1 − m + m²) s B A in effect") {
  for (const double m : {0.1, 0.25, 0.5, 0.9}) {
    for (Index rank = 1; rank <= max_rank; ++rank) {
      Linear<double> layer = trained_layer<double>();
      const MatrixX<double> W = layer.base.W, delta = layer.adapter.delta(rank);
      Rng rng(4);
      fold(layer, rank, rng, {.fraction = m, .remainder = Remainder::as_published});
      CHECK(gap(layer.base.W, W + m * delta) < rounding<double>);
      CHECK(gap(layer.adapter.delta(rank), (1 - m) * (1 - m) * delta) < rounding<double>);
      CHECK(gap(layer.merged(rank).W, W + (1 - m + m * m) * delta) < rounding<double>);
      CHECK(rng.state() == Rng(4).state());  // nothing is drawn
    }
  }
}

TEMPLATE_TEST_CASE("oracle of PeriodicLoRA: the continuous momentum leaves the output as it is", "", float, double) {
  using S = TestType;
  for (const double m : {0.1, 0.5, 0.9}) {
    for (Index rank = 1; rank <= max_rank; ++rank) {
      Linear<S> layer = trained_layer<S>();
      const MatrixX<S> x = noise<S>(in, 6, 3), before = layer.forward(x, rank), W = layer.base.W, delta = layer.adapter.delta(rank);
      Rng rng(4);
      fold(layer, rank, rng, {.fraction = m});
      CHECK(gap(in_double<S>(layer.forward(x, rank)), in_double(before)) < rounding<S>);
      CHECK(gap(in_double<S>(layer.base.W), in_double<S>(W + S(m) * delta)) < rounding<S>);
    }
  }
}

TEST_CASE("oracle of PeriodicLoRA: without an unload the trajectory is that of LoRA bit for bit") {
  const Index never = std::numeric_limits<Index>::max();
  for (const Index interval : {Index{21}, Index{40}, never})
    CHECK(first_difference(staged_run(EveryInterval(interval)), plain_run()) == 20);
  for (const Index interval : {1, 7, 19, 20}) CHECK(first_difference(staged_run(EveryInterval(interval)), plain_run()) == interval - 1);
}

TEST_CASE("oracle of PeriodicLoRA: a run is that of adding each interval's product to W by hand bit for bit") {
  CHECK(first_difference(staged_run(EveryInterval(7)), run_by_hand({6, 13})) == 20);
  CHECK(first_difference(staged_run(EveryInterval(5)), run_by_hand({4, 9, 14, 19})) == 20);
}

TEST_CASE("oracle of PeriodicLoRA: k stages of rank r change W by rank k r") {
  Rng rng(1);
  Linear<double> layer(MatrixX<double>(noise<double>(out, in, 1)), {.max_rank = 2, .alpha = 4}, rng);
  const MatrixX<double> W = layer.base.W;
  for (Index stage = 1; stage <= 4; ++stage) {
    AdamW optimizer(layer, {.lr = 0.05});
    train(layer, optimizer, 0, 30);
    fold(layer, 2, rng);
    CHECK(rank_of(layer.base.W - W) == std::min<Index>(2 * stage, out));
  }
}

TEST_CASE("oracle of PeriodicLoRA: after a reset there are no moments and no steps") {
  Linear<double> layer = trained_layer<double>();
  AdamW optimizer(layer, {.lr = 0.01, .weight_decay = 0.1});
  train(layer, optimizer, 0, 10);
  Rng rng(4);
  fold(layer, max_rank, rng);
  optimizer.set_learning_rate(0.02);
  optimizer = AdamW(layer, optimizer.options());
  CHECK(optimizer.steps() == 0);
  CHECK(optimizer.options().lr == 0.02);
  // The state that a checkpoint writes is that of an optimiser which never stepped, to the byte.
  const auto state_of = [](auto& any) { return checkpoint_bytes(0, [&](auto& archive) { archive("optimizer", any); }); };
  AdamW fresh(layer, {.lr = 0.02, .weight_decay = 0.1});
  CHECK(state_of(optimizer) == state_of(fresh));
  train(layer, optimizer, 0, 1);
  CHECK(state_of(optimizer) != state_of(fresh));
}

TEST_CASE("oracle of Chain of LoRA: a knot and a fresh link leave the output as it is") {
  Linear<double> layer = trained_layer<double>();
  AdamW optimizer(layer, {.lr = 0.01});
  Rng rng(4);
  const StageLengths knots = StageLengths::equal(3, 30);
  const MatrixX<double> x = noise<double>(in, 6, 3);
  int tied = 0;
  for (Index step = 0; step < 30; ++step) {
    train(layer, optimizer, step, 1);
    if (!knots.ends_after(step)) continue;
    const MatrixX<double> before = layer.forward(x, max_rank);
    fold(layer, max_rank, rng);
    optimizer = AdamW(layer, optimizer.options());
    CHECK(gap(layer.forward(x, max_rank), before) < rounding<double>);
    ++tied;
  }
  CHECK(tied == 2);
}

TEST_CASE("oracle of Chain of LoRA: a chain of one link is LoRA bit for bit") {
  for (const StageLengths& one : {StageLengths({20}), StageLengths::equal(1, 20), StageLengths({12}), StageLengths({21, 5})})
    CHECK(first_difference(staged_run(one), plain_run()) == 20);
  for (const Index knot : {1, 12, 20}) CHECK(first_difference(staged_run(StageLengths({knot, 8})), plain_run()) == knot - 1);
}

TEST_CASE("oracle of Chain of LoRA: a chain is that of tying its knots by hand bit for bit") {
  CHECK(first_difference(staged_run(StageLengths({7, 2, 11})), run_by_hand({6, 8})) == 20);
  CHECK(first_difference(staged_run(StageLengths::equal(3, 20)), run_by_hand({6, 13})) == 20);
}

TEST_CASE("oracle of Chain of LoRA: the change of W is the sum of the links") {
  Linear<double> layer = trained_layer<double>();
  const MatrixX<double> W = layer.base.W;
  MatrixX<double> sum = MatrixX<double>::Zero(out, in);
  Rng rng(4);
  for (const Index rank : {4, 3, 1}) {  // knots at ranks that step down
    AdamW optimizer(layer, {.lr = 0.01});
    train(layer, optimizer, 0, 10);
    sum += layer.adapter.delta(rank);
    fold(layer, rank, rng);
  }
  CHECK(gap(layer.base.W - W, sum) < 4 * rounding<double>);
}

TEST_CASE("oracle of Chain of LoRA: the first gradient of a link is zero for A and not for B") {
  Linear<double> layer = trained_layer<double>();
  Rng rng(4);
  fold(layer, max_rank, rng);
  const Regression task;
  Linear<double>::Cache cache;
  auto gradients = zeros_like(layer);
  layer.backward(mse(layer.forward(task.x, max_rank, cache), task.target).gradient, cache, gradients);
  CHECK(gradients.adapter.A.isZero(0));
  CHECK(gradients.adapter.B.colwise().squaredNorm().minCoeff() > 0);
}

TEST_CASE("oracle of Chain of LoRA: as many links of rank 1 as the target's rank solve what one cannot") {
  // A target of rank 3 over a base of zeros, singular values 3, 2 and 1.
  const auto orthogonal = [](Index rows, std::uint64_t seed) -> MatrixX<double> {
    const Eigen::HouseholderQR<MatrixX<double>> qr(noise<double>(rows, 3, seed));
    return qr.householderQ() * MatrixX<double>::Identity(rows, 3);
  };
  const VectorX<double> sigma = (VectorX<double>(3) << 3, 2, 1).finished();
  const MatrixX<double> target = orthogonal(out, 7) * sigma.asDiagonal() * orthogonal(in, 8).transpose();
  Rng rng(1);
  Linear<double> layer(MatrixX<double>(MatrixX<double>::Zero(out, in)), {.max_rank = 1, .alpha = 1}, rng);
  const double tails[] = {2 * 2 + 1, 1, 0};
  for (const double tail : tails) {
    const double loss = fit(layer, target, 1500);
    CHECK(loss >= tail - 1e-9);  // Eckart and Young
    CHECK(loss < tail + 1e-3);
    fold(layer, 1, rng);
  }
  CHECK((layer.base.W - target).norm() < 0.03);
}

TEST_CASE("a fold reaches every adapter of a model and leaves a frozen part alone") {
  const MatrixX<double> W = noise<double>(out, in, 1);
  Rng rng(1);
  Whole model{Adapted(W, {.max_rank = 4}, rng), Frozen(WeightView<double>(W)), Dropping(W, {.adapter = {.max_rank = 2}}, rng),
              Slices(W, {.adapters = {{.max_rank = 3}, {.max_rank = 0}}, .out_features = {4, 3}}, rng)};
  randomize<Whole>(model, 2);
  const MatrixX<double> a = model.a.merged(4).W, d = model.d.merged(2).W, m = model.m.merged(3).W;
  const VectorX<double> before = values<Whole>(model);
  fold(model, 4, rng);  // those with fewer components fold all they have
  CHECK(same_bits(model.a.base.W, a));
  CHECK(same_bits(model.d.base.W, d));
  CHECK(same_bits(model.m.base.W, m));
  CHECK(same_bits(MatrixX<double>(model.m.base.W.bottomRows(3)), MatrixX<double>(W.bottomRows(3))));
  CHECK(model.d.adapter.inner.B.isZero(0));
  CHECK(model.m.adapter.slices[0].B.isZero(0));
  CHECK((values<Whole>(model).array() != before.array()).all());
  const VectorX<double> first = values<Adapted>(model.a), second = values<Dropping>(model.d);
  CHECK(first.head(4) != second.head(4));  // each draws its own A
}

TEST_CASE("a folded adapter keeps the components that it was cut to") {
  Linear<double> layer = trained_layer<double>();
  truncate(layer, 2);
  const MatrixX<double> whole = layer.merged(max_rank).W;
  Rng rng(4);
  fold(layer, max_rank, rng);
  CHECK(same_bits(layer.base.W, whole));
  CHECK(layer.adapter.components() == 2);
  CHECK(layer.max_rank() == max_rank);
}

TEST_CASE("a fold is the same from the same state of the generator") {
  Linear<float> one = trained_layer<float>(), other = one;
  Rng rng(4), same(4);
  fold(one, max_rank, rng);
  fold(other, max_rank, same);
  CHECK(same_bits(values<Linear<float>>(one), values<Linear<float>>(other)));
  CHECK(rng.state() == same.state());
}

TEST_CASE("only a weight that owns its matrix takes an adapter in") {
  STATIC_REQUIRE(FoldableLayer<Linear<float>>);
  STATIC_REQUIRE(FoldableLayer<Linear<float, LowRank<float>, DenseWeight<float, RowMatrix<float>>>>);
  STATIC_REQUIRE_FALSE(FoldableLayer<Linear<float, LowRank<float>, WeightView<float>>>);
  STATIC_REQUIRE_FALSE(FoldableLayer<const Linear<float>>);
  auto layer = trained_layer<float, LowRank<float>, DenseWeight<float, RowMatrix<float>>>();
  const MatrixX<float> merged = layer.merged(3).W;
  Rng rng(1);
  fold(layer, 3, rng);
  CHECK(same_bits(layer.base.dense(), merged));
}

TEST_CASE("what cannot be folded is refused by name and nothing has changed") {
  using Two = Attention<double>;
  Rng rng(1);
  const auto projection = [&] { return Linear<double>(MatrixX<double>(noise<double>(8, 8, 1)), {.max_rank = 4}, rng); };
  Two model{projection(), projection(), projection(), projection(), {.heads = 2}};
  randomize<Two>(model, 2);
  const auto refused = [&](const Two& from, RankSlice rank, FoldOptions options, auto check) {
    Two changed = from;
    Rng draws(5);
    check([&] { fold(changed, rank, draws, options); });
    CHECK(same_bits(frozen_values(changed), frozen_values(from)));
    CHECK(equal_bits<double>(values<Two>(changed), values<Two>(from)));
    CHECK(draws.state() == Rng(5).state());
  };
  refused(model, 5, {}, [](auto call) { CHECK_THROWS_SAYING(std::invalid_argument, call(), "fold: rank", "[1, 4]", "got 5"); });
  refused(model, RankSlice::none(), {},
          [](auto call) { CHECK_THROWS_SAYING(std::invalid_argument, call(), "fold: rank", "[1, 4]", "got 0"); });
  for (const double m : {0.0, -0.5, 1.5, nan<double>}) {
    refused(model, 4, {.fraction = m},
            [](auto call) { CHECK_THROWS_SAYING(std::invalid_argument, call(), "fold: fraction", "(0, 1]", "got"); });
  }
  Two spoilt = model;
  spoilt.o.adapter.B(1, 1) = nan<double>;
  for (const double m : {0.5, 1.0}) {
    refused(spoilt, 4, {.fraction = m},
            [](auto call) { CHECK_THROWS_SAYING(NonFiniteError, call(), "fold: layer o_proj", "lora_B", "expected finite", "NaN"); });
  }
  // More components than a fresh adapter may have.
  Two wide = model;
  wide.o.adapter = LowRank<double>(RowMatrix<double>(noise<double>(9, 8, 1)), noise<double>(8, 9, 2), {});
  refused(wide, 4, {}, [](auto call) { CHECK_THROWS_SAYING(std::invalid_argument, call(), "max_rank", "[0, 8]", "got 9"); });
}

TEST_CASE("a sum that is not finite is refused by the name of its layer and nothing has changed") {
  using Two = Attention<float>;
  Rng rng(1);
  const auto projection = [&] { return Linear<float>(MatrixX<float>(noise<float>(8, 8, 1)), {.max_rank = 4, .alpha = 4}, rng); };
  Two model{projection(), projection(), projection(), projection(), {.heads = 2}};
  randomize<Two>(model, 2);
  const float most = std::numeric_limits<float>::max();
  Two product = model, sum = model;
  product.o.adapter.A.setConstant(1e20f);  // every factor is finite
  product.o.adapter.B.setConstant(1e20f);
  sum.o.base.W.setConstant(most);  // and here Δ is too
  sum.o.adapter.A.setConstant(1);
  sum.o.adapter.B.setConstant(most / 16);
  for (const Two& from : {product, sum}) {
    for (const double m : {0.5, 1.0}) {
      Two changed = from;
      Rng draws(5);
      CHECK_THROWS_SAYING(NonFiniteError, fold(changed, 4, draws, {.fraction = m}), "fold: layer o_proj: W", "expected a finite sum");
      CHECK(same_bits(frozen_values(changed), frozen_values(from)));
      CHECK(equal_bits<float>(values<Two>(changed), values<Two>(from)));
      CHECK(draws.state() == Rng(5).state());
    }
  }
  fold(sum, 4, rng, {.fraction = 1e-9});  // what is added is rounded away
  CHECK(sum.o.base.W == MatrixX<float>::Constant(8, 8, most));
}

TEST_CASE("a layer that trains more than its adapter is not folded and no checkpoint need hold its weight") {
  Rng rng(1);
  WithMagnitude layer{MatrixX<double>(noise<double>(out, in, 1)), LowRank<double>(in, out, {.max_rank = 2}, rng)};
  CHECK_THROWS_SAYING(std::invalid_argument, fold(layer, 2, rng), "fold: layer", "trains its adapter alone", "further parameters");
  const auto folded = [](auto& model) {
    FoldedWeights weights{model};
    return names(weights);
  };
  CHECK(folded(layer).empty());
  Linear<double> alone(layer.base, layer.adapter);
  CHECK(folded(alone) == std::vector<std::string>{"weight"});
}

TEST_CASE("a fraction is folded of an adapter that is the product of what it trains and of no other") {
  using Chained = Linear<double, Chain<LowRank<double>>>;
  Rng rng(1);
  Chained layer(MatrixX<double>(noise<double>(out, in, 1)), {.max_rank = 2, .alpha = 3}, rng);
  randomize<Chained>(layer, 2);
  const MatrixX<double> before = layer.merged(2).W;
  fold(layer, 2, rng, {.fraction = 0.5});  // one link is such a product
  CHECK(gap(layer.merged(2).W, before) < rounding<double>);
  layer.adapter.extend(rng);
  randomize<Chained>(layer, 3);
  const MatrixX<double> W = layer.base.W;
  CHECK_THROWS_SAYING(std::invalid_argument, fold(layer, 2, rng, {.fraction = 0.5}), "fold: layer", "a fraction of it",
                      "product of its lora_B and lora_A", "another kind");
  CHECK(same_bits(layer.base.W, W));
  Slices sliced(W, {.adapters = {{.max_rank = 3}, {.max_rank = 2}}, .out_features = {4, 3}}, rng);
  randomize<Slices>(sliced, 4);
  const MatrixX<double> whole = sliced.merged(3).W;
  fold(sliced, 3, rng, {.fraction = 0.5});
  CHECK(gap(sliced.merged(3).W, whole) < rounding<double>);
}

TEST_CASE("a run that folds goes on from its checkpoint bit for bit") {
  const EveryInterval stages(7);
  const auto go_on = [&](Linear<double>& layer, AdamW<Linear<double>>& optimizer, Rng& rng, Index first, Index last) {
    for (Index step = first; step < last; ++step) {
      train(layer, optimizer, step, 1);
      if (!stages.ends_after(step)) continue;
      fold(layer, max_rank, rng);
      optimizer = AdamW(layer, optimizer.options());
    }
  };
  Linear<double> layer = trained_layer<double>(), resumed = layer;
  AdamW optimizer(layer, {.lr = 0.01}), resumed_optimizer = optimizer;
  Rng rng(4), resumed_rng(99);
  const auto state_of = [](auto& model, auto& adamw, auto& draws) {
    return [&](auto& archive) {
      FoldedWeights weights{model};
      archive.parameters("model", model);
      archive.parameters("folded", weights);
      archive("optimizer", adamw);
      archive("rng", draws);
    };
  };
  go_on(layer, optimizer, rng, 0, 10);
  const std::string bytes = checkpoint_bytes(10, state_of(layer, optimizer, rng));
  CHECK(bytes.find("\"folded.weight\"") != std::string::npos);
  auto state = state_of(resumed, resumed_optimizer, resumed_rng);
  read_checkpoint(std::as_bytes(std::span(bytes)), "run/file", state);
  go_on(layer, optimizer, rng, 10, 20);
  go_on(resumed, resumed_optimizer, resumed_rng, 10, 20);
  CHECK(same_bits(values<Linear<double>>(layer), values<Linear<double>>(resumed)));
  CHECK(same_bits(layer.base.W, resumed.base.W));
}

}  // namespace dylora::test
