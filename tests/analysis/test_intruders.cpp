#include "dylora/analysis/intruders.hpp"
#include "dylora/linalg/svd.hpp"

#include <cmath>

#include "dylora/layers/attention/attention.hpp"
#include "dylora/layers/linear.hpp"
#include "support/catch.hpp"
#include "support/threads.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

using Exact = MatrixX<double>;

/// Close to normally distributed, the same on every platform.
VectorX<double> random_direction(Index size, Rng& rng) {
  VectorX<double> v = VectorX<double>::Zero(size);
  for (int i = 0; i < 12; ++i) v += random_uniform<double>(size, 1, 1, rng);
  return v.normalized();
}

Exact orthogonal(Index rows, Index cols, std::uint64_t seed) { return detail::orthonormal_columns(noise<double>(rows, cols, seed)); }

VectorX<double> distinct(Index count) { return VectorX<double>::LinSpaced(count, 2, 1); }

/// A weight with these singular values and random vectors.
Svd with_values(Index rows, Index cols, const VectorX<double>& values, std::uint64_t seed = 1) {
  return {orthogonal(rows, values.size(), seed), values, orthogonal(cols, values.size(), seed + 1)};
}

Exact product_of(const Svd& svd) { return svd.U * svd.singular_values.asDiagonal() * svd.V.transpose(); }

/// `weight` and a direction that resembles each of its left vectors equally little.
Exact with_intruder(const Svd& weight, double size) {
  return product_of(weight) + size * weight.U.rowwise().sum().normalized() * weight.V.rowwise().sum().normalized().transpose();
}

std::vector<double> cosines(const Intruders& intruders) {
  std::vector<double> result;
  for (const TunedDirection& direction : intruders.directions) result.push_back(direction.cosine);
  return result;
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  REQUIRE(a.size() == b.size());
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

/// A layer that learned something: its leading components are the loudest.
template <class S>
Linear<S> tuned_layer(Index in, Index out, Index max_rank, ScaleRule scale = alpha_over_rank) {
  LowRank<S> adapter(noise<S>(max_rank, in, 3), noise<S>(out, max_rank, 4), {.alpha = 1, .scale = scale});
  for (Index i = 0; i < max_rank; ++i) adapter.B.col(i) *= static_cast<S>(std::pow(0.7, static_cast<double>(i)));
  return {MatrixX<S>(noise<S>(out, in, 5)), std::move(adapter)};
}

}  // namespace

TEST_CASE("oracle of intruder dimensions: a weight that is unchanged or rescaled has none") {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{64, 64}, {96, 70}, {70, 96}}) {
    const Exact W = product_of(with_values(rows, cols, distinct(std::min(rows, cols))));
    const BaseSpectrum base(W);
    for (const double c : {1.0, 0.01, 300.0}) {
      const Intruders found = base.intruders(c * W);
      CHECK(found.count == 0);
      REQUIRE(found.directions.size() == 10);
      for (std::size_t j = 0; j < 10; ++j) {
        CHECK(found.directions[j].nearest == static_cast<Index>(j));
        CHECK(found.directions[j].cosine > 1 - 1e-9);
        CHECK(found.directions[j].singular_value == Approx(c * base.singular_values()[static_cast<Index>(j)]));
      }
    }
  }
}

TEST_CASE("oracle of intruder dimensions: one planted direction is found and it alone") {
  for (const Index d : {24, 64, 96, 200}) {
    const Svd weight = with_values(d, d, distinct(d));
    const Intruders found = BaseSpectrum(product_of(weight)).intruders(with_intruder(weight, 50));
    CHECK(found.count == 1);
    REQUIRE(found.directions.size() == 10);
    CHECK(found.directions[0].cosine < 0.5);
    CHECK(found.directions[0].cosine == Approx(1 / std::sqrt(static_cast<double>(d))).epsilon(0.1));
    for (std::size_t j = 1; j < 10; ++j) CHECK(found.directions[j].cosine > 0.5);
  }
}

TEST_CASE("oracle of intruder dimensions: signs and rotations of both weights change nothing") {
  const Svd weight = with_values(80, 64, distinct(64));
  const Exact W0 = product_of(weight), W1 = with_intruder(weight, 3) + 0.03 * noise<double>(80, 64, 9);
  const Intruders expected = BaseSpectrum(W0).intruders(W1);
  REQUIRE(expected.count > 0);
  REQUIRE(expected.count < 10);
  const Exact left = orthogonal(80, 80, 20), right = orthogonal(64, 64, 21);
  const auto check = [&](const Exact& a, const Exact& b) {
    const Intruders got = BaseSpectrum(a).intruders(b);
    CHECK(got.count == expected.count);
    CHECK(largest_difference(cosines(got), cosines(expected)) < 1e-9);
  };
  check(left * W0, left * W1);
  check(W0 * right, W1 * right);
  check(left * W0 * right, left * W1 * right);
  check(-W0, W1);
  check(W0, -W1);
}

