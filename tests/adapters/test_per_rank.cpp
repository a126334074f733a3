#include "dylora/adapters/per_rank.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/linalg/product.hpp"
#include "dylora/ranks/truncate.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

namespace {

/// Δ_b(x) = B_b · tanh(A_b x): not linear, so that it cannot be merged, and the backward needs what the forward kept.
template <class S>
struct Bent : PerRank<Bent<S>, S> {
  static constexpr std::string_view name = "Bent";
  using typename PerRank<Bent<S>, S>::In;
  using typename PerRank<Bent<S>, S>::Out;
  using Options = LowRankOptions;
  using Kept = MatrixX<S>;  // tanh(A_b x)
  struct Gradients {
    Gradient<RowMatrix<S>> A;
    Gradient<MatrixX<S>> B;
  };

  RowMatrix<S> A;
  MatrixX<S> B;

  Bent(Index in, Index out, Options options, Rng& rng)
      : PerRank<Bent<S>, S>(in, out, options.max_rank),
        A(random_uniform<S, RowMatrix<S>>(options.max_rank, in, 1, rng)),
        B(MatrixX<S>::Zero(out, options.max_rank)) {}

  void add_forward_at(Index b, In x, Kept& h, Out y) const {
    h.resize(b, x.cols());
    set_product(h, A.topRows(b), x);
    h = h.array().tanh();
    add_product(y, B.leftCols(b), h);
  }

  void add_backward_at(RankSlice rank, In x, In dy, const Kept& h, Gradients& gradients, Out dx) const {
    const Index b = rank.active, t = rank.trainable_from, trained = rank.trainable();
    MatrixX<S> dh(b, dy.cols());
    set_product(dh, B.leftCols(b).transpose(), dy);
    dh.array() *= 1 - h.array().square();
    add_product(gradients.B.middleCols(t, trained), dy, h.middleRows(t, trained).transpose());
    add_product(gradients.A.middleRows(t, trained), dh.middleRows(t, trained), x.transpose());
    add_product(dx, A.topRows(b).transpose(), dh);
  }

  static void members(const auto& f, auto&... t) {
    f(Parameter{"A", RankAxis::rows}, t.A...);
    f(Parameter{"B", RankAxis::cols}, t.B...);
  }
};

/// Δ_b(x) = diag(g) · B_b · A_b · x: a backward that has all it needs in x, and a parameter g without a rank axis.
template <class S>
struct Gained : PerRank<Gained<S>, S> {
  using typename PerRank<Gained<S>, S>::In;
  using typename PerRank<Gained<S>, S>::Out;
  using Options = LowRankOptions;
  struct Gradients {
    Gradient<RowMatrix<S>> A;
    Gradient<MatrixX<S>> B;
    Gradient<VectorX<S>> gain;
  };

  RowMatrix<S> A;
  MatrixX<S> B;
  VectorX<S> gain;

  Gained(Index in, Index out, Options options, Rng& rng)
      : PerRank<Gained<S>, S>(in, out, options.max_rank),
        A(random_uniform<S, RowMatrix<S>>(options.max_rank, in, 1, rng)),
        B(MatrixX<S>::Zero(out, options.max_rank)),
        gain(VectorX<S>::Ones(out)) {}

  void add_forward_at(Index b, In x, Out y) const { y += gain.asDiagonal() * without_gain(b, x); }

  void add_backward_at(RankSlice rank, In x, In dy, Gradients& gradients, Out dx) const {
    const Index b = rank.active, t = rank.trainable_from, trained = rank.trainable();
    const MatrixX<S> dz = gain.asDiagonal() * dy, h = product(A.topRows(b), x), dh = product(B.leftCols(b).transpose(), dz);
    gradients.gain += dy.cwiseProduct(without_gain(b, x)).rowwise().sum();
    add_product(gradients.B.middleCols(t, trained), dz, h.middleRows(t, trained).transpose());
    add_product(gradients.A.middleRows(t, trained), dh.middleRows(t, trained), x.transpose());
    add_product(dx, A.topRows(b).transpose(), dh);
  }

  MatrixX<S> delta(RankSlice rank) const {
    require_ranks(rank, this->in_features(), this->max_rank(), "Gained::delta");
    return gain.asDiagonal() * without_gain(std::min(rank.active, this->components()), MatrixX<S>::Identity(A.cols(), A.cols()));
  }

  static void members(const auto& f, auto&... t) {
    f(Parameter{"A", RankAxis::rows}, t.A...);
    f(Parameter{"B", RankAxis::cols}, t.B...);
    f(Parameter{"gain"}, t.gain...);
  }

 private:
  template <class L, class R>
  static MatrixX<S> product(const L& left, const R& right) {
    MatrixX<S> result(left.rows(), right.cols());
    set_product(result, left, right);
    return result;
  }
  MatrixX<S> without_gain(Index b, In x) const { return product(B.leftCols(b), product(A.topRows(b), x)); }
};

}  // namespace

