#include "dylora/ranks/curve.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

/// A row for each batch.
MatrixX<double> rows(std::initializer_list<std::initializer_list<double>> values) {
  MatrixX<double> result(static_cast<Index>(values.size()), static_cast<Index>(values.begin()->size()));
  Index i = 0;
  for (const auto& row : values) {
    Index j = 0;
    for (const double value : row) result(i, j++) = value;
    ++i;
  }
  return result;
}

RankCurve curve_of(Index lowest, const MatrixX<double>& losses) { return {lowest, losses, VectorX<double>::Ones(losses.rows())}; }

VectorX<double> weights_of(Index batches, std::uint64_t seed) { return noise<double>(batches, 1, seed).array() + 1.5; }

}  // namespace

TEST_CASE("a loss is the mean over the batches with the standard error of a mean") {
  for (const Index batches : {2, 3, 17, 100}) {
    const MatrixX<double> losses = noise<double>(batches, 4, 1);
    const RankCurve curve = curve_of(2, losses);
    CHECK(curve.lowest() == 2);
    CHECK(curve.highest() == 5);
    CHECK(curve.batches() == batches);
    for (Index rank = 2; rank <= 5; ++rank) {
      double sum = 0, squares = 0;
      for (Index i = 0; i < batches; ++i) sum += losses(i, rank - 2);
      const double mean = sum / static_cast<double>(batches);
      for (Index i = 0; i < batches; ++i) squares += std::pow(losses(i, rank - 2) - mean, 2);
      const double deviation = std::sqrt(squares / static_cast<double>(batches - 1));
      CHECK(curve.loss(rank).mean == Approx(mean).epsilon(1e-13).margin(1e-15));
      CHECK(curve.loss(rank).standard_error == Approx(deviation / std::sqrt(static_cast<double>(batches))).epsilon(1e-12));
    }
  }
  const RankCurve exact = curve_of(1, rows({{1, 5}, {3, 5}}));
  CHECK(exact.loss(1).mean == 2);
  CHECK(exact.loss(1).standard_error == Approx(1).epsilon(1e-15));
  CHECK(exact.loss(2).mean == 5);
  CHECK(exact.loss(2).standard_error == 0);
}

TEST_CASE("batches count by their weights and only in proportion") {
  const MatrixX<double> losses = noise<double>(9, 3, 1);
  const VectorX<double> weights = weights_of(9, 2);
  const RankCurve curve(1, losses, weights), larger(1, losses, 1000 * weights);
  for (Index rank = 1; rank <= 3; ++rank) {
    double sum = 0, total = 0, squares = 0;
    for (Index i = 0; i < 9; ++i) {
      sum += weights[i] * losses(i, rank - 1);
      total += weights[i];
    }
    const double mean = sum / total;
    for (Index i = 0; i < 9; ++i) squares += std::pow(weights[i] / total * (losses(i, rank - 1) - mean), 2);
    CHECK(curve.loss(rank).mean == Approx(mean).epsilon(1e-13));
    CHECK(curve.loss(rank).standard_error == Approx(std::sqrt(squares * 9 / 8)).epsilon(1e-12));
    CHECK(larger.loss(rank).mean == Approx(mean).epsilon(1e-13));
    CHECK(larger.loss(rank).standard_error == Approx(curve.loss(rank).standard_error).epsilon(1e-12));
  }
  CHECK(RankCurve(1, rows({{1}, {4}}), VectorX<double>{{2, 1}}).loss(1).mean == Approx(2).epsilon(1e-15));
}

TEST_CASE("the standard error is how far means over other batches lie apart") {
  // 4000 sets of 10 batches of unequal weights.
  const VectorX<double> weights = weights_of(10, 3);
  Rng rng(1);
  double squares = 0, claimed = 0;
  for (int i = 0; i < 4000; ++i) {
    const RankCurve curve(1, random_uniform<double>(10, 1, 1, rng), weights);
    squares += std::pow(curve.loss(1).mean, 2);
    claimed += std::pow(curve.loss(1).standard_error, 2);
  }
  CHECK(claimed == Approx(squares).epsilon(0.05));
}

