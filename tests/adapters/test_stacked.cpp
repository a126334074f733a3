#include "dylora/adapters/stacked.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "dylora/ranks/truncate.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

template <class S>
using Slices = Stacked<LowRank<S>>;
template <class S>
using Dropping = Dropout<Stacked<LowRank<S>>>;

using AdaptersUnderTest = InFloatAndDouble<Slices, Dropping>;

}  // namespace dylora::test

#include "laws/adapter_laws.hpp"

namespace dylora::test {

namespace {

constexpr Index in = 9;
const std::vector<Index> rows{7, 6, 8};

/// A slice for each rank, all at random.
template <class S>
Stacked<LowRank<S>> stack_of(const std::vector<Index>& ranks, ScaleRule scale = alpha_over_rank) {
  std::vector<LowRank<S>> slices;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    slices.emplace_back(RowMatrix<S>(noise<S>(ranks[i], in, 10 + i)), noise<S>(rows[i], ranks[i], 20 + i),
                        LowRankOptions{.alpha = 3, .scale = scale});
  }
  return Stacked<LowRank<S>>(std::move(slices));
}

template <class S>
bool same_factors(const LowRankFactors<S>& a, const LowRankFactors<S>& b) {
  return same_bits(MatrixX<S>(a.A), MatrixX<S>(b.A)) && same_bits(a.B, b.B) && a.scale == b.scale;
}

template <class S>
std::vector<Index> ranks_of(const Stacked<LowRank<S>>& stack) {
  std::vector<Index> ranks;
  for (const AdapterRank& adapter : adapter_ranks(stack)) ranks.push_back(adapter.rank);
  return ranks;
}

/// The ranks of the slices of `stack` once it has taken these factors over, which must leave their function as it is.
template <class S>
std::vector<Index> ranks_after(Stacked<LowRank<S>> stack, const LowRankFactors<S>& factors) {
  stack.set_factors(factors);
  LowRank<S> whole(factors.A, factors.B, {});
  whole.set_factors(factors);
  CHECK(same_bits(stack.delta(stack.max_rank()), whole.delta(whole.max_rank())));
  return ranks_of(stack);
}

}  // namespace

TEMPLATE_TEST_CASE("a stack is an adapter for each slice bit for bit", "", float, double) {
  using S = TestType;
  for (const std::vector<Index>& ranks : {std::vector<Index>{5, 5, 5}, {5, 0, 5}, {2, 5, 0}, {1, 2, 3}}) {
    const Stacked<LowRank<S>> stack = stack_of<S>(ranks);
    const Index most = *std::max_element(ranks.begin(), ranks.end());
    CHECK(stack.max_rank() == most);
    const MatrixX<S> x = noise<S>(in, 6, 1), dy = noise<S>(21, 6, 2);
    for (const BatchRanks& batch : {BatchRanks(1), BatchRanks(most), BatchRanks(most, most - 1),
                                    BatchRanks::per_sample({most, most, 1, RankSlice::none(), 2, {3, 2}})}) {
      const auto whole = run(stack, x, dy, batch);
      MatrixX<S> dx = MatrixX<S>::Zero(in, 6);
      Index begin = 0;
      for (std::size_t i = 0; i < ranks.size(); ++i) {
        const LowRank<S>& slice = stack.slices[i];
        typename LowRank<S>::Cache cache;
        auto gradients = zeros_like(slice);
        MatrixX<S> y = MatrixX<S>::Zero(rows[i], 6);
        slice.add_forward(x, batch.at_most(ranks[i]), cache, y);
        slice.add_backward(x, dy.middleRows(begin, rows[i]), cache, gradients, dx);
        CHECK(same_bits(MatrixX<S>(whole.y.middleRows(begin, rows[i])), y));
        CHECK(same_bits(values<LowRank<S>>(whole.gradients.slices[i]), values<LowRank<S>>(gradients)));
        CHECK(trained_components<LowRank<S>>(whole.gradients.slices[i]) == trained_components<LowRank<S>>(gradients));
        begin += rows[i];
      }
      CHECK(same_bits(whole.dx, dx));
    }
  }
}

