#include "dylora/methods/prilora/pruning.hpp"

#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "dylora/adapters/dropout.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/adapters/stacked.hpp"
#include "dylora/io/checkpoint/archive.hpp"
#include "dylora/io/checkpoint/file.hpp"
#include "dylora/layers/attention/attention.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/methods/prilora/observed.hpp"
#include "dylora/methods/prilora/proportional.hpp"
#include "dylora/ranks/truncate.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/loss.hpp"
#include "dylora/train/train_step.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

constexpr Index in = 10, out = 7, max_rank = 4;

using Layer = Linear<double, Observed<LowRank<double>>>;

Layer new_layer() {
  Rng rng(1);
  return Layer(MatrixX<double>(noise<double>(out, in, 1)), {.max_rank = max_rank, .alpha = 4}, rng);
}

VectorX<double> some_norms() { return noise<double>(in, 1, 3).cwiseAbs(); }

template <class S>
Index zeros(const RowMatrix<S>& A, Index row) {
  return (A.row(row).array() == 0).count();
}

/// Norms of a step of a layer that has this input.
void see(Pruning<Layer>& pruning, Layer& layer, const MatrixX<double>& x) {
  Layer::Cache cache;
  auto gradients = zeros_like(layer);
  (void)layer.forward(x, max_rank, cache);
  (void)layer.backward(MatrixX<double>::Zero(out, x.cols()), cache, gradients);
  pruning.before_step(layer, gradients);
  CHECK(gradients.adapter.input_squares.size() == 0);  // taken
}

/// A checkpoint whose norms are not numbers.
struct SpoiltArchive {
  void same(const std::string&, auto) {}
  void operator()(const std::string&, auto& value, auto&&) {
    if constexpr (std::is_same_v<decltype(value), std::vector<double>&>) value.back() = nan<double>;
  }
};

/// One step on a regression.
void train(Layer& layer, AdamW<Layer>& optimizer, Pruning<Layer>& pruning, Index step) {
  const MatrixX<double> x = noise<double>(in, 20, 50 + static_cast<std::uint64_t>(step % 7)), target = noise<double>(out, 20, 60);
  Layer::Cache cache;
  auto gradients = zeros_like(layer);
  train_step(layer, optimizer, gradients, [&] {
    const auto loss = mse(layer.forward(x, 1 + step % max_rank, cache), target);
    layer.backward(loss.gradient, cache, gradients);
    pruning.before_step(layer, gradients);
    return loss.value;
  });
  pruning.after_step(layer);
}

}  // namespace

TEMPLATE_TEST_CASE("oracle of PRILoRA: after a pruning each row has exactly its share of zeros", "", float, double) {
  using S = TestType;
  for (const double p : {0.0, 0.05, 0.1, 0.3, 0.5, 0.75, 0.99}) {
    RowMatrix<S> A = noise<S>(max_rank, in, 2);
    const RowMatrix<S> before = A;
    prune_rows(A, some_norms(), p);
    for (Index i = 0; i < max_rank; ++i) {
      CHECK(zeros(A, i) == static_cast<Index>(std::floor(p * in)));
      double most_pruned = 0, least_kept = std::numeric_limits<double>::infinity();
      for (Index j = 0; j < in; ++j) {
        const double value = std::abs(double(before(i, j))) * some_norms()[j];
        if (A(i, j) == 0) {
          most_pruned = std::max(most_pruned, value);
        } else {
          CHECK(A(i, j) == before(i, j));
          least_kept = std::min(least_kept, value);
        }
      }
      CHECK(most_pruned <= least_kept);
    }
  }
  RowMatrix<S> wide = noise<S>(1, 100, 2);
  prune_rows(wide, VectorX<double>(VectorX<double>::Ones(100)), 0.29);  // 0.29 · 100 is less than 29 in floating point
  CHECK(zeros(wide, 0) == 29);
  RowMatrix<S> sparse = RowMatrix<S>::Zero(1, in);
  sparse(0, 3) = 1;
  prune_rows(sparse, some_norms(), 0.5);
  CHECK(zeros(sparse, 0) == in - 1);  // more only where they were zero already
  CHECK(sparse(0, 3) == 1);
}