TEST_CASE("an excess is the difference batch by batch") {
  const MatrixX<double> losses = noise<double>(9, 3, 1);
  const VectorX<double> weights = weights_of(9, 2);
  const RankCurve curve(4, losses, weights);
  for (Index a = 4; a <= 6; ++a) {
    for (Index b = 4; b <= 6; ++b) {
      const RankCurve difference(1, losses.col(a - 4) - losses.col(b - 4), weights);
      CHECK(curve.excess(a, b).mean == Approx(difference.loss(1).mean).epsilon(1e-13).margin(1e-15));
      CHECK(curve.excess(a, b).standard_error == Approx(difference.loss(1).standard_error).epsilon(1e-12));
      CHECK(curve.excess(a, b).mean == Approx(curve.loss(a).mean - curve.loss(b).mean).epsilon(1e-12).margin(1e-15));
      CHECK(curve.excess(a, b).mean == -curve.excess(b, a).mean);
    }
    CHECK(curve.excess(a, a).mean == 0);
    CHECK(curve.excess(a, a).standard_error == 0);
  }
}

TEST_CASE("an excess is far more certain than the losses where a hard batch is hard at every rank") {
  MatrixX<double> losses = 0.01 * noise<double>(20, 4, 1);
  losses.colwise() += VectorX<double>(noise<double>(20, 1, 2));  // how hard each batch is
  losses.col(3).array() -= 0.05;
  const RankCurve curve = curve_of(1, losses);
  for (Index rank = 1; rank < 4; ++rank) {
    CHECK(curve.excess(rank, 4).standard_error < 0.03 * curve.loss(rank).standard_error);
    CHECK(curve.excess(rank, 4).mean > 10 * curve.excess(rank, 4).standard_error);
    CHECK(curve.excess(rank, 4).mean < curve.loss(rank).standard_error);  // lost in the noise of the losses by themselves
  }
}

TEST_CASE("one batch has a mean and says nothing of others") {
  const RankCurve curve(0, rows({{3, 2, 1}}), VectorX<double>{{7}});
  CHECK(curve.batches() == 1);
  CHECK(curve.loss(1).mean == 2);
  CHECK(curve.loss(1).standard_error == infinity);
  CHECK(curve.excess(0, 2).mean == 2);
  CHECK(curve.excess(0, 2).standard_error == infinity);
  CHECK(curve.best() == 2);
  CHECK(select_rank(curve, {}) == 2);
  CHECK(select_rank(curve, {.tolerance = 1}) == 1);
  CHECK_THROWS_SAYING(std::invalid_argument, select_rank(curve, {.standard_errors = 1}), "select_rank: batches, for a standard error",
                      "got 1");
}

TEST_CASE("the best rank has the lowest mean and of equals it is the smallest") {
  CHECK(curve_of(1, rows({{3, 1, 2}, {3, 1, 2}})).best() == 2);
  CHECK(curve_of(5, rows({{3, 1, 2}, {3, 5, 2}})).best() == 7);
  CHECK(curve_of(1, rows({{2, 1, 1}})).best() == 2);
  CHECK(curve_of(1, rows({{1, 1, 1}})).best() == 1);
  CHECK(RankCurve(1, rows({{0, 1}, {4, 2}}), VectorX<double>{{1, 1}}).best() == 2);
  CHECK(RankCurve(1, rows({{0, 1}, {4, 2}}), VectorX<double>{{3, 1}}).best() == 1);
}

TEST_CASE("rank 0 is best only where there is no other") {
  CHECK(curve_of(0, rows({{0, 3, 2}})).best() == 2);
  CHECK(curve_of(0, rows({{0, 1, 1}})).best() == 1);
  CHECK(curve_of(0, rows({{5}})).best() == 0);
  CHECK(curve_of(0, rows({{0, 3, 2}})).loss(0).mean == 0);
  for (const double tolerance : {0.0, 1.0, 100.0}) CHECK(select_rank(curve_of(0, rows({{0, 3, 2}})), {.tolerance = tolerance}) >= 1);
}

TEST_CASE("the smallest rank within the tolerance is selected") {
  const RankCurve curve = curve_of(1, rows({{2, 1.5, 1.125, 1, 1.25}, {2, 1.5, 1.125, 1, 1.25}}));
  CHECK(select_rank(curve, {}) == 4);
  CHECK(select_rank(curve, {.tolerance = 0.1249}) == 4);
  CHECK(select_rank(curve, {.tolerance = 0.125}) == 3);
  CHECK(select_rank(curve, {.tolerance = 0.499}) == 3);
  CHECK(select_rank(curve, {.tolerance = 0.5}) == 2);
  CHECK(select_rank(curve, {.tolerance = 1}) == 1);
  // Not further than the best, and past a rank that is too bad where a smaller one is not.
  CHECK(select_rank(curve_of(1, rows({{1.1, 2, 1, 1}})), {.tolerance = 0.2}) == 1);
  CHECK(select_rank(curve_of(1, rows({{2, 1, 1}})), {}) == 2);
  CHECK(select_rank(curve_of(3, rows({{1, 1, 1}})), {}) == 3);
  CHECK(select_rank(curve_of(0, rows({{9, 1, 0.5}})), {.tolerance = 0.5}) == 1);
}