TEMPLATE_TEST_CASE("a slice without an adapter is left exactly as it was", "", float, double) {
  using S = TestType;
  Rng rng(1);
  Stacked<LowRank<S>> stack(in, 21, {.adapters = {{.max_rank = 5}, {.max_rank = 0}, {.max_rank = 5}}}, rng);
  randomize<Stacked<LowRank<S>>>(stack, 2);
  for (Index b = 1; b <= 5; ++b) {
    const MatrixX<S> delta = stack.delta(b), y = run(stack, noise<S>(in, 4, 3), noise<S>(21, 4, 4), b).y;
    for (const MatrixX<S>& result : {delta, y}) {
      CHECK(result.middleRows(7, 7).isZero(0));
      CHECK((result.topRows(7).array() != 0).all());
      CHECK((result.bottomRows(7).array() != 0).all());
    }
  }
}

TEST_CASE("every slice of a stack is an adapter of its own by name and is cut by itself") {
  Stacked<LowRank<float>> stack = stack_of<float>({5, 0, 3});
  CHECK(names(stack) == std::vector<std::string>{"0.lora_A", "0.lora_B", "1.lora_A", "1.lora_B", "2.lora_A", "2.lora_B"});
  CHECK(adapter_ranks(stack) == std::vector<AdapterRank>{{"0", 5, in + 7}, {"1", 0, in + 6}, {"2", 3, in + 8}});
  const Stacked<LowRank<float>> whole = stack;
  truncate_each(stack, {1, 0, 2});
  CHECK(stack.components() == 2);
  CHECK(stack.max_rank() == 5);
  CHECK(same_bits(MatrixX<float>(stack.delta(5).topRows(7)), whole.slices[0].delta(1)));
  CHECK(same_bits(MatrixX<float>(stack.delta(5).bottomRows(8)), whole.slices[2].delta(2)));
}

TEST_CASE("without sizes the slices of a stack are equal and fresh ones are drawn in the order of their rows") {
  Rng one(1), same(1);
  const LowRankOptions options{.max_rank = 2};
  const Stacked<LowRank<float>> equal(in, 6, {.adapters = {options, options, options}}, one);
  for (const LowRank<float>& slice : equal.slices) {
    const LowRank<float> alone(in, 2, options, same);
    CHECK(same_bits(MatrixX<float>(slice.A), MatrixX<float>(alone.A)));
    CHECK(slice.B.isZero(0));
    CHECK(slice.out_features() == 2);
  }
  const Stacked<LowRank<float>> sized(in, 6, {.adapters = {options, options}, .out_features = {2, 4}}, one);
  CHECK(sized.slices[0].out_features() == 2);
  CHECK(sized.slices[1].out_features() == 4);
}

TEMPLATE_TEST_CASE("the factors of a stack are its slices as one low-rank product", "", float, double) {
  using S = TestType;
  STATIC_REQUIRE(PortableAdapter<Stacked<LowRank<S>>>);
  STATIC_REQUIRE(PortableAdapter<Dropout<Stacked<LowRank<S>>>>);
  const Stacked<LowRank<S>> stack = stack_of<S>({5, 0, 5});
  for (Index b = 1; b <= 5; ++b) {
    const LowRankFactors<S> factors = stack.factors(b);
    CHECK(factors.scale == 3.0 / static_cast<double>(b));
    CHECK(same_bits(MatrixX<S>(factors.A.topRows(b)), MatrixX<S>(stack.slices[0].A.topRows(b))));
    CHECK(same_bits(MatrixX<S>(factors.A.bottomRows(b)), MatrixX<S>(stack.slices[2].A.topRows(b))));
    CHECK(same_bits(MatrixX<S>(factors.B.topLeftCorner(7, b)), MatrixX<S>(stack.slices[0].B.leftCols(b))));
    CHECK(same_bits(MatrixX<S>(factors.B.bottomRightCorner(8, b)), MatrixX<S>(stack.slices[2].B.leftCols(b))));
    CHECK((factors.B.array() == 0).count() == 21 * 2 * b - (7 + 8) * b);
    MatrixX<S> product(21, in);
    set_product(product, factors.B, factors.A, static_cast<S>(factors.scale));
    CHECK(gap(in_double(product), in_double(stack.delta(b))) < rounding<S>);
  }
  CHECK(stack.factors(0).A.rows() == 0);
  CHECK(stack.factors(0).B.rows() == 21);
  CHECK_THROWS_SAYING(std::invalid_argument, stack.factors(6), "Stacked::factors: rank", "[0, 5]", "got 6");
}