TEST_CASE("oracle of PRILoRA: a pruning without an update in between changes nothing") {
  for (const double p : {0.1, 0.5, 0.9}) {
    RowMatrix<double> A = noise<double>(max_rank, in, 2);
    VectorX<double> norms = some_norms();
    norms.head(4).setZero();  // features that were never seen: all their entries are of no importance
    prune_rows(A, norms, p);
    const RowMatrix<double> once = A;
    prune_rows(A, norms, p);
    CHECK(same_bits(MatrixX<double>(A), MatrixX<double>(once)));
  }
}

TEST_CASE("oracle of PRILoRA: a constant input has a constant norm") {
  const MatrixX<double> x = noise<double>(in, 6, 4);
  const VectorX<double> norm = x.rowwise().norm();
  for (const bool corrected : {true, false}) {
    Layer layer = new_layer();
    Pruning pruning(layer, {.beta = 0.9, .bias_corrected = corrected});
    for (int step = 0; step < 20; ++step) {
      see(pruning, layer, x);
      CHECK(gap(pruning.norms(0), norm) < rounding<double>);
    }
    see(pruning, layer, 2 * x);
    const double weight = corrected ? 0.1 / (1 - std::pow(0.9, 21)) : 0.1;
    CHECK(gap(pruning.norms(0), (1 + weight) * norm) < rounding<double>);
  }
}

TEST_CASE("oracle of PRILoRA: an input feature that is c times as large is c times as important") {
  const RowMatrix<double> A = noise<double>(max_rank, in, 2);
  MatrixX<double> x = noise<double>(in, 6, 4);
  const auto importance_of = [&](const MatrixX<double>& input) {
    Layer layer = new_layer();
    Pruning pruning(layer);
    see(pruning, layer, input);
    return importance(A, pruning.norms(0));
  };
  const MatrixX<double> before = importance_of(x);
  x.row(3) *= 5;
  MatrixX<double> expected = before;
  expected.col(3) *= 5;
  CHECK(gap(importance_of(x), expected) < rounding<double>);
  CHECK(gap(before, A.cwiseAbs() * (noise<double>(in, 6, 4).rowwise().norm().asDiagonal())) < rounding<double>);
}

TEST_CASE("oracle of PRILoRA: cutting and pruning commute") {
  for (Index components = 1; components <= max_rank; ++components) {
    RowMatrix<double> A = noise<double>(max_rank, in, 2), cut = A.topRows(components);
    prune_rows(A, some_norms(), 0.5);
    prune_rows(cut, some_norms(), 0.5);
    CHECK(same_bits(MatrixX<double>(A.topRows(components)), MatrixX<double>(cut)));
  }
  // And of a model whose adapter is cut in the midst of a run.
  Layer whole = new_layer();
  Pruning pruning(whole, {.keeps_pruned = true});
  see(pruning, whole, noise<double>(in, 6, 4));
  Layer cut = whole;
  pruning.prune(whole);
  truncate(cut, 2);
  Pruning other = pruning;
  other.prune(cut);
  CHECK(same_bits(MatrixX<double>(whole.adapter.inner.A.topRows(2)), MatrixX<double>(cut.adapter.inner.A)));
}