TEST_CASE("standard errors of the difference are allowed beside the tolerance") {
  // Against rank 3: rank 1 is worse by 1 ± 0.1, rank 2 by 0.2 ± 0.1, though every loss by itself is ± 10.
  const double d = 0.1;
  const RankCurve curve = curve_of(1, rows({{11 + d, 10.2 + d, 10}, {-9 - d, -9.8 - d, -10}}));
  REQUIRE(curve.excess(1, 3).mean == Approx(1));
  REQUIRE(curve.excess(1, 3).standard_error == Approx(d));
  REQUIRE(curve.excess(2, 3).standard_error == Approx(d));
  CHECK(select_rank(curve, {}) == 3);
  CHECK(select_rank(curve, {.standard_errors = 1}) == 3);
  CHECK(select_rank(curve, {.standard_errors = 1.99}) == 3);
  CHECK(select_rank(curve, {.standard_errors = 2.01}) == 2);
  CHECK(select_rank(curve, {.tolerance = 0.1, .standard_errors = 1.01}) == 2);
  CHECK(select_rank(curve, {.tolerance = 0.1, .standard_errors = 0.99}) == 3);
  CHECK(select_rank(curve, {.standard_errors = 9.99}) == 2);
  CHECK(select_rank(curve, {.standard_errors = 10.01}) == 1);
}

TEST_CASE("select_rank is the smallest rank that keeps its promise on any curve") {
  Rng rng(5);
  for (int i = 0; i < 500; ++i) {
    const Index lowest = rng.below(3), ranks = 2 + rng.below(6), batches = 2 + rng.below(5);
    const RankCurve curve(lowest, random_uniform<double>(batches, ranks, 1, rng), weights_of(batches, static_cast<std::uint64_t>(i)));
    const SelectRankOptions options{.tolerance = 0.5 * rng.uniform(), .standard_errors = 2 * rng.uniform()};
    Index best = std::max<Index>(1, lowest);
    for (Index rank = best; rank <= curve.highest(); ++rank) best = curve.loss(rank).mean < curve.loss(best).mean ? rank : best;
    CHECK(curve.best() == best);
    const auto allowed = [&](Index rank) {
      return curve.excess(rank, best).mean <= options.tolerance + options.standard_errors * curve.excess(rank, best).standard_error;
    };
    const Index selected = select_rank(curve, options);
    CHECK(allowed(selected));
    for (Index rank = std::max<Index>(1, lowest); rank < selected; ++rank) CHECK_FALSE(allowed(rank));
  }
}

TEST_CASE("every rank is evaluated on every batch once and rank 0 without the adapter") {
  std::vector<std::pair<RankSlice, Index>> calls;
  const auto loss = [&](RankSlice rank, Index batch) {
    calls.emplace_back(rank, batch);
    return 10.0 * static_cast<double>(rank.active) + static_cast<double>(batch);
  };
  const RankCurve curve = evaluate_ranks(0, 2, 3, loss);
  REQUIRE(calls.size() == 9);
  for (Index batch = 0; batch < 3; ++batch) {
    for (const RankSlice rank : {RankSlice::none(), RankSlice(1), RankSlice(2)}) {
      CHECK(std::count(calls.begin(), calls.end(), std::pair(rank, batch)) == 1);
    }
  }
  CHECK(curve.lowest() == 0);
  CHECK(curve.highest() == 2);
  CHECK(curve.batches() == 3);
  for (Index rank = 0; rank <= 2; ++rank) CHECK(curve.loss(rank).mean == Approx(10.0 * static_cast<double>(rank) + 1).epsilon(1e-14));
  calls.clear();
  CHECK(evaluate_ranks(3, 3, 1, loss).loss(3).mean == 30);
  CHECK(calls == std::vector<std::pair<RankSlice, Index>>{{3, 0}});
}

TEST_CASE("evaluated batches count by their weights or else equally") {
  const auto loss = [](RankSlice rank, Index batch) { return static_cast<double>(rank.active * (batch + 1)); };
  CHECK(evaluate_ranks(1, 2, 2, loss).loss(2).mean == Approx(3).epsilon(1e-15));
  CHECK(evaluate_ranks(1, 2, 2, loss, std::vector<double>{3, 1}).loss(2).mean == Approx(2.5).epsilon(1e-15));
  CHECK(evaluate_ranks(1, 2, 2, loss, std::vector<double>{300, 100}).loss(1).mean == Approx(1.25).epsilon(1e-15));
}