TEST_CASE("oracle of intruder dimensions: no direction is below a threshold of 0 and every one below a threshold above 1") {
  const Svd weight = with_values(64, 64, distinct(64));
  const BaseSpectrum base(product_of(weight));
  for (const Index top : {1, 10, 64}) {
    for (const Exact& W : {product_of(weight), with_intruder(weight, 50), noise<double>(64, 64, 3)}) {
      CHECK(base.intruders(W, {.top = top, .threshold = 0}).count == 0);
      CHECK(base.intruders(W, {.top = top, .threshold = std::nextafter(1.0, 2.0)}).count == top);
    }
  }
}

TEST_CASE("oracle of intruder dimensions: a random direction resembles one of a few vectors and none of many") {
  struct Expected {  // of the largest element of a unit vector, over 20 000 to 400 000 normally distributed ones
    Index d;
    int trials;
    double mean, below_half;
  };
  Rng rng(1);
  for (const auto& [d, trials, mean, below_half] :
       {Expected{16, 2000, 0.527, 0.408}, {32, 1000, 0.418, 0.903}, {64, 1000, 0.326, 0.999}, {256, 200, 0.191, 1}}) {
    const BaseSpectrum base(product_of(with_values(d, d, distinct(d))));
    double sum = 0, intruders = 0;
    for (int i = 0; i < trials; ++i) {
      const VectorX<double> u = random_direction(d, rng);
      const Intruders found = base.intruders_among({u, VectorX<double>::Ones(1), Exact::Identity(d, 1)}, {});
      sum += found.directions.at(0).cosine / trials;
      intruders += static_cast<double>(found.count) / trials;
    }
    INFO("d " << d << ", mean " << sum << ", below 0.5 " << intruders);
    CHECK(std::abs(sum - mean) < 0.01);
    CHECK(std::abs(intruders - below_half) < 0.04);
  }
}

TEST_CASE("oracle of intruder dimensions: equal singular values make false ones and a window makes none of them") {
  // Eight clusters of 32 equal values: a small change turns the vectors of each by any angle.
  VectorX<double> values(256);
  for (Index i = 0; i < 256; ++i) values[i] = std::pow(2.0, -static_cast<double>(i / 32));
  const Svd weight = with_values(256, 256, values);
  const Exact W0 = product_of(weight), W1 = W0 + 1e-6 * noise<double>(256, 256, 7);
  const BaseSpectrum base(W0);
  CHECK(base.intruders(W1).count >= 5);
  const Intruders in_windows = base.intruders(W1, {.window = 1e-3});
  CHECK(in_windows.count == 0);
  for (const double cosine : cosines(in_windows)) CHECK(cosine > 1 - 1e-6);

  const Intruders planted = base.intruders(with_intruder(weight, 50), {.window = 1e-3});
  CHECK(planted.count == 1);  // what is new stays new: its projection onto a cluster is √(32 / 256)
  CHECK(planted.directions[0].cosine < 0.5);
}

TEST_CASE("a window too small to hold two values compares one by one") {
  const Svd weight = with_values(64, 64, distinct(64));
  const BaseSpectrum base(product_of(weight));
  const Exact W = with_intruder(weight, 5) + 0.3 * noise<double>(64, 64, 9);
  const Intruders expected = base.intruders(W), got = base.intruders(W, {.window = 1e-6});
  REQUIRE(expected.count > 0);
  CHECK(got == expected);
}

TEST_CASE("a window is the largest projection onto the base vectors near one singular value") {
  const Svd weight = with_values(20, 20, distinct(20));
  const BaseSpectrum base(product_of(weight));
  const VectorX<double>& sigma = base.singular_values();
  const Exact W = noise<double>(20, 20, 9);
  for (const double window : {0.06, 0.2}) {
    const Intruders got = base.intruders(W, {.top = 5, .window = window});
    const Exact U = thin_svd(W).U;
    for (Index j = 0; j < 5; ++j) {
      double largest = 0;
      for (Index i = 0; i < 20; ++i) {
        double squared = 0;
        for (Index k = 0; k < 20; ++k) {
          if (std::abs(sigma[k] - sigma[i]) <= window * sigma[i]) squared += std::pow(base.left_vectors().col(k).dot(U.col(j)), 2);
        }
        largest = std::max(largest, std::sqrt(squared));
      }
      CHECK(got.directions[static_cast<std::size_t>(j)].cosine == Approx(largest).epsilon(1e-12));
    }
  }
}