TEST_CASE("a row that has an entry keeps one, and among equals the zeros and then the first are pruned") {
  RowMatrix<double> A = RowMatrix<double>::Zero(2, 8);
  A(0, 2) = 1;
  A(1, 1) = A(1, 5) = 1;
  VectorX<double> nowhere = VectorX<double>::Zero(8);  // everything is of equal importance
  for (const double p : {0.5, 0.9}) {
    RowMatrix<double> pruned = A;
    prune_rows(pruned, nowhere, p);
    CHECK(pruned(0, 2) == 1);
    CHECK(pruned.row(1).squaredNorm() >= 1);
    CHECK(pruned(1, 5) == 1);  // the later of the two
  }
  RowMatrix<double> ones = RowMatrix<double>::Ones(1, 8);
  prune_rows(ones, VectorX<double>(VectorX<double>::Ones(8)), 0.5);
  CHECK(ones.leftCols(4).isZero(0));
  CHECK(ones.rightCols(4).isOnes(0));
}

TEST_CASE("a row keeps an entry at every fraction below 1") {
  for (const double p : {1 - 1e-9, 1 - 1e-12, std::nextafter(1.0, 0.0)}) {
    for (const Index columns : {1, 2, 10}) {
      RowMatrix<double> A = noise<double>(max_rank, columns, 2);
      prune_rows(A, VectorX<double>(VectorX<double>::Ones(columns)), p);
      for (Index i = 0; i < max_rank; ++i) CHECK(zeros(A, i) == columns - 1);
    }
  }
  RowMatrix<double> nothing(2, 0);
  prune_rows(nothing, VectorX<double>(0), 0.5);
  CHECK(nothing.rows() == 2);
}

TEST_CASE("what was pruned grows again until the next pruning, unless it is kept") {
  for (const bool keeps : {false, true}) {
    Layer layer = new_layer();
    AdamW optimizer(layer, {.lr = 0.02});
    Pruning pruning(layer, {.fraction = 0.5, .interval = 10, .keeps_pruned = keeps});
    const RowMatrix<double>& A = layer.adapter.inner.A;
    RowMatrix<double> first;
    for (Index step = 0; step < 40; ++step) {
      train(layer, optimizer, pruning, step);
      CHECK(pruning.steps() == step + 1);
      if (step == 9) first = A;
      for (Index i = 0; i < max_rank; ++i) {
        if (step < 9) CHECK(zeros(A, i) == 0);
        if (step % 10 == 9 || (keeps && step > 9)) CHECK(zeros(A, i) == 5);
        if (step == 18 && !keeps) CHECK(zeros(A, i) < 5);  // from the first steps' moments on
      }
      if (keeps && step >= 9) CHECK((first.array() == 0).select(A, 0).isZero(0));
    }
    CHECK((layer.adapter.inner.B.array() != 0).all());  // B is not pruned
  }
}

TEST_CASE("the gradients of what stays pruned are zero and the others' are what they were") {
  Layer layer = new_layer();
  Pruning pruning(layer, {.keeps_pruned = true});
  see(pruning, layer, noise<double>(in, 6, 4));
  pruning.prune(layer);
  auto gradients = zeros_like(layer);
  randomize<Layer>(gradients, 9);
  const auto before = gradients;
  pruning.before_step(layer, gradients);
  const RowMatrix<double>& A = layer.adapter.inner.A;
  for (Index i = 0; i < max_rank; ++i) {
    for (Index j = 0; j < in; ++j) CHECK(gradients.adapter.inner.A(i, j) == (A(i, j) == 0 ? 0 : before.adapter.inner.A(i, j)));
  }
  CHECK(same_bits(gradients.adapter.inner.B, before.adapter.inner.B));
}

