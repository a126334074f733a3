#include "dylora/methods/dora/dora_linear.hpp"
#include "dylora/methods/dora/options.hpp"

#include "dylora/methods/multilora.hpp"
#include "dylora/methods/nola/nola.hpp"
#include "dylora/methods/pissa/offset_low_rank.hpp"
#include "dylora/methods/prilora/proportional.hpp"
#include "dylora/testing/gradient_check.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/parameter_groups.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/threads.hpp"
#include "support/throws.hpp"

namespace dylora::test {

template <class S>
using Shared = DoraLinear<S>;
template <class S>
using Nested = DoraLinear<S, LowRank<S>, WeightView<S, RowMatrix<S>>, Magnitude::nested>;

/// The default of DoraLinear: norms without a gradient.
template <class S>
struct Detached : DoraLinear<S> {
  explicit Detached(DoraLinear<S> layer) : DoraLinear<S>(std::move(layer)) { this->norm_gradient = NormGradient::detached; }
};

template <class S, class W, Magnitude kind>
struct MakeLayer<DoraLinear<S, LowRank<S>, W, kind>> {
  using L = DoraLinear<S, LowRank<S>, W, kind>;
  static constexpr int variants = 2;
  static constexpr Index samples = 4;
  static L make(Index in, Index out, bool bias, Index max_rank, std::uint64_t seed) {
    return {MakeWeight<W>::make(out, in, bias, seed),
            make_adapter<LowRank<S>>(in, out, max_rank, seed + 2),
            {.dropout = bias ? 0.25 : 0, .norm_gradient = NormGradient::exact}};
  }
  static L make(int variant, Index max_rank) { return make(7, 6, variant == 1, max_rank, 10); }
};
template <class S>
struct MakeLayer<Detached<S>> : MakeLayer<DoraLinear<S>> {
  static Detached<S> make(int variant, Index max_rank) { return Detached<S>(MakeLayer<DoraLinear<S>>::make(variant, max_rank)); }
};

template <class S, class A, class W, Magnitude kind>
struct MergedType<DoraLinear<S, A, W, kind>> {
  using Type = FrozenLinear<S>;
};
template <class S>
struct MergedType<Detached<S>> {
  using Type = FrozenLinear<S>;
};

template <class S, class A, class W, Magnitude kind>
VectorX<S> frozen_values(const DoraLinear<S, A, W, kind>& layer) {
  return joined<S>({layer.base.dense().reshaped(), layer.base.dense_bias()});
}

/// A detached layer whose forward divides by the norms that it had when this was made: what its backward is the derivative of.
struct HeldNorms : Detached<double> {
  VectorX<double> norms;

  HeldNorms(const Detached<double>& layer, RankSlice rank) : Detached<double>(layer), norms(layer.row_norms(rank)) {}

  MatrixX<double> forward(const MatrixX<double>& x, RankSlice rank, Cache& cache) const {
    (void)Detached<double>::forward(x, rank, cache);
    const MatrixX<double> seen = cache.dropped ? MatrixX<double>(cache.mask.x()) : x;
    const MatrixX<double> corrected = magnitude.cwiseQuotient(norms).asDiagonal() * (base.W + adapter.delta(rank));
    MatrixX<double> y(out_features(), x.cols());
    base.apply(x, y);
    return y + (corrected - base.W) * seen;
  }
};

GradientReport check_gradients(const Detached<double>& layer, const MatrixX<double>& x, RankSlice rank, Rng& rng,
                               const Detached<double>::Cache& prototype) {
  return detail::check_layer_gradients(HeldNorms(layer, rank), x, rank, rng, prototype, false);
}

using LayersUnderTest = InFloatAndDouble<Shared, Nested, Detached>;

}  // namespace dylora::test

#include "laws/layer_laws.hpp"