TEST_CASE("the null space of a base is no place where windows find a new direction") {
  const Svd weight = with_values(64, 64, distinct(20));  // rank 20
  const Exact W0 = product_of(weight);
  const VectorX<double> other = noise<double>(64, 1, 8), outside = (other - weight.U * (weight.U.transpose() * other)).normalized();
  const Intruders found = BaseSpectrum(W0).intruders(W0 + 9 * outside * weight.V.col(0).transpose(), {.window = 0.01});
  CHECK(found.count == 1);
  CHECK(found.directions[0].cosine < 0.3);
}

TEST_CASE("a singular value of 0 has no direction") {
  const Exact W0 = product_of(with_values(64, 64, distinct(4)));
  const BaseSpectrum base(W0);
  CHECK(base.intruders(W0).directions.size() == 4);
  CHECK(base.intruders(W0).count == 0);
  CHECK(base.intruders(Exact::Zero(64, 64), {.threshold = 2}).directions.empty());
  CHECK(BaseSpectrum(Exact::Identity(3, 2)).intruders(Exact::Identity(3, 2)).directions.size() == 2);
}

TEST_CASE("the randomised method finds what the exact one does") {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{128, 128}, {100, 300}, {300, 100}}) {
    const Svd weight = with_values(rows, cols, distinct(100));
    const BaseSpectrum base(product_of(weight));
    for (const double size : {0.0, 3.0, 50.0}) {
      const Exact W = with_intruder(weight, size) + 0.1 * noise<double>(rows, cols, 9);
      const Intruders exact = base.intruders(W, {.method = SvdMethod::exact}),
                      random = base.intruders(W, {.method = SvdMethod::randomized});
      CHECK(exact.residual == 0);
      CHECK(random.residual > 0);
      CHECK(random.residual <= 1e-6);
      CHECK(random.count == exact.count);
      CHECK(largest_difference(cosines(random), cosines(exact)) < 1e-3);
      CHECK(base.intruders(W) == exact);  // small: automatic is exact
      CHECK(base.intruders(W, {.method = SvdMethod::randomized, .seed = 1}).count == exact.count);
    }
  }
}

TEST_CASE("a large weight is decomposed at random, and exactly where that does not converge") {
  VectorX<double> values = VectorX<double>::Constant(520, 0.2);
  values.head(30) = VectorX<double>::LinSpaced(30, 3, 1);
  const Svd weight = with_values(520, 520, values);
  const BaseSpectrum base(product_of(weight));
  const Exact W = with_intruder(weight, 5);
  CHECK(base.intruders(W) == base.intruders(W, {.method = SvdMethod::randomized}));
  CHECK(base.intruders(W).residual > 0);

  const Exact slow = product_of(with_values(520, 520, VectorX<double>::LinSpaced(520, 1.01, 1)));
  CHECK(base.intruders(slow, {.method = SvdMethod::randomized}).residual > 1e-6);
  CHECK(base.intruders(slow).residual == 0);
}

TEST_CASE("a curve is each rank by itself, with the same bits for any number of threads") {
  const Linear<float> layer = tuned_layer<float>(96, 80, 6);
  const BaseSpectrum base(layer.base.W);
  for (const SvdMethod method : {SvdMethod::exact, SvdMethod::randomized}) {
    const auto curve = [&] { return intruder_curve(base, 6, [&](Index b) { return layer.merged(b).W; }, {.method = method}); };
    const std::vector<Intruders> expected = curve();
    REQUIRE(expected.size() == 6);
    for (Index b = 1; b <= 6; ++b) {
      CHECK(expected[static_cast<std::size_t>(b - 1)] == base.intruders(layer.merged(b).W, {.method = method}));
    }
    for_each_threading(curve, [&](const std::vector<Intruders>& got, const std::string& where) {
      INFO(where);
      CHECK(got == expected);
    });
  }
  CHECK(intruder_curve(base, 0, [](Index) { return Exact(); }).empty());
}

TEST_CASE("a loud adapter brings one intruder per component") {
  const Linear<double> layer = tuned_layer<double>(96, 96, 5, alpha_over_max_rank);
  LowRank<double> loud = layer.adapter;
  loud.options.alpha = 1e3;
  const Linear<double> tuned(layer.base, loud);
  const std::vector<Intruders> curve = intruder_curve(BaseSpectrum(layer.base.W), 5, [&](Index b) { return tuned.merged(b).W; });
  for (Index b = 1; b <= 5; ++b) {
    const Intruders& found = curve[static_cast<std::size_t>(b - 1)];
    for (Index j = 0; j < b; ++j) CHECK(found.directions[static_cast<std::size_t>(j)].cosine < 0.5);
    CHECK(found.count >= b);
  }
}