TEST_CASE("every adapter that observes is pruned by its own inputs, wherever it is, and no other") {
  using Watched = Linear<double, Observed<Stacked<LowRank<double>>>>;
  using Shared = Linear<double, Proportional<Observed<Dropout<LowRank<double>>>>>;
  using Blind = Linear<double>;
  using Model = Attention<double, Shared, Blind, Shared, Watched>;
  Rng rng(1);
  const MatrixX<double> W = noise<double>(8, 8, 1);
  Model model{Shared(W, {.adapter = {.adapter = {.max_rank = 3}}, .max_rank = 4}, rng),
              Blind(W, {.max_rank = 4}, rng),
              Shared(W, {.adapter = {.adapter = {.max_rank = 2}}, .max_rank = 4}, rng),
              Watched(W, {.adapters = {{.max_rank = 4}, {.max_rank = 2}}}, rng),
              {.heads = 2}};
  randomize<Model>(model, 2);
  Pruning pruning(model, {.fraction = 0.5, .interval = 1});
  Model::Cache cache;
  auto gradients = zeros_like(model);
  const MatrixX<double> x = noise<double>(8, 6, 3);
  (void)model.forward(x, Sequences::equal(2, 3), 4, cache);
  (void)model.backward(noise<double>(8, 6, 4), cache, gradients);
  pruning.before_step(model, gradients);
  pruning.after_step(model);
  const VectorX<double> norm = x.rowwise().norm();
  CHECK(gap(pruning.norms(0), norm) < rounding<double>);
  CHECK(gap(pruning.norms(1), norm) < rounding<double>);
  CHECK(gap(pruning.norms(2), pruning.norms(3)) == 0);  // two slices of one input
  CHECK(gap(pruning.norms(2), norm) > 0.01);
  for (const auto* A : {&model.q.adapter.inner.inner.inner.A, &model.v.adapter.inner.inner.inner.A, &model.o.adapter.inner.slices[0].A,
                        &model.o.adapter.inner.slices[1].A}) {
    for (Index i = 0; i < A->rows(); ++i) CHECK(zeros(*A, i) == 4);
  }
  CHECK((model.k.adapter.A.array() != 0).all());
}

TEST_CASE("a run that prunes goes on from its checkpoint bit for bit") {
  Layer layer = new_layer(), resumed = new_layer();
  AdamW optimizer(layer, {.lr = 0.02}), resumed_optimizer(resumed, {.lr = 0.02});
  const PruningOptions options{.interval = 10, .keeps_pruned = true};
  Pruning pruning(layer, options), resumed_pruning(resumed, options);
  const auto state_of = [](auto& model, auto& adamw, auto& pruned) {
    return [&](auto& archive) {
      archive.parameters("model", model);
      archive("optimizer", adamw);
      archive("pruning", pruned);
    };
  };
  for (Index step = 0; step < 15; ++step) train(layer, optimizer, pruning, step);
  const std::string bytes = checkpoint_bytes(15, state_of(layer, optimizer, pruning));
  auto state = state_of(resumed, resumed_optimizer, resumed_pruning);
  read_checkpoint(std::as_bytes(std::span(bytes)), "run/file", state);
  for (Index step = 15; step < 30; ++step) {
    train(layer, optimizer, pruning, step);
    train(resumed, resumed_optimizer, resumed_pruning, step);
  }
  CHECK(same_bits(values<Layer>(layer), values<Layer>(resumed)));
  Pruning otherwise(resumed, {.interval = 11, .keeps_pruned = true});
  auto refused = state_of(resumed, resumed_optimizer, otherwise);
  CHECK_THROWS_SAYING(FormatError, read_checkpoint(std::as_bytes(std::span(bytes)), "run/file", refused), "pruning.interval", "10", "11");
}