namespace dylora::test {

/// A layer of size out × in with nothing left at its initial value but W.
template <class L>
L trained_layer(Index in, Index out, Index max_rank, std::uint64_t seed = 1) {
  L layer = MakeLayer<L>::make(in, out, true, max_rank, seed);
  randomize<L>(layer, seed + 1);
  return layer;
}

/// W + Δ_b in double.
template <class L>
MatrixX<double> corrected(const L& layer, Index b) {
  const MatrixX<double> A = layer.adapter.A.template cast<double>(), B = in_double(layer.adapter.B);
  return in_double(layer.base.dense()) + law_alpha / static_cast<double>(b) * B.leftCols(b) * A.topRows(b);
}

TEMPLATE_TEST_CASE("oracle of DoRA: a fresh layer is its base at every rank", "", float, double) {
  using S = TestType;
  const DenseWeight<S> base(noise<S>(37, 29, 1), noise<S>(37, 1, 2));
  const MatrixX<S> x = noise<S>(29, 5, 3);
  MatrixX<S> y(37, 5);
  base.apply(x, y);
  for (const ScaleRule scale : {alpha_over_rank, alpha_over_sqrt_rank, alpha_over_max_rank}) {
    Rng rng(4);
    const DoraLinear<S> shared(base, {.adapter = {.max_rank = 13, .alpha = 7, .scale = scale}}, rng);
    const DoraLinear<S, LowRank<S>, DenseWeight<S>, Magnitude::nested> nested(
        base, {.adapter = {.max_rank = 13, .alpha = 7, .scale = scale}}, rng);
    for (Index b = 1; b <= 13; ++b) {
      CHECK(same_bits(shared.forward(x, b), y));
      CHECK(same_bits(nested.forward(x, b), y));
      CHECK(same_bits(shared.merged(b).W, base.W));
    }
  }
}

TEMPLATE_TEST_CASE("oracle of DoRA: the rows of the merged weight are as long as the magnitude says", "", float, double) {
  using S = TestType;
  const auto shared = trained_layer<Shared<S>>(11, 9, 5);
  const auto nested = trained_layer<Nested<S>>(11, 9, 5);
  for (Index b = 1; b <= 5; ++b) {
    const auto lengths = [&](const auto& layer) -> MatrixX<double> { return in_double(layer.merged(b).W).rowwise().norm(); };
    const MatrixX<double> m = in_double<S>(shared.magnitude).cwiseAbs(), sum = in_double(nested.magnitude).leftCols(b).rowwise().sum();
    CHECK(gap(lengths(shared), m) < rounding<S>);
    CHECK(gap(lengths(nested), sum.cwiseAbs()) < rounding<S>);
  }
}

TEMPLATE_TEST_CASE("oracle of DoRA: detached and exact gradients differ in A and B alone, and the exact one is orthogonal to the rows", "",
                   float, double) {
  using S = TestType;
  auto layer = trained_layer<Shared<S>>(11, 9, 5);
  const MatrixX<S> x = noise<S>(11, 6, 3), dy = noise<S>(9, 6, 4);
  for (const Index b : {1, 3, 5}) {
    layer.norm_gradient = NormGradient::exact;
    const auto exact = run(layer, x, dy, b, {});
    layer.norm_gradient = NormGradient::detached;
    const auto detached = run(layer, x, dy, b, {});
    CHECK(same_bits(exact.y, detached.y));
    CHECK(same_bits(exact.dx, detached.dx));
    CHECK(same_bits(exact.gradients.magnitude, detached.gradients.magnitude));
    CHECK_FALSE(same_bits(exact.gradients.adapter.B, detached.gradients.adapter.B));

    // The gradient of the matrix W + Δ_b, dense, with and without what goes through the norms.
    const MatrixX<double> V = corrected(layer, b), A = layer.adapter.A.topRows(b).template cast<double>(),
                          B = in_double(layer.adapter.B).leftCols(b);
    const VectorX<double> n = V.rowwise().norm(), u = in_double<S>(layer.magnitude).cwiseQuotient(n);
    const double s = law_alpha / static_cast<double>(b);
    MatrixX<double> D = u.asDiagonal() * in_double(dy) * in_double(x).transpose();
    const auto check = [&](const auto& result) {
      CHECK(gap(result.gradients.adapter.A.topRows(b).template cast<double>(), s * B.transpose() * D) < rounding<S>);
      CHECK(gap(in_double(result.gradients.adapter.B.leftCols(b).eval()), s * D * A.transpose()) < rounding<S>);
    };
    check(detached);
    const VectorX<double> along = D.cwiseProduct(V).rowwise().sum().cwiseQuotient(n.cwiseAbs2());
    D -= along.asDiagonal() * V;
    check(exact);
    CHECK(D.cwiseProduct(V).rowwise().sum().cwiseAbs().maxCoeff() < 1e-12);
  }
}

TEMPLATE_TEST_CASE("oracle of DoRA: a correction along a row's own direction changes nothing", "", float, double) {
  using S = TestType;
  DoraLinear<S> layer = MakeLayer<DoraLinear<S>>::make(11, 9, true, 3, 1);
  const MatrixX<S> x = noise<S>(11, 4, 2), y = layer.forward(x, RankSlice::none());
  const Index i = 4;
  layer.adapter.A.row(0) = layer.base.W.row(i);
  for (const double t : {-0.3, 0.5, 20.0}) {
    layer.adapter.B.row(i).setZero();
    layer.adapter.B(i, 0) = static_cast<S>(t);
    for (Index b = 1; b <= 3; ++b) {
      REQUIRE(1 + law_alpha / static_cast<double>(b) * t > 0);
      CHECK(gap(in_double(layer.forward(x, b)), in_double(y)) < rounding<S>);
    }
  }
}

TEMPLATE_TEST_CASE("oracle of DoRA: the factored norms are the direct ones at every rank", "", float, double) {
  using S = TestType;
  for (const auto& [in, out] : {std::pair<Index, Index>{7, 5}, {40, 130}, {300, 17}}) {
    const Index max_rank = std::min<Index>(std::min(in, out), 16);
    const auto layer = trained_layer<Shared<S>>(in, out, max_rank);
    for (Index b = 1; b <= max_rank; ++b) {
      CHECK(gap(in_double<S>(layer.row_norms(b)), corrected(layer, b).rowwise().norm()) < rounding<S>);
    }
    CHECK(gap(in_double<S>(layer.row_norms(RankSlice::none())), in_double(layer.base.W).rowwise().norm()) < rounding<S>);
  }
}

/// A weight that can be copied but not read in place.
template <class S>
class Closed {
 public:
  using Scalar = S;
  explicit Closed(DenseWeight<S> weight) : weight_(std::move(weight)) {}
  Index rows() const { return weight_.rows(); }
  Index cols() const { return weight_.cols(); }
  void apply(ConstMatrixRef<S> x, MatrixRef<S> y) const { weight_.apply(x, y); }
  void add_apply_transposed(ConstMatrixRef<S> dy, MatrixRef<S> dx) const { weight_.add_apply_transposed(dy, dx); }
  MatrixX<S> dense() const { return weight_.dense(); }
  VectorX<S> dense_bias() const { return weight_.dense_bias(); }

