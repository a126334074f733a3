#include "dylora/analysis/spectrum.hpp"

#include <cmath>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/ranks/order.hpp"
#include "support/catch.hpp"
#include "support/threads.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

template <class S>
LowRankFactors<S> factors(Index in, Index out, Index rank, double scale) {
  return {noise<S>(rank, in, 1), noise<S>(out, rank, 2), scale};
}

template <class S>
MatrixX<double> product_of(const LowRankFactors<S>& f) {
  return f.scale * in_double(f.B) * f.A.template cast<double>();
}

}  // namespace

TEMPLATE_TEST_CASE("the singular values of a product are found without forming it", "", float, double) {
  for (const auto& [in, out, rank] :
       {std::tuple<Index, Index, Index>{30, 20, 5}, {20, 30, 5}, {7, 40, 7}, {6, 5, 9}, {40, 3, 8}, {9, 9, 1}}) {
    for (const double scale : {1.0, 0.25, -3.0}) {
      const LowRankFactors<TestType> f = factors<TestType>(in, out, rank, scale);
      const VectorX<double> got = singular_values(f), all = singular_values(product_of(f));
      REQUIRE(got.size() == std::min({in, out, rank}));
      CHECK(gap(got, all.head(got.size())) < 1e-13);
      CHECK((all.size() == got.size() || all.tail(all.size() - got.size()).maxCoeff() < 1e-13 * all[0]));
    }
  }
  CHECK(singular_values(factors<TestType>(5, 4, 0, 1)).size() == 0);
}

TEST_CASE("singular values of factors have the same bits for any number of threads") {
  const LowRankFactors<double> f = factors<double>(3000, 2000, 200, 0.5);
  const VectorX<double> expected = singular_values(f);
  for_each_threading([&] { return singular_values(f); },
                     [&](const VectorX<double>& got, const std::string& where) {
                       INFO(where);
                       CHECK(same_bits(got, expected));
                     });
}

TEST_CASE("the effective rank is the number of equal singular values and falls as they differ") {
  for (const Index n : {1, 2, 7}) CHECK(effective_rank(VectorX<double>::Constant(n, 3)) == Approx(static_cast<double>(n)).epsilon(1e-14));
  CHECK(effective_rank(VectorX<double>{{5, 0, 0}}) == 1);
  CHECK(effective_rank(VectorX<double>{{3, 1}}) == Approx(std::exp(-0.75 * std::log(0.75) - 0.25 * std::log(0.25))).epsilon(1e-14));
  CHECK(effective_rank(VectorX<double>{{3, 1}}) == Approx(effective_rank(VectorX<double>{{3e-9, 0, 1e-9}})).epsilon(1e-14));
  double before = 4;
  for (const double smaller : {0.9, 0.5, 0.1, 1e-3}) {
    const double now = effective_rank(VectorX<double>{{1, smaller, smaller, smaller}});
    CHECK(now < before);
    CHECK(now > 1);
    before = now;
  }
  CHECK(effective_rank(VectorX<double>::Zero(3)) == 0);
  CHECK(effective_rank({}) == 0);
}

TEST_CASE("the stable rank is the ratio of the squared norms and never above the effective rank") {
  const MatrixX<double> W = noise<double>(20, 15, 1);
  const VectorX<double> sigma = singular_values(W);
  CHECK(stable_rank(sigma) == Approx(W.squaredNorm() / (sigma[0] * sigma[0])).epsilon(1e-13));
  CHECK(stable_rank(sigma) < effective_rank(sigma));
  CHECK(stable_rank(VectorX<double>::Constant(4, 1e200)) == Approx(4));
  CHECK(stable_rank(VectorX<double>{{5, 0, 0}}) == 1);
  CHECK(stable_rank(VectorX<double>::Zero(3)) == 0);
  CHECK(stable_rank({}) == 0);
}

TEST_CASE("an adapter with one dominant component has an effective rank near 1 at every rank") {
  LowRankFactors<double> f = factors<double>(30, 20, 5, 1);
  f.B.col(2) *= 1e4;
  CHECK(effective_rank(singular_values(f)) < 1.01);
  CHECK(stable_rank(singular_values(f)) < 1.01);
  f.B.col(2).setZero();
  CHECK(effective_rank(singular_values(f)) > 3);
  CHECK(effective_rank(singular_values(f)) < 4);
}

TEMPLATE_TEST_CASE("component energies are the squared norms of the components as shares", "", float, double) {
  const LowRankFactors<TestType> f = factors<TestType>(30, 20, 5, 0.5);
  const VectorX<double> energies = component_energies(f);
  double total = 0;
  VectorX<double> expected(5);
  for (Index i = 0; i < 5; ++i) {
    expected[i] = (0.5 * in_double(f.B).col(i) * f.A.template cast<double>().row(i)).squaredNorm();
    total += expected[i];
  }
  CHECK(gap(energies, expected / total) < 1e-13);
  CHECK(energies.sum() == Approx(1).epsilon(1e-14));
  LowRankFactors<TestType> scaled = f;
  scaled.scale = -8;
  CHECK(same_bits(component_energies(scaled), energies));
}

TEST_CASE("ordered components carry the squared singular values") {
  LowRank<double> adapter(noise<double>(5, 30, 1), noise<double>(20, 5, 2), {.alpha = 3});
  order_components(adapter);
  const VectorX<double> sigma = singular_values(adapter.factors(5)), energies = component_energies(adapter.factors(5));
  CHECK(gap(energies, sigma.cwiseAbs2() / sigma.squaredNorm()) < 1e-12);
}

TEST_CASE("components that cancel each carry half, and those that are nothing carry nothing") {
  LowRankFactors<double> f = factors<double>(6, 4, 2, 1);
  f.A.row(1) = f.A.row(0);
  f.B.col(1) = -f.B.col(0);
  CHECK(component_energies(f).isApprox(VectorX<double>::Constant(2, 0.5)));
  f.B.setZero();
  CHECK(component_energies(f).isZero(0));
  CHECK(effective_rank(singular_values(f)) == 0);
  CHECK(component_energies(factors<double>(6, 4, 0, 1)).size() == 0);
}

TEST_CASE("a spectrum refuses what is no number or does not fit") {
  LowRankFactors<double> f = factors<double>(6, 4, 2, 1);
  f.scale = nan<double>;
  CHECK_THROWS_SAYING(NonFiniteError, singular_values(f), "singular_values: factors", "scale");
  f.scale = 1;
  f.A(1, 5) = std::numeric_limits<double>::infinity();
  CHECK_THROWS_SAYING(NonFiniteError, component_energies(f), "component_energies: factors", "finite");
  f.A.resize(3, 6);
  CHECK_THROWS_SAYING(ShapeError, singular_values(f), "singular_values: factors", "expected 3", "got 2");
  CHECK_THROWS_SAYING(ShapeError, component_energies(f), "component_energies: factors", "expected 3", "got 2");
  CHECK_THROWS_SAYING(NonFiniteError, singular_values(all_nan<float>(3, 2)), "singular_values: W");
  CHECK_THROWS_SAYING(ShapeError, singular_values(MatrixX<float>()), "singular_values: W", "0 × 0");
  CHECK_THROWS_SAYING(std::invalid_argument, effective_rank(VectorX<double>{{1, -2}}), "effective_rank", "≥ 0", "-2");
  CHECK_THROWS_SAYING(NonFiniteError, stable_rank(VectorX<double>{{1, nan<double>}}), "stable_rank", "nan");
}

}  // namespace dylora::test