TEST_CASE("a curve refuses what is no measurement and names it") {
  const VectorX<double> two = VectorX<double>::Ones(2);
  CHECK_THROWS_SAYING(std::invalid_argument, RankCurve(-1, rows({{1}, {2}}), two), "RankCurve: lowest rank", "got -1");
  CHECK_THROWS_SAYING(ShapeError, RankCurve(1, MatrixX<double>(0, 3), VectorX<double>()), "RankCurve: batches", "at least one");
  CHECK_THROWS_SAYING(ShapeError, RankCurve(1, MatrixX<double>(2, 0), two), "RankCurve: ranks", "at least one");
  CHECK_THROWS_SAYING(ShapeError, RankCurve(1, rows({{1}, {2}, {3}}), two), "RankCurve: number of weights", "expected 3", "got 2");
  for (const double weight : {0.0, -1.0, nan<double>, infinity}) {
    CHECK_THROWS_SAYING(std::invalid_argument, RankCurve(1, rows({{1}, {2}}), VectorX<double>{{1, weight}}), "RankCurve: weight of a batch",
                        "a finite number > 0", "got");
  }
  for (const double bad : {nan<double>, infinity, -infinity}) {
    CHECK_THROWS_SAYING(NonFiniteError, RankCurve(3, rows({{1, 1, 1}, {1, bad, 1}}), two), "loss at rank 4 on batch 1",
                        "expected a finite number", "got");
  }
}

TEST_CASE("a curve refuses a rank that was not evaluated") {
  const RankCurve curve = curve_of(2, rows({{1, 2, 3}}));
  CHECK_THROWS_SAYING(std::invalid_argument, curve.loss(1), "RankCurve: rank", "[2, 4]", "got 1");
  CHECK_THROWS_SAYING(std::invalid_argument, curve.loss(5), "RankCurve: rank", "[2, 4]", "got 5");
  CHECK_THROWS_SAYING(std::invalid_argument, curve.excess(0, 3), "RankCurve: rank", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, curve.excess(3, 9), "RankCurve: rank", "got 9");
}

TEST_CASE("an evaluation refuses a range that is none and passes on what the loss throws") {
  int calls = 0;
  const auto counted = [&](RankSlice, Index) { return static_cast<double>(++calls); };
  CHECK_THROWS_SAYING(std::invalid_argument, evaluate_ranks(-1, 2, 1, counted), "evaluate_ranks: lowest rank", "[0, 2]", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, evaluate_ranks(3, 2, 1, counted), "evaluate_ranks: lowest rank", "[0, 2]", "got 3");
  CHECK_THROWS_SAYING(std::invalid_argument, evaluate_ranks(1, 2, 0, counted), "evaluate_ranks: batches", "got 0");
  CHECK(calls == 0);
  CHECK_THROWS_SAYING(ShapeError, evaluate_ranks(1, 2, 2, counted, std::vector<double>{1, 1, 1}), "number of weights", "expected 2",
                      "got 3");
  const auto bad = [](RankSlice rank, Index batch) { return rank.active == 2 && batch == 1 ? nan<double> : 1; };
  CHECK_THROWS_SAYING(NonFiniteError, evaluate_ranks(1, 3, 4, bad), "loss at rank 2 on batch 1", "got");
  const auto thrown = [](RankSlice, Index) -> double { throw std::out_of_range("no such batch"); };
  CHECK_THROWS_SAYING(std::out_of_range, evaluate_ranks(1, 3, 4, thrown), "no such batch");
}

TEST_CASE("select_rank refuses options out of range and a curve of rank 0 alone") {
  const RankCurve curve = curve_of(1, rows({{1, 2, 3}}));
  for (const double bad : {-1e-9, nan<double>, infinity}) {
    CHECK_THROWS_SAYING(std::invalid_argument, select_rank(curve, {.tolerance = bad}), "select_rank: tolerance", "a finite number ≥ 0",
                        "got");
    CHECK_THROWS_SAYING(std::invalid_argument, select_rank(curve, {.standard_errors = bad}), "select_rank: standard_errors", "got");
  }
  CHECK_THROWS_SAYING(std::invalid_argument, select_rank(curve_of(0, rows({{1}})), {}), "select_rank: highest rank evaluated", "got 0");
}

}  // namespace dylora::test