TEMPLATE_TEST_CASE("slices of different scales have them in the factors of their stack", "", float, double) {
  using S = TestType;
  const Stacked<LowRank<S>> stack = stack_of<S>({5, 2, 3});  // at alpha over b those of fewer components have a larger scale
  for (Index b = 1; b <= 5; ++b) {
    const LowRankFactors<S> factors = stack.factors(b);
    CHECK(factors.scale == (b <= 2 ? 3.0 / static_cast<double>(b) : 1));
    CHECK(factors.A.rows() == b + std::min<Index>(b, 2) + std::min<Index>(b, 3));
    MatrixX<S> product(21, in);
    set_product(product, factors.B, factors.A, static_cast<S>(factors.scale));
    CHECK(gap(in_double(product), in_double(stack.delta(b))) < rounding<S>);
  }
  CHECK(stack_of<S>({5, 2, 3}, [](double alpha, Index, Index) { return alpha; }).factors(5).scale == 3);
}

TEMPLATE_TEST_CASE("a stack comes back from its factors at every rank bit for bit whatever took them", "", float, double) {
  using S = TestType;
  for (const ScaleRule rule : {alpha_over_rank, alpha_over_sqrt_rank}) {
    for (const std::vector<Index>& ranks : {std::vector<Index>{5, 5, 5}, {5, 0, 5}, {5, 2, 3}, {0, 1, 4}}) {
      const Stacked<LowRank<S>> stack = stack_of<S>(ranks, rule);
      for (Index b = 0; b <= stack.max_rank(); ++b) {
        const LowRankFactors<S> factors = stack.factors(b);
        for (const std::vector<Index>& other : {ranks, {3, 3, 3}, {6, 0, 6}, {1, 2, 0}, {0, 0, 0}}) {
          Stacked<LowRank<S>> taken = stack_of<S>(other, rule);
          taken.set_factors(factors);
          CHECK(taken.max_rank() == b);
          CHECK(same_factors(taken.factors(b), factors));
          for (std::size_t i = 0; i < ranks.size(); ++i) {
            const LowRankFactors<S> slice = taken.slices[i].factors(taken.slices[i].max_rank());
            const LowRankFactors<S> before = stack.slices[i].factors(std::min(b, ranks[i]));
            CHECK(same_bits(MatrixX<S>(slice.A), MatrixX<S>(before.A)));
            if (factors.scale != 1) CHECK(same_factors(slice, before));
          }
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("a pair of factors for the whole weight becomes the same function bit for bit", "", float, double) {
  using S = TestType;
  const LowRank<S> whole(RowMatrix<S>(noise<S>(4, in, 1)), noise<S>(21, 4, 2), {.alpha = 3});
  Stacked<LowRank<S>> stack = stack_of<S>({5, 0, 2});
  stack.set_factors(whole.factors(4));
  CHECK(ranks_of(stack) == std::vector<Index>{4, 4, 4});
  for (const LowRank<S>& slice : stack.slices) {
    CHECK(slice.options.alpha == 3);
    CHECK(same_bits(MatrixX<S>(slice.A), MatrixX<S>(whole.A)));
  }
  const MatrixX<S> x = noise<S>(in, 6, 1), dy = noise<S>(21, 6, 2);
  for (Index b = 1; b <= 4; ++b) {
    CHECK(same_bits(stack.delta(b), whole.delta(b)));
    CHECK(same_bits(run(stack, x, dy, b).y, run(whole, x, dy, b).y));
  }
}

TEST_CASE("columns of zeros go back to the slices that they came from") {
  // Where the ranks are those of the stack that takes them, or the same in every slice that has an adapter, nothing else need be known.
  for (const std::vector<Index>& ranks : {std::vector<Index>{5, 5, 5}, {5, 0, 5}, {5, 2, 3}}) {
    Stacked<LowRank<float>> fresh = stack_of<float>(ranks, alpha_over_max_rank);
    for (LowRank<float>& slice : fresh.slices) slice.B.setZero();
    for (Index b = 1; b <= 5; ++b) {
      Stacked<LowRank<float>> same = stack_of<float>(ranks);
      same.set_factors(fresh.factors(b));
      for (std::size_t i = 0; i < ranks.size(); ++i)
        CHECK(same_bits(MatrixX<float>(same.slices[i].A), MatrixX<float>(fresh.slices[i].A.topRows(std::min(b, ranks[i])))));
    }
  }
  LowRankFactors<float> factors = stack_of<float>({4, 0, 4}).factors(4);
  factors.scale = 0.25;
  for (const std::vector<Index>& other : {std::vector<Index>{1, 0, 1}, {6, 0, 5}}) {
    LowRankFactors<float> dead = factors;
    dead.B.middleCols(3, 2).setZero();  // the last of one slice and the first of the next
    CHECK(ranks_after(stack_of<float>(other), dead) == std::vector<Index>{4, 0, 4});
    dead.B.setZero();
    CHECK(ranks_after(stack_of<float>(other), dead) == std::vector<Index>{4, 0, 4});
  }
  // Else a column stays with the one before it, as where the last components of each slice are not trained yet.
  LowRankFactors<float> untrained = stack_of<float>({4, 1, 2}).factors(4);
  untrained.scale = 1.0 / 7;
  untrained.B.middleCols(2, 2).setZero();
  untrained.B.col(6).setZero();
  CHECK(ranks_after(stack_of<float>({5, 5, 5}), untrained) == std::vector<Index>{4, 1, 2});
  // And where nothing tells, any slice may have any of them.
  LowRankFactors<float> nothing{RowMatrix<float>(noise<float>(5, in, 1)), MatrixX<float>::Zero(21, 5), 0.2};
  CHECK(ranks_after(stack_of<float>({2, 0, 2}), nothing) == std::vector<Index>{5, 5, 5});
}

TEST_CASE("blocks of factors that are not in the order of the slices are taken whole") {
  LowRankFactors<float> factors{RowMatrix<float>(noise<float>(4, in, 1)), MatrixX<float>::Zero(21, 4), 0.25};
  factors.B.block(7, 0, 6, 2) = noise<float>(6, 2, 2);  // of the second slice
  factors.B.block(0, 2, 7, 2) = noise<float>(7, 2, 3);  // and then of the first
  CHECK(ranks_after(stack_of<float>({2, 2, 0}), factors) == std::vector<Index>{4, 4, 4});
}

TEST_CASE("factors that do not fit are refused and the stack is as it was") {
  Stacked<LowRank<float>> stack = stack_of<float>({5, 2, 3});
  const LowRankFactors<float> before = stack.factors(5);
  const auto factors = [](Index out, Index b, Index a, Index in_features, double scale) {
    return LowRankFactors<float>{RowMatrix<float>(noise<float>(a, in_features, 1)), noise<float>(out, b, 2), scale};
  };
  CHECK_THROWS_SAYING(ShapeError, stack.set_factors(factors(21, 4, 4, in + 1, 1)), "Stacked::set_factors: columns of A", "expected 9",
                      "got 10");
  CHECK_THROWS_SAYING(ShapeError, stack.set_factors(factors(20, 4, 4, in, 1)), "Stacked::set_factors: rows of B", "expected 21", "got 20");
  CHECK_THROWS_SAYING(ShapeError, stack.set_factors(factors(21, 3, 4, in, 1)), "Stacked::set_factors: columns of B", "expected 4", "got 3");
  CHECK_THROWS_AS(stack.set_factors(factors(21, 4, 4, in, -1)), std::invalid_argument);
  // The last slice alone refuses.
  stack.slices[2].options.scale = [](double, Index, Index) { return 1.0; };
  CHECK_THROWS_AS(stack.set_factors(factors(21, 4, 4, in, 2)), std::invalid_argument);
  stack.slices[2].options.scale = alpha_over_rank;
  CHECK(same_factors(stack.factors(5), before));
}

TEST_CASE("a stack refuses slices that do not make up its weight") {
  using Stack = Stacked<LowRank<float>>;
  Rng rng(1);
  const LowRankOptions two{.max_rank = 2};
  CHECK_THROWS_SAYING(ShapeError, Stack(in, 7, {.adapters = {two, two}}, rng), "Stacked: out_features", "expected 7", "got 6");
  CHECK_THROWS_SAYING(ShapeError, Stack(in, 7, {.adapters = {two, two}, .out_features = {3, 3}}, rng), "out_features", "expected 7",
                      "got 6");
  CHECK_THROWS_SAYING(ShapeError, Stack(in, 6, {.adapters = {two, two}, .out_features = {6}}, rng), "number of slices", "expected 2",
                      "got 1");
  CHECK_THROWS_SAYING(std::invalid_argument, Stack(in, 6, {.adapters = {two, two}, .out_features = {7, -1}}, rng),
                      "out_features of a slice", "[1, 6]", "got 7");
  CHECK_THROWS_SAYING(std::invalid_argument, Stack(in, 6, {.adapters = {two, {.max_rank = 4}}}, rng), "LowRank: max_rank", "[0, 3]",
                      "got 4");
  CHECK_THROWS_SAYING(ShapeError, Stack(in, 6, {}, rng), "Stacked: out_features", "expected 6", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, Stack(std::vector<LowRank<float>>()), "Stacked", "at least one slice", "none");
  CHECK_THROWS_SAYING(ShapeError, Stack({make_adapter<LowRank<float>>(9, 6, 2, 1), make_adapter<LowRank<float>>(8, 6, 2, 1)}),
                      "Stacked: in_features of a slice", "expected 9", "got 8");
}

TEST_CASE("a stack asks all its slices before it adds anything") {
  using Stack = Stacked<LowRank<float>>;
  const Stack stack = stack_of<float>({5, 4, 3});
  const MatrixX<float> x = noise<float>(in, 4, 1), dy = noise<float>(21, 4, 2);
  MatrixX<float> y = MatrixX<float>::Zero(21, 4), dx = noise<float>(in, 4, 3);
  Stack::Cache cache, of_lower_rank;
  stack.add_forward(x, 3, cache, y);
  stack.add_forward(x, 2, of_lower_rank, y);
  cache.slices[1].h = of_lower_rank.slices[1].h;  // the first slice fits, the second does not
  auto gradients = zeros_like(stack);
  randomize<Stack>(gradients, 4);
  const auto gradients_before = values<Stack>(gradients);
  const MatrixX<float> dx_before = dx;
  CHECK_THROWS_SAYING(ShapeError, stack.check_backward(x, dy, cache, gradients, Stack::Workspace()), "LowRank::add_backward", "cached h",
                      "expected 3", "got 2");
  CHECK_THROWS_SAYING(ShapeError, stack.add_backward(x, dy, cache, gradients, dx), "LowRank::add_backward", "cached h", "expected 3",
                      "got 2");
  CHECK(same_bits(values<Stack>(gradients), gradients_before));
  CHECK(same_bits(dx, dx_before));
}

TEST_CASE("a stack refuses caches and gradients of another number of slices and adds nothing") {
  const Stacked<LowRank<float>> three = stack_of<float>({5, 2, 3});
  const Stacked<LowRank<float>> two(
      std::vector<LowRank<float>>{make_adapter<LowRank<float>>(in, 10, 5, 1), make_adapter<LowRank<float>>(in, 11, 5, 2)});
  const MatrixX<float> x = noise<float>(in, 4, 1), dy = noise<float>(21, 4, 2);
  MatrixX<float> y = MatrixX<float>::Zero(21, 4), dx = MatrixX<float>::Zero(in, 4);
  Stacked<LowRank<float>>::Cache cache;
  two.add_forward(x, 3, cache, y);
  auto gradients = zeros_like(three);
  CHECK_THROWS_SAYING(ShapeError, three.add_backward(x, dy, cache, gradients, dx), "Stacked::add_backward", "cache", "expected 3", "got 2");
  three.add_forward(x, 3, cache, y);
  Stacked<LowRank<float>>::Gradients empty;
  CHECK_THROWS_SAYING(ShapeError, three.add_backward(x, dy, cache, empty, dx), "Stacked", "slices", "expected 3", "got 0");
  // Of which only the last does not fit: the others are left alone.
  gradients.slices[2] = zeros_like(make_adapter<LowRank<float>>(in, 8, 1, 1));
  CHECK_THROWS_SAYING(ShapeError, three.add_backward(x, dy, cache, gradients, dx), "Stacked::add_backward: gradient of 2.lora_A", "3 × 9",
                      "got 1 × 9");
  CHECK(values<Stacked<LowRank<float>>>(gradients).isZero(0));
  CHECK(dx.isZero(0));
}

}  // namespace dylora::test
