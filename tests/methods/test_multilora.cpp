#include "dylora/methods/multilora.hpp"

#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "dylora/ranks/truncate.hpp"
#include "methods/multilora_under_test.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

/// Whose gains are one number for each of four modules.
template <class S>
struct ScalarGain : MultiLora<S> {
  using MultiLora<S>::MultiLora;
};

template <class S>
MultiLoraOptions options_of(As<ScalarGain<S>>, Index /*out*/, Index max_rank) {
  return {.max_rank = max_rank, .modules = 4, .alpha = law_alpha, .gain = GainShape::scalar};
}

using AdaptersUnderTest = InFloatAndDouble<MultiLora, ScalarGain>;

}  // namespace dylora::test

#include "laws/adapter_laws.hpp"

namespace dylora::test {

namespace {

constexpr Index in = 9, out = 7, R = 5, modules = 3;

template <class S>
MultiLora<S> trained(GainShape shape = GainShape::per_output, std::uint64_t seed = 1) {
  Rng rng(seed);
  MultiLora<S> adapter(in, out, {.max_rank = R, .modules = modules, .alpha = 3, .gain = shape}, rng);
  randomize<MultiLora<S>>(adapter, seed + 1);
  return adapter;
}

template <class S>
MatrixX<S> A_of(const MultiLora<S>& adapter, Index module, Index b) {
  return adapter.A.block(0, module * in, b, in);
}
template <class S>
MatrixX<S> B_of(const MultiLora<S>& adapter, Index module, Index b) {
  return adapter.B.block(module * out, 0, out, b);
}
template <class S>
MatrixX<S> gain_of(const MultiLora<S>& adapter, Index module) {
  return adapter.gain.rows() == 1 ? MatrixX<S>::Constant(out, 1, adapter.gain(0, module)) : MatrixX<S>(adapter.gain.col(module));
}

/// The same with its modules in another order.
template <class S>
MultiLora<S> reordered(const MultiLora<S>& adapter, const std::vector<Index>& order) {
  MultiLora<S> result = adapter;
  for (Index i = 0; i < modules; ++i) {
    const Index from = order[static_cast<std::size_t>(i)];
    result.A.middleCols(i * in, in) = A_of(adapter, from, R);
    result.B.middleRows(i * out, out) = B_of(adapter, from, R);
    result.gain.col(i) = adapter.gain.col(from);
  }
  return result;
}

}  // namespace

TEMPLATE_TEST_CASE("the output of parallel modules is the sum of theirs with their gains", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(in, 4, 3);
  for (const GainShape shape : {GainShape::per_output, GainShape::scalar}) {
    const MultiLora<S> adapter = trained<S>(shape);
    for (Index b = 1; b <= R; ++b) {
      MatrixX<double> expected = MatrixX<double>::Zero(out, 4);
      for (Index j = 0; j < modules; ++j) {
        const MatrixX<double> h = in_double(A_of(adapter, j, b)).lazyProduct(in_double(x));
        const MatrixX<double> y = in_double(B_of(adapter, j, b)).lazyProduct(h);
        expected += 3.0 / static_cast<double>(b) * in_double(gain_of(adapter, j)).col(0).asDiagonal() * y;
      }
      CHECK(gap(in_double(run(adapter, x, noise<S>(out, 4, 4), b).y), expected) < rounding<S>);
    }
  }
}

TEMPLATE_TEST_CASE("oracle of MultiLoRA: a fresh adapter leaves the base's output as it is bit for bit", "", float, double) {
  using S = TestType;
  Rng rng(5);
  const MatrixX<S> W = noise<S>(out, in, 1), x = noise<S>(in, 4, 2);
  const Linear<S, MultiLora<S>> layer(W, {.max_rank = R, .modules = modules}, rng);
  const MatrixX<S> base = FrozenLinear<S>(DenseWeight<S>(W)).forward(x, RankSlice::none());
  for (Index b = 1; b <= R; ++b) {
    CHECK(same_bits(layer.forward(x, b), base));
    CHECK(same_bits(layer.merged(b).dense(), W));
  }
}

TEMPLATE_TEST_CASE("oracle of MultiLoRA: one module with gain 1 is LoRA with the same factors bit for bit", "", float, double) {
  using S = TestType;
  const RowMatrix<S> A = noise<S>(R, in, 1);
  const MatrixX<S> B = noise<S>(out, R, 2), x = noise<S>(in, 4, 3), dy = noise<S>(out, 4, 4);
  const LowRank<S> lora(A, B, {.alpha = 3});
  for (const Index gain_rows : {Index{1}, out}) {
    const MultiLora<S> multi(A, B, MatrixX<S>::Ones(gain_rows, 1), {.alpha = 3});
    for (const RankSlice rank : law_slices()) {
      const auto one = run(multi, x, dy, rank);
      const auto other = run(lora, x, dy, rank);
      CHECK(same_bits(one.y, other.y));
      CHECK(same_bits(one.dx, other.dx));
      CHECK(same_bits(component_values<MultiLora<S>>(one.gradients, 0), component_values<LowRank<S>>(other.gradients, 0)));
      CHECK(same_bits(multi.delta(rank), lora.delta(rank)));
    }
  }
}

TEMPLATE_TEST_CASE("oracle of MultiLoRA: the modules stacked with their gains in B are one LoRA of rank n b", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(in, 4, 3), dy = noise<S>(out, 4, 4);
  for (const GainShape shape : {GainShape::per_output, GainShape::scalar}) {
    const MultiLora<S> adapter = trained<S>(shape);
    for (Index b = 1; b <= R; ++b) {
      RowMatrix<S> A(modules * b, in);
      MatrixX<S> B(out, modules * b);
      for (Index j = 0; j < modules; ++j) {  // module after module: not the order in which they are kept
        A.middleRows(j * b, b) = A_of(adapter, j, b);
        B.middleCols(j * b, b) = gain_of(adapter, j).col(0).asDiagonal() * B_of(adapter, j, b);
      }
      const double alpha = 3.0 / static_cast<double>(b);
      const LowRank<S> lora(A, B, {.alpha = alpha, .scale = [](double a, Index, Index) { return a; }});
      const auto one = run(adapter, x, dy, b);
      const auto other = run(lora, x, dy, modules * b);
      CHECK(gap(in_double(one.y), in_double(other.y)) < rounding<S>);
      CHECK(gap(in_double(one.dx), in_double(other.dx)) < rounding<S>);
      CHECK(gap(in_double(adapter.delta(b)), in_double(lora.delta(modules * b))) < rounding<S>);
    }
  }
}

TEMPLATE_TEST_CASE("oracle of MultiLoRA: the order of the modules does not matter", "", float, double) {
  using S = TestType;
  const MatrixX<S> x = noise<S>(in, 4, 3), dy = noise<S>(out, 4, 4);
  for (const GainShape shape : {GainShape::per_output, GainShape::scalar}) {
    const MultiLora<S> adapter = trained<S>(shape);
    for (const std::vector<Index>& order : {std::vector<Index>{1, 2, 0}, {2, 1, 0}, {0, 2, 1}}) {
      const MultiLora<S> other = reordered(adapter, order);
      for (Index b = 1; b <= R; ++b) {
        const auto before = run(adapter, x, dy, b);
        auto after = run(other, x, dy, b);
        CHECK(gap(in_double(after.y), in_double(before.y)) < rounding<S>);
        CHECK(gap(in_double(after.dx), in_double(before.dx)) < rounding<S>);
        for (Index i = 0; i < modules; ++i) {  // and each module's gradients go with it, bit for bit
          const Index from = order[static_cast<std::size_t>(i)];
          CHECK(same_bits(MatrixX<S>(after.gradients.A.middleCols(i * in, in)), MatrixX<S>(before.gradients.A.middleCols(from * in, in))));
          CHECK(same_bits(MatrixX<S>(after.gradients.B.middleRows(i * out, out)),
                          MatrixX<S>(before.gradients.B.middleRows(from * out, out))));
          CHECK(same_bits(MatrixX<S>(after.gradients.gain.col(i)), MatrixX<S>(before.gradients.gain.col(from))));
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("oracle of MultiLoRA: equal modules get equal gradients", "", float, double) {
  using S = TestType;
  for (const GainShape shape : {GainShape::per_output, GainShape::scalar}) {
    const MultiLora<S> equal = reordered(trained<S>(shape), {0, 0, 0});
    for (const RankSlice rank : law_slices()) {
      const auto got = run(equal, noise<S>(in, 4, 3), noise<S>(out, 4, 4), rank).gradients;
      CHECK_FALSE(got.gain.isZero(0));
      for (Index j = 1; j < modules; ++j) {
        CHECK(same_bits(MatrixX<S>(got.A.leftCols(in)), MatrixX<S>(got.A.middleCols(j * in, in))));
        CHECK(same_bits(MatrixX<S>(got.B.topRows(out)), MatrixX<S>(got.B.middleRows(j * out, out))));
        CHECK(same_bits(MatrixX<S>(got.gain.col(0)), MatrixX<S>(got.gain.col(j))));
      }
    }
  }
}

TEMPLATE_TEST_CASE("in the first step of parallel modules only the gains move", "", float, double) {
  using S = TestType;
  Rng rng(5);
  const MultiLora<S> fresh(in, out, {.max_rank = R, .modules = modules}, rng);
  auto got = run(fresh, noise<S>(in, 4, 3), noise<S>(out, 4, 4), 3).gradients;
  CHECK(got.A.isZero(0));
  CHECK(got.B.isZero(0));
  CHECK((got.gain.array() != 0).all());
  // Where B is 0 too, nothing ever does.
  MultiLora<S> dead = fresh;
  dead.B.setZero();
  CHECK(values<MultiLora<S>>(run(dead, noise<S>(in, 4, 3), noise<S>(out, 4, 4), 3).gradients).isZero(0));
}

TEST_CASE("the gradient of a scalar gain is the sum of that of the same gain for each output") {
  using M = MultiLora<double>;
  const M scalar = trained<double>(GainShape::scalar);
  MatrixX<double> gain(out, modules);
  gain.rowwise() = scalar.gain.row(0);
  const M vector(scalar.A, scalar.B, gain, scalar.options);
  CHECK(vector.options.gain == GainShape::per_output);
  const MatrixX<double> x = noise<double>(in, 4, 3), dy = noise<double>(out, 4, 4);
  for (const RankSlice rank : law_slices()) {
    const auto one = run(scalar, x, dy, rank), each = run(vector, x, dy, rank);
    CHECK(same_bits(one.y, each.y));
    CHECK(gap(one.gradients.gain, each.gradients.gain.colwise().sum()) < rounding<double>);
    CHECK(same_bits(component_values<M>(one.gradients, 0), component_values<M>(each.gradients, 0)));
  }
}

TEMPLATE_TEST_CASE("fresh modules differ and are uniform within one over the roots of in and of the rank", "", float, double) {
  using S = TestType;
  Rng rng(5);
  const MultiLora<S> adapter(400, 500, {.max_rank = 40}, rng);
  CHECK(adapter.options.modules == 3);
  CHECK(adapter.gain.isZero(0));
  CHECK(adapter.gain.rows() == 500);
  CHECK(adapter.in_features() == 400);
  CHECK(adapter.out_features() == 500);
  for (Index j = 0; j < 3; ++j) {
    const MatrixX<double> A = in_double<S>(adapter.A.middleCols(j * 400, 400)) * std::sqrt(400.0);
    const MatrixX<double> B = in_double<S>(adapter.B.middleRows(j * 500, 500)) * std::sqrt(40.0);
    for (const MatrixX<double>& factor :
         {A, B}) {  // 16000 draws: the mean of |u| is 1/2 with a deviation of 0.0023, that of u 0 with 0.0046
      CHECK(factor.cwiseAbs().maxCoeff() <= 1 + 1e-6);
      CHECK(std::abs(factor.cwiseAbs().mean() - 0.5) < 0.01);
      CHECK(std::abs(factor.mean()) < 0.02);
    }
    if (j == 0) continue;
    const MatrixX<double> first = in_double<S>(adapter.A.leftCols(400)) * std::sqrt(400.0);
    CHECK(std::abs(A.cwiseProduct(first).mean()) < 0.02);  // 0 with a deviation of 0.0026
  }
  Rng same(5), other(6);
  CHECK(same_bits(MatrixX<S>(adapter.B), MatrixX<S>(MultiLora<S>(400, 500, {.max_rank = 40}, same).B)));
  CHECK_FALSE(same_bits(MatrixX<S>(adapter.B), MatrixX<S>(MultiLora<S>(400, 500, {.max_rank = 40}, other).B)));
}

TEMPLATE_TEST_CASE("parallel modules come back from their factors as the same function bit for bit", "", float, double) {
  using S = TestType;
  for (const GainShape shape : {GainShape::per_output, GainShape::scalar}) {
    const MultiLora<S> adapter = trained<S>(shape);
    for (Index b = 0; b <= R; ++b) {
      const LowRankFactors<S> factors = adapter.factors(b);
      CHECK(factors.A.rows() == modules * b);
      MultiLora<S> taken = trained<S>(shape, 7);
      taken.set_factors(factors);
      CHECK(taken.max_rank() == b);
      CHECK(taken.options.modules == modules);
      CHECK(same_bits(MatrixX<S>(taken.factors(b).A), MatrixX<S>(factors.A)));
      CHECK(same_bits(taken.factors(b).B, factors.B));
      CHECK(taken.factors(b).scale == factors.scale);
      CHECK((taken.gain.array() == 1).all());
      if (b == 0) continue;
      CHECK(same_bits(taken.delta(b), adapter.delta(b)));
      for (Index lower = 1; lower < b; ++lower) CHECK(gap(in_double(taken.delta(lower)), in_double(adapter.delta(lower))) < rounding<S>);
    }
  }
}

TEMPLATE_TEST_CASE("factors of a rank that is no multiple of the modules are filled up with what adds nothing and can learn", "", float,
                   double) {
  using S = TestType;
  for (const Index rank : {1, 2, 4, 5, 7}) {
    LowRank<S> lora(RowMatrix<S>(noise<S>(rank, in, 1)), noise<S>(out, rank, 2), {.alpha = 3});
    MultiLora<S> taken = trained<S>();
    taken.set_factors(lora.factors(rank));
    CHECK(taken.max_rank() == (rank + 2) / 3);
    CHECK(gap(in_double(taken.delta(taken.max_rank())), in_double(lora.delta(rank))) < rounding<S>);
    const LowRankFactors<S> factors = taken.factors(taken.max_rank());
    CHECK(same_bits(MatrixX<S>(factors.A.topRows(rank)), MatrixX<S>(lora.A)));
    CHECK(same_bits(MatrixX<S>(factors.B.leftCols(rank)), lora.B));
    CHECK(factors.B.rightCols(factors.B.cols() - rank).isZero(0));
    CHECK(factors.scale == 3.0 / static_cast<double>(rank));
    const auto gradients = run(taken, noise<S>(in, 4, 3), noise<S>(out, 4, 4), taken.max_rank()).gradients;
    CHECK((gradients.B.array() != 0).all());
  }
}

TEST_CASE("parallel modules keep a component together in both factors and say what they train") {
  Rng rng(1);
  MultiLora<float> adapter(in, out, {.max_rank = R, .modules = modules}, rng);
  CHECK(&adapter.A(3, 0) == adapter.A.data() + 3 * modules * in);
  CHECK(&adapter.B(0, 3) == adapter.B.data() + 3 * modules * out);
  CHECK(names(adapter) == std::vector<std::string>{"multilora_A", "multilora_B", "multilora_gain"});
  CHECK(adapter_ranks(adapter) == std::vector<AdapterRank>{{"", R, modules * (in + out)}});
  CHECK(parameter_count(adapter) == R * modules * (in + out) + modules * out);
}

TEST_CASE("parallel modules of largest rank 0 are no adapter and take any rank") {
  Rng rng(1);
  const MultiLora<float> none(in, out, {.max_rank = 0}, rng);
  const auto result = run(none, noise<float>(in, 4, 3), noise<float>(out, 4, 4), 3);
  CHECK(result.y.isZero(0));
  CHECK(result.dx.isZero(0));
  CHECK(parameter_count(none) == 0);
  CHECK(none.in_features() == in);
  CHECK(none.out_features() == out);
  CHECK(none.delta(3).isZero(0));
  CHECK(none.delta(3).rows() == out);
}

TEST_CASE("parallel modules refuse options and factors that do not fit and are as they were") {
  Rng rng(1);
  using M = MultiLora<float>;
  CHECK_THROWS_SAYING(std::invalid_argument, M(9, 7, {.max_rank = 8}, rng), "MultiLora: max_rank", "[0, 7]", "got 8");
  CHECK_THROWS_SAYING(std::invalid_argument, M(9, 7, {.max_rank = 4, .modules = 0}, rng), "MultiLora: modules", "[1, ", "got 0");
  for (const double alpha : {0.0, -1.0, nan<double>, std::numeric_limits<double>::infinity()}) {
    CHECK_THROWS_SAYING(std::invalid_argument, M(9, 7, {.max_rank = 2, .alpha = alpha}, rng), "MultiLora: alpha", "finite number > 0");
  }
  const RowMatrix<float> A = noise<float>(5, 18, 1);
  const MatrixX<float> B = noise<float>(14, 5, 2), gain = noise<float>(7, 2, 3);
  CHECK(M(A, B, gain, {}).options.modules == 2);
  CHECK_THROWS_SAYING(ShapeError, M(A, noise<float>(14, 4, 2), gain, {}), "MultiLora: columns of B", "expected 5", "got 4");
  CHECK_THROWS_SAYING(ShapeError, M(A, noise<float>(15, 5, 2), gain, {}), "MultiLora: rows of B", "expected 14", "got 15");
  CHECK_THROWS_SAYING(ShapeError, M(RowMatrix<float>(noise<float>(5, 19, 1)), B, gain, {}), "MultiLora: columns of A", "expected 18",
                      "got 19");
  CHECK_THROWS_SAYING(ShapeError, M(A, B, noise<float>(6, 2, 3), {}), "MultiLora: rows of the gain", "expected 7", "got 6");
  CHECK_THROWS_SAYING(std::invalid_argument, M(A, B, MatrixX<float>(7, 0), {}), "MultiLora: modules", "got 0");

  M adapter = trained<float>();
  const M before = adapter;
  const auto factors = [](Index o, Index b, Index a, Index i, double scale) {
    return LowRankFactors<float>{RowMatrix<float>(noise<float>(a, i, 1)), noise<float>(o, b, 2), scale};
  };
  CHECK_THROWS_SAYING(ShapeError, adapter.set_factors(factors(7, 4, 4, 10, 1)), "set_factors: columns of A", "expected 9", "got 10");
  CHECK_THROWS_SAYING(ShapeError, adapter.set_factors(factors(8, 4, 4, 9, 1)), "set_factors: rows of B", "expected 7", "got 8");
  CHECK_THROWS_SAYING(ShapeError, adapter.set_factors(factors(7, 3, 4, 9, 1)), "set_factors: columns of B", "expected 4", "got 3");
  CHECK_THROWS_SAYING(std::invalid_argument, adapter.set_factors(factors(7, 4, 4, 9, -1)), "MultiLora: alpha");
  CHECK_THROWS_SAYING(std::invalid_argument, adapter.factors(6), "MultiLora::factors: rank", "[0, 5]", "got 6");
  CHECK(same_bits(values<M>(adapter), values<M>(before)));
  CHECK(adapter.options.alpha == before.options.alpha);

  adapter.gain.resize(7, 2);
  M::Cache cache;
  MatrixX<float> y = MatrixX<float>::Zero(7, 4);
  CHECK_THROWS_SAYING(ShapeError, adapter.add_forward(noise<float>(9, 4, 3), 2, cache, y), "columns of the gain", "expected 3", "got 2");
  CHECK(y.isZero(0));
}

}  // namespace dylora::test
