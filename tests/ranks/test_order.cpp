#include "dylora/ranks/order.hpp"

#include <Eigen/SVD>

#include "dylora/adapters/dropout.hpp"
#include "dylora/layers/attention/attention.hpp"
#include "dylora/layers/linear.hpp"
#include "support/catch.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

/// A trained adapter under the constant scale, which leaves its components as they are when others are cut off.
template <class S>
LowRank<S> trained(Index in, Index out, Index max_rank) {
  Rng rng(1);
  LowRank<S> adapter(in, out, {.max_rank = max_rank, .alpha = 3, .scale = alpha_over_max_rank}, rng);
  randomize<LowRank<S>>(adapter, 2);
  return adapter;
}

}  // namespace

TEMPLATE_TEST_CASE("ordered components make the same product and their prefixes are its best approximations", "", float, double) {
  using S = TestType;
  for (const auto& [in, out, max_rank] : {std::tuple<Index, Index, Index>{9, 7, 5}, {7, 9, 5}, {5, 5, 5}, {5, 20, 1}, {3, 20, 3}}) {
    LowRank<S> adapter = trained<S>(in, out, max_rank);
    const MatrixX<double> before = in_double(adapter.delta(max_rank));
    order_components(adapter);
    CHECK(gap(in_double(adapter.delta(max_rank)), before) < rounding<S>);
    const Eigen::JacobiSVD<MatrixX<double>> svd(before);
    for (Index b = 1; b < max_rank; ++b) {
      const double best = svd.singularValues().tail(svd.singularValues().size() - b).norm();
      CHECK((in_double(adapter.delta(b)) - before).norm() == Approx(best).epsilon(1e-4));
    }
  }
}

TEMPLATE_TEST_CASE("ordered components are orthogonal and their weight falls while the rows of A keep their mean norm", "", float, double) {
  using S = TestType;
  LowRank<S> adapter = trained<S>(9, 7, 5);
  const double norm = adapter.A.template cast<double>().norm();
  order_components(adapter);
  const MatrixX<double> A = adapter.A.template cast<double>(), B = in_double(adapter.B), AA = A * A.transpose(), BB = B.transpose() * B;
  CHECK(gap(AA, MatrixX<double>(MatrixX<double>::Identity(5, 5) * norm * norm / 5)) < rounding<S>);
  CHECK(gap(BB, MatrixX<double>(BB.diagonal().asDiagonal())) < 10 * rounding<S>);
  for (Index i = 1; i < 5; ++i) CHECK(BB(i, i) < BB(i - 1, i - 1));
}

TEST_CASE("a fresh adapter stays trainable when its components are ordered") {
  Rng rng(1);
  LowRank<double> adapter(9, 7, {.max_rank = 5}, rng);
  order_components(adapter);
  CHECK(adapter.B.isZero(0));
  CHECK(adapter.A.rowwise().norm().minCoeff() > 0.1);

  LowRank<double> empty(9, 7, {.max_rank = 0}, rng);
  order_components(empty);
  CHECK(empty.A.size() == 0);
  adapter.A.setZero();
  order_components(adapter);
  CHECK(adapter.A.isZero(0));
}

TEST_CASE("ordering twice changes nothing but the signs") {
  LowRank<double> adapter = trained<double>(9, 7, 5);
  order_components(adapter);
  const LowRank<double> once = adapter;
  order_components(adapter);
  CHECK(gap(MatrixX<double>(adapter.A.cwiseAbs()), MatrixX<double>(once.A.cwiseAbs())) < 1e-12);
  for (Index b = 1; b <= 5; ++b) CHECK(gap(adapter.delta(b), once.delta(b)) < 1e-12);
}

TEST_CASE("every adapter of a model is ordered by itself and those that were cut keep their length") {
  using L = Attention<double, Linear<double>, FrozenLinear<double>, Linear<double, Dropout<LowRank<double>>>>;
  L layer = MakeLayer<L>::make(0, 5);
  randomize<L>(layer, 3);
  truncate_each(layer, {5, 2, 4});
  const MatrixX<double> x = noise<double>(7, 6, 1), before = layer.forward(x, 5), q = layer.q.adapter.delta(5);
  order_components(layer);
  CHECK(gap(layer.forward(x, 5), before) < 1e-12);
  CHECK(gap(layer.q.adapter.delta(5), q) < 1e-12);
  CHECK(layer.v.adapter.inner.components() == 2);
  CHECK(layer.o.adapter.components() == 4);
  CHECK(layer.v.adapter.inner.B.col(0).norm() > layer.v.adapter.inner.B.col(1).norm());
}

namespace {

/// An adapter whose components are not those of LowRank.
struct Gains {
  using Scalar = double;
  VectorX<double> gain = VectorX<double>::Ones(3);
  static void members(const auto& f, auto&... t) { f(Parameter{"odd.gain", RankAxis::rows}, t.gain...); }
};

}  // namespace

TEST_CASE("what cannot be ordered is refused by name and nothing is changed") {
  using L = Attention<double>;
  L layer = MakeLayer<L>::make(0, 5);
  randomize<L>(layer, 3);
  layer.o.adapter.B(2, 1) = nan<double>;
  const L before = layer;
  CHECK_THROWS_SAYING(NonFiniteError, order_components(layer), "order_components", "o_proj", "expected finite");
  CHECK(same_bits(values<L>(layer), values<L>(before)));

  L wide = MakeLayer<L>::make(0, 5);
  randomize<L>(wide, 3);
  wide.o.adapter = LowRank<double>(noise<double>(13, 12, 1), noise<double>(6, 13, 2), {});
  const L wide_before = wide;
  CHECK_THROWS_SAYING(ShapeError, order_components(wide), "order_components", "o_proj", "components", "at most 6", "got 13");
  CHECK(same_bits(values<L>(wide), values<L>(wide_before)));

  Gains gains;
  CHECK_THROWS_SAYING(std::invalid_argument, order_components(gains), "order_components", "odd", "lora_A and lora_B");
  RowMatrix<double> A = RowMatrix<double>::Ones(3, 4);
  MatrixX<double> B = MatrixX<double>::Ones(5, 2);
  CHECK_THROWS_SAYING(ShapeError, order_components(A, B), "order_components", "expected 3", "got 2");
}

}  // namespace dylora::test
