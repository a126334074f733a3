#include "dylora/methods/pissa/offset_low_rank.hpp"

#include <limits>
#include <string>
#include <vector>

#include "dylora/ranks/truncate.hpp"
#include "dylora/train/adamw.hpp"
#include "methods/pissa/offset_low_rank_under_test.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

using AdaptersUnderTest = InFloatAndDouble<OffsetLowRankUnderTest>;

}  // namespace dylora::test

#include "laws/adapter_laws.hpp"

namespace dylora::test {

namespace {

constexpr Index in = 9, out = 7, samples = 4;

template <class S>
OffsetLowRank<S> started(LowRankOptions options = {.max_rank = 5, .alpha = 3}) {
  return {RowMatrix<S>(noise<S>(options.max_rank, in, 1)), noise<S>(out, options.max_rank, 2), options};
}

/// The same, trained.
template <class S>
OffsetLowRank<S> trained(LowRankOptions options = {.max_rank = 5, .alpha = 3}) {
  OffsetLowRank<S> adapter = started<S>(options);
  randomize<OffsetLowRank<S>>(adapter, 3);
  return adapter;
}

template <class S>
MatrixX<S> product(const LowRankFactors<S>& factors, Index rank) {
  return static_cast<S>(factors.scale) * factors.B.leftCols(rank).lazyProduct(factors.A.topRows(rank));
}

}  // namespace

TEMPLATE_TEST_CASE("what is added is what training made of the factors beyond those it began with", "", float, double) {
  using S = TestType;
  const OffsetLowRank<S> adapter = trained<S>();
  const MatrixX<S> x = noise<S>(in, samples, 4), dy = noise<S>(out, samples, 5);
  for (Index b = 1; b <= 5; ++b) {
    const MatrixX<double> now = in_double<S>(adapter.current.B.leftCols(b)).lazyProduct(in_double<S>(adapter.current.A.topRows(b)));
    const MatrixX<double> then = in_double<S>(adapter.initial_B.leftCols(b)).lazyProduct(in_double<S>(adapter.initial_A.topRows(b)));
    const MatrixX<double> delta = 3.0 / static_cast<double>(b) * (now - then);
    const auto result = run(adapter, x, dy, b);
    CHECK(gap(in_double(result.y), delta.lazyProduct(in_double(x))) < rounding<S>);
    CHECK(gap(in_double(result.dx), delta.transpose().lazyProduct(in_double(dy))) < rounding<S>);
    CHECK(gap(in_double(adapter.delta(b)), delta) < rounding<S>);
  }
}

TEMPLATE_TEST_CASE("both factors learn from the first step on and their gradients are those of a low-rank adapter", "", float, double) {
  using S = TestType;
  const OffsetLowRank<S> fresh = started<S>();
  const MatrixX<S> x = noise<S>(in, samples, 4), dy = noise<S>(out, samples, 5);
  for (const RankSlice rank : {RankSlice(1), RankSlice(5), RankSlice(4, 2)}) {
    for (const OffsetLowRank<S>& adapter : {fresh, trained<S>()}) {
      const auto result = run(adapter, x, dy, rank);
      const auto plain = run(adapter.current, x, dy, rank);
      const auto got = values<OffsetLowRank<S>>(result.gradients), expected = values<LowRank<S>>(plain.gradients);
      CHECK(gap(got.template cast<double>(), expected.template cast<double>()) < rounding<S>);
      CHECK_FALSE(MatrixX<S>(result.gradients.current.A).isZero(0));
      CHECK_FALSE(MatrixX<S>(result.gradients.current.B).isZero(0));
    }
  }
}

TEMPLATE_TEST_CASE("near the start the little that was learnt is as exact as anything", "", float, double) {
  using S = TestType;
  OffsetLowRank<S> adapter = started<S>();
  const S step = 64 * std::numeric_limits<S>::epsilon();  // of factors near 1
  adapter.current.A(2, 3) += adapter.initial_A(2, 3) * step;
  const double difference = double(adapter.current.A(2, 3)) - double(adapter.initial_A(2, 3));
  MatrixX<double> expected = MatrixX<double>::Zero(out, in);
  expected.col(3) = 0.6 * difference * in_double<S>(adapter.initial_B.col(2));
  CHECK(gap(in_double(adapter.delta(5)), expected) < rounding<S>);
}

TEMPLATE_TEST_CASE("training leaves the initial factors as they were", "", float, double) {
  using S = TestType;
  OffsetLowRank<S> adapter = started<S>();
  const OffsetLowRank<S> before = adapter;
  AdamW optimizer(adapter, {.lr = 0.1});
  optimizer.step(adapter, run(adapter, noise<S>(in, samples, 4), noise<S>(out, samples, 5), 5).gradients);
  CHECK(same_bits(MatrixX<S>(adapter.initial_A), MatrixX<S>(before.initial_A)));
  CHECK(same_bits(adapter.initial_B, before.initial_B));
  CHECK((adapter.current.A.array() != before.current.A.array()).all());
  CHECK((adapter.current.B.array() != before.current.B.array()).all());
  CHECK(names(adapter) == std::vector<std::string>{"lora_A", "lora_B"});
}

TEMPLATE_TEST_CASE("its factors are one low-rank product of twice the rank of which every even prefix is a lower rank", "", float, double) {
  using S = TestType;
  const OffsetLowRank<S> adapter = trained<S>();
  CHECK(adapter.components() == 5);
  for (Index b = 1; b <= 5; ++b) {
    const LowRankFactors<S> factors = adapter.factors(b);
    CHECK(factors.A.rows() == 2 * b);
    CHECK(factors.B.cols() == 2 * b);
    CHECK(factors.scale == 3.0 / static_cast<double>(b));
    CHECK(gap(in_double(product(factors, 2 * b)), in_double(adapter.delta(b))) < rounding<S>);
  }
  CHECK(adapter.factors(0).A.rows() == 0);
  LowRank<S> plain = adapter.current;
  plain.set_factors(adapter.factors(5));
  CHECK(plain.max_rank() == 10);
  for (Index b = 1; b <= 5; ++b) CHECK(gap(in_double(plain.delta(2 * b)), in_double(adapter.delta(b))) < rounding<S>);
  CHECK_THROWS_SAYING(std::invalid_argument, adapter.factors(6), "factors: rank", "[0, 5]", "got 6");
}

TEMPLATE_TEST_CASE("factors taken over count as trained from zero and come back bit for bit", "", float, double) {
  using S = TestType;
  const OffsetLowRank<S> adapter = trained<S>();
  OffsetLowRank<S> taken = started<S>();
  const LowRankFactors<S> factors = adapter.factors(4);
  taken.set_factors(factors);
  CHECK(taken.max_rank() == 8);
  CHECK(taken.initial_A.isZero(0));
  CHECK(taken.initial_B.isZero(0));
  CHECK(gap(in_double(taken.delta(8)), in_double(adapter.delta(4))) < rounding<S>);
  const LowRankFactors<S> again = taken.factors(8);
  CHECK(same_bits(MatrixX<S>(again.A), MatrixX<S>(factors.A)));
  CHECK(same_bits(again.B, factors.B));
  CHECK(again.scale == factors.scale);
  const MatrixX<S> x = noise<S>(in, samples, 4), dy = noise<S>(out, samples, 5);
  const auto one = run(taken, x, dy, 3);
  const auto plain = run(taken.current, x, dy, 3);
  CHECK(gap(in_double(one.y), in_double(plain.y)) < rounding<S>);
  CHECK(gap(in_double(one.dx), in_double(plain.dx)) < rounding<S>);

  const LowRankFactors<S> other{RowMatrix<S>(noise<S>(2, in + 1, 1)), noise<S>(out, 2, 2), 1};
  CHECK_THROWS_AS(taken.set_factors(other), ShapeError);
  CHECK(same_bits(MatrixX<S>(taken.factors(8).A), MatrixX<S>(factors.A)));
}

TEST_CASE("an adapter cut before it was trained is still zero at every rank") {
  OffsetLowRank<float> adapter = started<float>();
  truncate(adapter, 3);
  CHECK(adapter.components() == 3);
  CHECK(adapter.max_rank() == 5);
  for (Index b = 1; b <= 5; ++b) CHECK(adapter.delta(b).isZero(0));
  CHECK(adapter.factors(5).A.rows() == 6);
}

TEST_CASE("initial factors that were made to disagree after construction are refused") {
  OffsetLowRank<float> adapter = started<float>();
  OffsetLowRank<float>::Cache cache;
  MatrixX<float> y = MatrixX<float>::Zero(out, samples);
  const MatrixX<float> x = noise<float>(in, samples, 4);
  OffsetLowRank<float> changed = adapter;
  changed.initial_A = noise<float>(4, in, 1);
  CHECK_THROWS_SAYING(std::invalid_argument, changed.add_forward(x, 3, cache, y), "OffsetLowRank: rows of initial_A", "[5, ", "got 4");
  CHECK_THROWS_AS(changed.delta(3), std::invalid_argument);
  changed = adapter;
  changed.initial_A = noise<float>(5, in + 1, 1);
  CHECK_THROWS_SAYING(ShapeError, changed.add_forward(x, 3, cache, y), "OffsetLowRank: columns of initial_A", "expected 9", "got 10");
  CHECK_THROWS_AS(changed.delta(3), std::invalid_argument);
  changed = adapter;
  changed.initial_B = noise<float>(out, 4, 1);
  CHECK_THROWS_SAYING(std::invalid_argument, changed.add_forward(x, 3, cache, y), "OffsetLowRank: columns of initial_B", "[5, ", "got 4");
  CHECK_THROWS_AS(changed.delta(3), std::invalid_argument);
  changed = adapter;
  changed.initial_B = noise<float>(out + 1, 5, 1);
  CHECK_THROWS_SAYING(ShapeError, changed.add_forward(x, 3, cache, y), "OffsetLowRank: rows of initial_B", "expected 7", "got 8");
  CHECK_THROWS_AS(changed.delta(3), std::invalid_argument);
  changed = adapter;
  changed.current.B = noise<float>(out, 4, 1);
  CHECK_THROWS_SAYING(ShapeError, changed.add_forward(x, 3, cache, y), "OffsetLowRank: columns of B", "expected 5", "got 4");
  CHECK_THROWS_AS(changed.delta(3), std::invalid_argument);
  changed = adapter;
  changed.current.options.max_rank = 4;
  CHECK_THROWS_SAYING(std::invalid_argument, changed.add_forward(x, 3, cache, y), "OffsetLowRank: components", "[0, 4]", "got 5");
  CHECK_THROWS_AS(changed.delta(3), std::invalid_argument);
  CHECK(y.isZero(0));
}

TEST_CASE("an adapter of no component is no adapter and takes any rank") {
  const OffsetLowRank<float> none(RowMatrix<float>(0, in), MatrixX<float>(out, 0), {});
  const auto result = run(none, noise<float>(in, samples, 4), noise<float>(out, samples, 5), 3);
  CHECK(result.y.isZero(0));
  CHECK(result.dx.isZero(0));
  CHECK(none.delta(3).isZero(0));
  CHECK(none.factors(0).A.rows() == 0);
}

}  // namespace dylora::test