TEST_CASE("a model is looked at layer by layer, each at its own ranks") {
  using Frozen = FrozenLinear<float>;
  using Model = Attention<float, Linear<float>, Frozen, Linear<float>>;
  const Model model{tuned_layer<float>(64, 72, 4),
                    Frozen(MatrixX<float>(noise<float>(72, 64, 6))),
                    tuned_layer<float>(64, 72, 2),
                    Linear<float>(tuned_layer<float>(72, 64, 3)),
                    {.heads = 4}};
  const IntruderOptions options{.top = 8};
  const std::vector<LayerIntruders> layers = layer_intruders(model, options);
  REQUIRE(layers.size() == 3);
  CHECK(layers[0].name == "q_proj");
  CHECK(layers[1].name == "v_proj");
  CHECK(layers[2].name == "o_proj");
  CHECK(layers[0].curve == intruder_curve(
                               BaseSpectrum(model.q.base.W), 4, [&](Index b) { return model.q.merged(b).W; }, options));
  CHECK(layers[1].curve.size() == 2);
  CHECK(layers[2].curve.size() == 3);
  for (Index rank = 1; rank <= 5; ++rank) {
    Index expected = 0;
    for (const LayerIntruders& layer : layers)
      expected += layer.curve.at(std::min(static_cast<std::size_t>(rank), layer.curve.size()) - 1).count;
    CHECK(total_intruders(layers, rank) == expected);
  }
  CHECK(total_intruders(layers, 1) > 0);
  CHECK(total_intruders({}, 1) == 0);
  CHECK(layer_intruders(model.q, options).at(0).name.empty());
  CHECK(layer_intruders(model.k).empty());
  CHECK_THROWS_SAYING(std::invalid_argument, total_intruders(layers, 0), "total_intruders: rank", "got 0");
}

TEST_CASE("a comparison refuses what does not fit, is no number or is out of range") {
  Exact W = noise<double>(12, 9, 1);
  const BaseSpectrum base(W);
  CHECK_THROWS_SAYING(ShapeError, BaseSpectrum(Exact(0, 4)), "BaseSpectrum: W0", "0 × 4");
  CHECK_THROWS_SAYING(NonFiniteError, BaseSpectrum(all_nan<float>(3, 3)), "BaseSpectrum: W0", "expected finite");
  CHECK_THROWS_SAYING(ShapeError, base.intruders(noise<double>(11, 9, 1)), "tuned weight: rows", "expected 12", "got 11");
  CHECK_THROWS_SAYING(ShapeError, base.intruders(noise<double>(12, 8, 1)), "tuned weight: columns", "expected 9", "got 8");
  CHECK_THROWS_SAYING(ShapeError, base.intruders_among(thin_svd(noise<double>(11, 9, 1)), {}), "rows of U", "expected 12", "got 11");
  CHECK_THROWS_SAYING(std::invalid_argument, base.intruders(W, {.top = 0}), "IntruderOptions: top", "got 0");
  CHECK_THROWS_SAYING(std::invalid_argument, base.intruders(W, {.threshold = -0.5}), "threshold", "got -0.5");
  CHECK_THROWS_SAYING(std::invalid_argument, base.intruders(W, {.threshold = nan<double>}), "threshold", "nan");
  CHECK_THROWS_SAYING(std::invalid_argument, base.intruders(W, {.window = 1}), "window", "[0, 1)", "got 1");
  CHECK_THROWS_SAYING(std::invalid_argument, base.intruders(W, {.window = -0.1}), "window", "got -0.1");
  const auto broken_at_3 = [&](Index b) { return b >= 3 ? all_nan<double>(12, 9) : W; };
  CHECK_THROWS_SAYING(NonFiniteError, intruder_curve(base, 5, broken_at_3), "intruder_curve", "rank 3", "expected finite");
  CHECK_THROWS_SAYING(std::invalid_argument, intruder_curve(base, -1, broken_at_3), "max_rank", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, intruder_curve(base, 2, broken_at_3, {.top = -1}), "top", "got -1");

  Attention<float> model{
      tuned_layer<float>(8, 8, 2), tuned_layer<float>(8, 8, 2), tuned_layer<float>(8, 8, 2), tuned_layer<float>(8, 8, 2), {.heads = 2}};
  model.v.adapter.A(1, 0) = nan<float>;
  CHECK_THROWS_SAYING(NonFiniteError, layer_intruders(model), "v_proj", "rank 2", "expected finite");
}

}  // namespace dylora::test