 private:
  DenseWeight<S> weight_;
};

TEMPLATE_TEST_CASE("the norms know no bias, and one far larger than the weights takes no digit from them", "", float, double) {
  using S = TestType;
  const auto layer = trained_layer<Shared<S>>(11, 9, 5);
  const RowMatrix<S> rows = layer.base.W;
  const VectorX<S> bias = layer.base.bias, large = 1e6 * noise<S>(9, 1, 7);
  const DoraLinear<S> owned({layer.base.W, large}, layer.adapter);
  using View = WeightView<S, RowMatrix<S>>;
  const DoraLinear<S, LowRank<S>, View> viewed(View(rows, large), layer.adapter);
  const DoraLinear<S, LowRank<S>, Closed<S>> closed(Closed<S>(layer.base), layer.adapter);
  for (Index b = 1; b <= 5; ++b) {
    const VectorX<S> norms = layer.row_norms(b);
    CHECK(same_bits(owned.row_norms(b), norms));
    CHECK(gap(in_double<S>(viewed.row_norms(b)), in_double<S>(norms)) < rounding<S>);
    CHECK(gap(in_double<S>(closed.row_norms(b)), in_double<S>(norms)) < rounding<S>);
  }
}

TEMPLATE_TEST_CASE("oracle of DoRA: what was merged can be taken out again", "", float, double) {
  using S = TestType;
  const auto layer = trained_layer<Shared<S>>(11, 9, 5);
  const MatrixX<S> W = layer.base.W;
  for (Index b = 1; b <= 5; ++b) {
    const DenseWeight<S> merged = layer.merged(b);
    CHECK(same_bits(layer.base.W, W));
    CHECK(same_bits(merged.bias, layer.base.bias));
    const MatrixX<S> back = layer.row_norms(b).cwiseQuotient(layer.magnitude).asDiagonal() * merged.W - layer.adapter.delta(b);
    CHECK(gap(in_double(back), in_double(W)) < 8 * rounding<S>);
  }
}

TEMPLATE_TEST_CASE("a row that the correction all but cancels has the norm of what is left", "", float, double) {
  using S = TestType;
  for (const double left : {1e-2, 1e-3}) {
    auto layer = trained_layer<Nested<S>>(64, 9, 4);
    const MatrixX<S> W = layer.base.dense();
    layer.adapter.A.row(0) = W.row(3) + static_cast<S>(left) * noise<S>(1, 64, 5);
    layer.adapter.B.row(3).setZero();
    layer.adapter.B(3, 0) = static_cast<S>(-1 / law_alpha);
    layer.adapter.B(3, 2) = 1;  // at rank 3 the row is whole again
    for (const Index b : {1, 2, 3, 4}) {
      const MatrixX<double> expected = corrected(layer, b).rowwise().norm();
      CHECK((expected(3) < 10 * left) == (b == 1));
      const double error = std::abs(static_cast<double>(layer.row_norms(b)(3)) / expected(3) - 1);
      CHECK(error < static_cast<double>(std::numeric_limits<S>::epsilon()) * 8 / std::min(1.0, expected(3)));
    }
  }
}

TEMPLATE_TEST_CASE("a row of norm 0 gives its bias and no gradient that is not a number", "", float, double) {
  using S = TestType;
  for (const NormGradient norm_gradient : {NormGradient::detached, NormGradient::exact}) {
    MatrixX<S> W = noise<S>(4, 6, 1);
    W.row(1).setZero();  // as long as B's row is 0
    W.row(2).setOnes();  // cancelled at rank 1
    const VectorX<S> bias = noise<S>(4, 1, 2);
    DoraLinear<S> layer({W, bias}, LowRank<S>(noise<S>(2, 6, 3), noise<S>(4, 2, 4), {.alpha = 1}), {.norm_gradient = norm_gradient});
    layer.adapter.A.row(0).setOnes();
    layer.adapter.B.row(1).setZero();
    layer.adapter.B(2, 0) = -1;
    layer.magnitude.setOnes();
    const auto result = run<DoraLinear<S>>(layer, noise<S>(6, 3, 5), noise<S>(4, 3, 6), 1, {});
    for (const Index i : {1, 2}) {
      CHECK(layer.row_norms(1)(i) == 0);
      CHECK((result.y.row(i).array() - bias(i)).abs().maxCoeff() < static_cast<S>(rounding<S>));
      CHECK(result.gradients.magnitude(i) == 0);
      CHECK(result.gradients.adapter.B.row(i).isZero(0));
    }
    CHECK(result.dx.allFinite());
    CHECK(result.gradients.magnitude.allFinite());
    CHECK(result.gradients.magnitude(0) != 0);
    CHECK(result.gradients.adapter.A.allFinite());
    CHECK(layer.merged(1).W.row(2).isZero(0));
  }
}

TEMPLATE_TEST_CASE("a nan among the factors is not taken for a row of norm 0", "", float, double) {
  using S = TestType;
  auto layer = trained_layer<Shared<S>>(7, 5, 3);
  layer.adapter.B(2, 0) = nan<S>;
  CHECK(layer.forward(noise<S>(7, 2, 1), 2).row(2).array().isNaN().all());
}

TEMPLATE_TEST_CASE("weight decay on the magnitude shrinks the rows, and a step that leaves it out does not", "", float, double) {
  using S = TestType;
  using L = DoraLinear<S>;
  L layer = MakeLayer<L>::make(7, 5, true, 3, 1);
  const VectorX<S> before = layer.magnitude;
  AdamW decaying(layer, {.lr = 0.1, .weight_decay = 0.5});
  decaying.step(layer, zeros_like(layer));
  CHECK(gap(in_double<S>(layer.magnitude), 0.95 * in_double<S>(before)) < rounding<S>);
  const VectorX<S> decayed = layer.magnitude;
  AdamW sparing(layer, {.lr = 0.1, .weight_decay = 0.5, .groups = without_decay({"lora_magnitude_vector"})});
  sparing.step(layer, zeros_like(layer));
  CHECK(same_bits(layer.magnitude, decayed));
  CHECK(names(layer) == std::vector<std::string>{"lora_A", "lora_B", "lora_magnitude_vector"});
}

TEMPLATE_TEST_CASE("without a gradient of the norms a layer's adapter learns what a linear one does from the scaled gradient", "", float,
                   double) {
  using S = TestType;
  const Detached<S> layer(trained_layer<DoraLinear<S>>(11, 9, 5));
  const Linear<S> linear(layer.base, layer.adapter);
  const MatrixX<S> x = noise<S>(11, 6, 3), dy = noise<S>(9, 6, 4);
  for (const RankSlice rank : law_slices()) {
    const VectorX<S> u = layer.magnitude.cwiseQuotient(layer.row_norms(rank));
    const auto scaled = run<Linear<S>>(linear, x, u.asDiagonal() * dy, rank);
    const auto result = run<Detached<S>>(layer, x, dy, rank, {});
    CHECK(same_bits(result.dx, scaled.dx));
    CHECK(same_bits(result.gradients.adapter.A, scaled.gradients.adapter.A));
    CHECK(same_bits(result.gradients.adapter.B, scaled.gradients.adapter.B));
  }
}

TEMPLATE_TEST_CASE("dropped inputs leave the output as it is on average", "", float, double) {
  using S = TestType;
  const auto layer = trained_layer<Shared<S>>(11, 9, 5);
  const MatrixX<S> x = noise<S>(11, 2, 3), y = layer.forward(x, 3);
  MatrixX<double> sum = MatrixX<double>::Zero(9, 2);
  typename Shared<S>::Cache cache;
  cache.rng = Rng(5);
  constexpr int draws = 4000;
  for (int i = 0; i < draws; ++i) sum += in_double(layer.forward(x, 3, cache));
  CHECK(gap(in_double(layer.forward(x, 3, cache)), in_double(y)) > 0.05);
  CHECK(gap(sum / draws, in_double(y)) < 0.02);
}

TEMPLATE_TEST_CASE("a magnitude that each rank adds to is the sum of what the ranks have added", "", float, double) {
  using S = TestType;
  const auto nested = trained_layer<Nested<S>>(11, 9, 5);
  const MatrixX<S> x = noise<S>(11, 3, 2);
  for (Index b = 1; b <= 5; ++b) {
    const DoraLinear<S, LowRank<S>, WeightView<S, RowMatrix<S>>> shared(nested.base, nested.adapter, {},
                                                                        nested.magnitude.leftCols(b).rowwise().sum());
    CHECK(gap(in_double(nested.forward(x, b)), in_double(shared.forward(x, b))) < rounding<S>);
  }
}

// Past the threshold for threads, with edges in every direction.
TEMPLATE_TEST_CASE("the bits of a decomposed layer do not depend on the number of threads", "", float, double) {
  using S = TestType;
  const Detached<S> layer(trained_layer<DoraLinear<S>>(130, 301, 13));
  const MatrixX<S> x = noise<S>(130, 500, 3), dy = noise<S>(301, 500, 4);
  std::vector<RankSlice> each(500, 13);
  std::fill(each.begin() + 450, each.end(), RankSlice::none());
  const auto call = [&] { return run<Detached<S>>(layer, x, dy, BatchRanks::per_sample(each)); };
  const auto expected = call();
  for_each_threading(call, [&](const auto& result, const std::string& where) {
    INFO(where);
    CHECK(result == expected);
  });
}

TEST_CASE("decomposed projections work inside an attention") {
  using D = Shared<double>;
  using A = Attention<double, D, D, D, D>;
  A attention = MakeLayer<A>::make(0, law_rank);
  randomize<A>(attention, 3);
  Rng rng(4);
  const GradientReport report = check_gradients(attention, noise<double>(7, 6, 1), 3, rng, fresh_cache<A>());
  INFO(report.where);
  CHECK(report.error < 1e-6);
  CHECK(names(attention).at(2) == "q_proj.lora_magnitude_vector");
  Index layers = 0;
  for_each_layer(attention, [&](std::string_view name, const auto& layer) {
    if (layers++ == 0) CHECK(name == "q_proj");
    CHECK(layer.adapter.max_rank() == law_rank);
  });
  CHECK(layers == 4);
}

TEST_CASE("what does not fit a decomposed layer is refused by name") {
  using L = DoraLinear<float>;
  using N = DoraLinear<float, LowRank<float>, DenseWeight<float>, Magnitude::nested>;
  const MatrixX<float> W = noise<float>(5, 7, 1);
  const auto adapter = make_adapter<LowRank<float>>(7, 5, 3, 1);
  for (const double p : {-0.1, 1.0, nan<double>}) {
    CHECK_THROWS_SAYING(std::invalid_argument, L(W, adapter, {.dropout = p}), "DoraLinear: dropout", "[0, 1)", "got");
  }
  CHECK_THROWS_SAYING(ShapeError, L(W, make_adapter<LowRank<float>>(6, 5, 3, 1)), "in_features", "expected 7", "got 6");
  CHECK_THROWS_SAYING(ShapeError, L(W, adapter, {}, VectorX<float>::Ones(6)), "DoraLinear: rows of magnitude", "expected 5", "got 6");
  CHECK_THROWS_SAYING(ShapeError, N(W, adapter, {}, MatrixX<float>::Ones(5, 2)), "DoraLinear: columns of magnitude", "expected 3", "got 2");
  L layer(W, adapter);
  CHECK_THROWS_SAYING(std::invalid_argument, layer.row_norms(4), "DoraLinear::row_norms", "max_rank = 3", "got 4");
  layer.magnitude.setOnes(4);
  CHECK_THROWS_SAYING(ShapeError, layer.forward(noise<float>(7, 2, 1), 2), "rows of magnitude", "expected 5", "got 4");
}

template <class A>
inline constexpr bool can_be_decomposed = requires { typename DoraLinear<double, A>; };

TEST_CASE("a decomposed layer takes an adapter that is a pair of factors and no other") {
  STATIC_REQUIRE(can_be_decomposed<LowRank<double>>);
  STATIC_REQUIRE_FALSE(can_be_decomposed<MultiLora<double>>);
  STATIC_REQUIRE_FALSE(can_be_decomposed<Nola<double>>);
  STATIC_REQUIRE_FALSE(can_be_decomposed<OffsetLowRank<double>>);
  STATIC_REQUIRE_FALSE(can_be_decomposed<Proportional<LowRank<double>>>);
  STATIC_REQUIRE_FALSE(can_be_decomposed<Dropout<LowRank<double>>>);
}

TEST_CASE("after a call that has thrown there is nothing to go back through") {
  for (const NormGradient norm_gradient : {NormGradient::detached, NormGradient::exact}) {
    auto layer = trained_layer<Shared<double>>(7, 6, 5);
    layer.norm_gradient = norm_gradient;
    const MatrixX<double> x = noise<double>(7, 4, 1), dy = noise<double>(6, 4, 2);
    MatrixX<double> y(6, 4), dx(7, 4);
    Shared<double>::Cache cache;
    layer.apply(x, 1, cache, y);
    const auto magnitude = layer.magnitude;
    layer.magnitude.setOnes(4);
    CHECK_THROWS_AS(layer.apply(x, 5, cache, y), ShapeError);
    layer.magnitude = magnitude;
    auto gradients = zeros_like(layer);
    Shared<double>::Workspace workspace;
    CHECK_THROWS_SAYING(ShapeError, layer.set_backward(x, dy, cache, gradients, workspace, dx), "DoraLinear::backward", "filled by apply",
                        "expected 0", "got 4");
    CHECK(values<Shared<double>>(gradients).isZero(0));
  }
}

TEST_CASE("a projection adds to dx what it would set it to") {
  auto layer = trained_layer<Shared<double>>(7, 6, 5);
  const MatrixX<double> x = noise<double>(7, 4, 1), dy = noise<double>(6, 4, 2), before = noise<double>(7, 4, 3);
  for (const bool dropping : {false, true}) {
    for (const NormGradient norm_gradient : {NormGradient::detached, NormGradient::exact}) {
      layer.norm_gradient = norm_gradient;
      Shared<double>::Cache cache;
      if (dropping) cache.rng = Rng(77);
      MatrixX<double> y(6, 4), set = all_nan<double>(7, 4), added = before;
      layer.apply(x, BatchRanks::per_sample({3, 3, RankSlice::none(), {5, 4}}), cache, y);
      auto gradients = zeros_like(layer), again = zeros_like(layer);
      Shared<double>::Workspace workspace;
      layer.set_backward(x, dy, cache, gradients, workspace, set);
      layer.add_backward(x, dy, cache, again, workspace, added);
      CHECK(gap(added - before, set) < rounding<double>);
      CHECK(same_bits(values<Shared<double>>(gradients), values<Shared<double>>(again)));
    }
  }
}

}  // namespace dylora::test