template <class S>
LowRankOptions options_of(As<Bent<S>>, Index /*out*/, Index max_rank) {
  return {.max_rank = max_rank};
}
template <class S>
LowRankOptions options_of(As<Gained<S>>, Index /*out*/, Index max_rank) {
  return {.max_rank = max_rank};
}

using AdaptersUnderTest = InFloatAndDouble<Bent, Gained>;

}  // namespace dylora::test

#include "laws/adapter_laws.hpp"

namespace dylora::test {

namespace {

template <class A>
A trained() {
  A adapter = make_adapter<A>(9, 7, law_rank, 10);
  randomize<A>(adapter, 3);
  return adapter;
}

/// Its forward throws when it is asked to.
struct Failing : PerRank<Failing, double> {
  struct Gradients {};
  bool fails = false;

  void add_forward_at(Index, In, Out) const {
    if (fails) throw std::runtime_error("failed");
  }
  void add_backward_at(RankSlice, In, In, Gradients&, Out) const {}
  static void members(const auto& /*f*/, auto&... /*t*/) {}
};

}  // namespace

TEST_CASE("an adapter written per rank is merged only if it says how") {
  STATIC_REQUIRE(!MergeableAdapter<Bent<double>>);
  STATIC_REQUIRE(MergeableAdapter<Gained<double>>);
  STATIC_REQUIRE(!FactoredAdapter<Gained<double>>);
}

TEST_CASE("what a backward per rank trained is noted for it where a parameter has a rank axis") {
  const auto adapter = trained<Gained<double>>();
  const auto result =
      run(adapter, noise<double>(9, 5, 1), noise<double>(7, 5, 2), BatchRanks::per_sample({{3, 2}, {3, 2}, RankSlice::none(), 1, {5, 5}}));
  CHECK(trained_components<Gained<double>>(result.gradients) == std::vector<std::string>{"10100", "10100", ""});
}

TEST_CASE("an adapter per rank keeps something for each run that has a component, and its memory from call to call") {
  const auto adapter = trained<Bent<double>>();
  const MatrixX<double> x = noise<double>(9, 5, 1);
  MatrixX<double> y = MatrixX<double>::Zero(7, 5);
  Bent<double>::Cache cache;
  adapter.add_forward(x, BatchRanks::per_sample({2, 2, RankSlice::none(), 3, 1}), cache, y);
  REQUIRE(cache.kept.size() == 3);
  CHECK(cache.kept[0].rows() == 2);
  CHECK(cache.kept[0].cols() == 2);
  CHECK(cache.kept[1].rows() == 3);
  CHECK(cache.kept[2].rows() == 1);
  const double* memory = cache.kept[0].data();
  adapter.add_forward(x, BatchRanks::per_sample({2, 2, 1, 1, 1}), cache, y);
  CHECK(cache.kept[0].data() == memory);
}

TEST_CASE("an adapter per rank counts the components that all of its parameters have") {
  auto adapter = trained<Bent<double>>();
  CHECK(adapter.components() == law_rank);
  truncate(adapter, 2);
  CHECK(adapter.components() == 2);
  CHECK(adapter.max_rank() == law_rank);
  CHECK(Failing{{9, 7, 4}}.components() == 4);
}

TEST_CASE("the cache of a forward per rank that threw counts as not filled") {
  Failing adapter{{9, 7, 4}};
  const MatrixX<double> x = noise<double>(9, 5, 1), dy = noise<double>(7, 5, 2);
  MatrixX<double> y = MatrixX<double>::Zero(7, 5), dx = MatrixX<double>::Zero(9, 5);
  Failing::Cache cache;
  Failing::Gradients gradients;
  adapter.add_forward(x, 3, cache, y);
  adapter.add_backward(x, dy, cache, gradients, dx);
  adapter.fails = true;
  CHECK_THROWS_AS(adapter.add_forward(x, 3, cache, y), std::runtime_error);
  CHECK_THROWS_SAYING(ShapeError, adapter.add_backward(x, dy, cache, gradients, dx), "was it filled", "expected 0", "got 5");
}

TEST_CASE("an adapter per rank refuses shapes that no adapter has, under its name or as an adapter") {
  CHECK_THROWS_SAYING(std::invalid_argument, Failing({{0, 7, 4}}), "adapter: in_features", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, Failing({{9, -1, 4}}), "adapter: out_features", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, Failing({{9, 7, -1}}), "adapter: max_rank", "got -1");
  const auto bent = trained<Bent<double>>();
  Bent<double>::Cache cache;
  MatrixX<double> y = MatrixX<double>::Zero(7, 5);
  CHECK_THROWS_SAYING(ShapeError, bent.add_forward(noise<double>(8, 5, 1), 3, cache, y), "Bent::add_forward: rows of x");
}

TEST_CASE("an adapter per rank trains in a layer and stands in for any other") {
  Linear<double, Bent<double>> layer(noise<double>(7, 9, 1), trained<Bent<double>>());
  Rng rng(4);
  const GradientReport report = check_gradients(layer, noise<double>(9, 5, 2), rng);
  INFO(report.where);
  CHECK(report.error < 1e-6);
}

}  // namespace dylora::test