TEST_CASE("a pruning that cannot be is refused by name and nothing has changed") {
  Layer layer = new_layer();
  const VectorX<double> before = values<Layer>(layer);
  for (const double p : {-0.1, 1.0, nan<double>}) {
    CHECK_THROWS_SAYING(std::invalid_argument, Pruning(layer, {.fraction = p}), "Pruning: fraction", "[0, 1)", "got");
    CHECK_THROWS_SAYING(std::invalid_argument, Pruning(layer, {.beta = p}), "Pruning: beta", "[0, 1)", "got");
    RowMatrix<double> A = noise<double>(2, in, 1);
    CHECK_THROWS_SAYING(std::invalid_argument, prune_rows(A, some_norms(), p), "prune_rows: fraction", "[0, 1)", "got");
  }
  CHECK_THROWS_SAYING(std::invalid_argument, Pruning(layer, {.interval = 0}), "Pruning: interval", "got 0");
  Rng rng(1);
  const Linear<double> blind(MatrixX<double>(noise<double>(out, in, 1)), {.max_rank = 2}, rng);
  CHECK_THROWS_SAYING(std::invalid_argument, Pruning(blind), "Pruning", "Observed", "got none");
  Pruning pruning(layer);
  CHECK_THROWS_SAYING(std::invalid_argument, pruning.prune(layer), "Pruning: lora_A", "before_step", "got none");
  MatrixX<double> x = noise<double>(in, 4, 1);
  x(2, 2) = nan<double>;
  CHECK_THROWS_SAYING(NonFiniteError, see(pruning, layer, x), "Pruning: inputs of lora_A", "finite", "NaN");
  CHECK_THROWS_SAYING(std::invalid_argument, pruning.prune(layer), "got none");  // that step was not counted
  Layer other(MatrixX<double>(noise<double>(out, in + 1, 1)), {.max_rank = 2}, rng);
  CHECK_THROWS_SAYING(ShapeError, pruning.after_step(other), "Pruning: columns of lora_A", "expected 10", "got 11");
  RowMatrix<double> A = noise<double>(2, in + 1, 1);
  CHECK_THROWS_SAYING(ShapeError, prune_rows(A, some_norms(), 0.5), "norms", "expected 11", "got 10");
  CHECK(same_bits(values<Layer>(layer), before));
}

TEST_CASE("what is not a number has no order: it is refused by name and nothing has changed") {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double bad : {nan<double>, infinity, -infinity}) {
    RowMatrix<double> A = noise<double>(2, in, 1);
    A(1, 3) = bad;
    const RowMatrix<double> before = A;
    CHECK_THROWS_SAYING(NonFiniteError, prune_rows(A, some_norms(), 0.5), "prune_rows: A", "finite", "NaN");
    CHECK(same_bits(A, before));
    RowMatrix<double> whole = noise<double>(2, in, 1);
    const RowMatrix<double> kept = whole;
    VectorX<double> norms = some_norms();
    norms[4] = bad;
    CHECK_THROWS_SAYING(NonFiniteError, prune_rows(whole, norms, 0.5), "prune_rows: norms", "finite", "NaN");
    CHECK(same_bits(whole, kept));
  }
  using Slices = Linear<double, Observed<Stacked<LowRank<double>>>>;
  Rng rng(1);
  Slices layer(MatrixX<double>(noise<double>(8, 8, 1)), {.adapters = {{.max_rank = 4}, {.max_rank = 2}}}, rng);
  randomize<Slices>(layer, 2);
  Pruning pruning(layer, {.interval = 1});
  Slices::Cache cache;
  auto gradients = zeros_like(layer);
  (void)layer.forward(noise<double>(8, 6, 3), 4, cache);
  (void)layer.backward(noise<double>(8, 6, 4), cache, gradients);
  pruning.before_step(layer, gradients);
  layer.adapter.inner.slices[1].A(0, 0) = nan<double>;
  const VectorX<double> before = values<Slices>(layer);
  CHECK_THROWS_SAYING(NonFiniteError, pruning.after_step(layer), "Pruning: 1.lora_A", "finite", "NaN");
  CHECK(equal_bits<double>(values<Slices>(layer), before));  // the first slice too
  CHECK(pruning.steps() == 0);
  randomize<Slices>(layer, 2);
  const VectorX<double> whole = values<Slices>(layer);
  SpoiltArchive archive;
  pruning.state(archive);
  CHECK_THROWS_SAYING(NonFiniteError, pruning.after_step(layer), "Pruning: norms of the inputs of 0.lora_A", "finite", "NaN");
  CHECK(equal_bits<double>(values<Slices>(layer), whole));
}

}  // namespace dylora::test
