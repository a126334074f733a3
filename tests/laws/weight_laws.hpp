#ifndef DYLORA_TESTS_LAWS_WEIGHT_LAWS_HPP
#define DYLORA_TESTS_LAWS_WEIGHT_LAWS_HPP

#include <string>

#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"
#include "dylora/weights/weight.hpp"
#include "support/catch.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

/// What every frozen weight obeys. The including file says before which ones: using WeightsUnderTest = InFloatAndDouble<...>.
namespace dylora::test {

template <class W>
struct WeightCase {
  using S = typename W::Scalar;

  Index out, in;
  bool bias;
  W weight = MakeWeight<W>::make(out, in, bias, 10);
  MatrixX<S> x = noise<S>(in, 5, 1);
  MatrixX<S> dy = noise<S>(out, 5, 2);
};

/// Tall, wide, a single row, a single column; with and without bias.
template <class W, class F>
void for_each_weight_case(F&& show) {
  for (const auto& [out, in] : {std::pair<Index, Index>{7, 4}, {3, 11}, {1, 6}, {6, 1}, {70, 65}}) {
    for (const bool bias : {false, true}) {
      INFO(out << " × " << in << (bias ? " with bias" : ""));
      LawCount::add_case();
      show(WeightCase<W>{out, in, bias});
    }
  }
}

TEMPLATE_LIST_TEST_CASE("a weight overwrites y with W x plus its bias", "[laws]", WeightsUnderTest) {
  using W = typename TestType::Type;
  using S = typename W::Scalar;
  STATIC_REQUIRE(MergeableWeight<W>);
  for_each_weight_case<W>([](const WeightCase<W>& c) {
    MatrixX<S> y = all_nan<S>(c.out, c.x.cols());
    c.weight.apply(c.x, y);
    MatrixX<double> expected = in_double(c.weight.dense()).lazyProduct(in_double(c.x));
    if (c.bias) expected.colwise() += VectorX<double>(c.weight.dense_bias().template cast<double>());
    CHECK(gap(in_double(y), expected) < rounding<S>);
  });
}

TEMPLATE_LIST_TEST_CASE("a weight adds its transpose times dy to dx", "[laws]", WeightsUnderTest) {
  using W = typename TestType::Type;
  using S = typename W::Scalar;
  for_each_weight_case<W>([](const WeightCase<W>& c) {
    const MatrixX<S> before = noise<S>(c.in, c.x.cols(), 3);
    MatrixX<S> dx = before;
    c.weight.add_apply_transposed(c.dy, dx);
    const MatrixX<double> expected =
        in_double(before) + MatrixX<double>(in_double(c.weight.dense()).transpose().lazyProduct(in_double(c.dy)));
    CHECK(gap(in_double(dx), expected) < rounding<S>);
  });
}

TEMPLATE_LIST_TEST_CASE("a weight holds the values that it was made of", "[laws]", WeightsUnderTest) {
  using W = typename TestType::Type;
  using S = typename W::Scalar;
  for_each_weight_case<W>([](const WeightCase<W>& c) {
    const auto source = MakeWeight<DenseWeight<S, typename MakeWeight<W>::Storage>>::make(c.out, c.in, c.bias, 10);
    CHECK(c.weight.rows() == c.out);
    CHECK(c.weight.cols() == c.in);
    CHECK(same_bits(c.weight.dense(), MatrixX<S>(source.W)));
    CHECK(same_bits(c.weight.dense_bias(), source.bias));
    CHECK(c.weight.dense_bias().size() == (c.bias ? c.out : 0));
  });
}

TEMPLATE_LIST_TEST_CASE("a weight's bits depend on its values and not on how they are stored", "[laws]", WeightsUnderTest) {
  using W = typename TestType::Type;
  using S = typename W::Scalar;
  for_each_weight_case<W>([](const WeightCase<W>& c) {
    const DenseWeight<S> dense(c.weight.dense(), c.weight.dense_bias());
    MatrixX<S> y(c.out, c.x.cols()), dense_y(c.out, c.x.cols()), dx = noise<S>(c.in, c.x.cols(), 3), dense_dx = dx;
    c.weight.apply(c.x, y);
    dense.apply(c.x, dense_y);
    CHECK(same_bits(y, dense_y));
    c.weight.add_apply_transposed(c.dy, dx);
    dense.add_apply_transposed(c.dy, dense_dx);
    CHECK(same_bits(dx, dense_dx));
  });
}

TEMPLATE_LIST_TEST_CASE("a sample's output of a weight does not depend on the batch it is in", "[laws]", WeightsUnderTest) {
  using W = typename TestType::Type;
  using S = typename W::Scalar;
  for_each_weight_case<W>([](const WeightCase<W>& c) {
    MatrixX<S> y(c.out, c.x.cols()), dx = MatrixX<S>::Zero(c.in, c.x.cols());
    c.weight.apply(c.x, y);
    c.weight.add_apply_transposed(c.dy, dx);
    for (Index j = 0; j < c.x.cols(); ++j) {
      MatrixX<S> alone(c.out, 1), dx_alone = MatrixX<S>::Zero(c.in, 1);
      c.weight.apply(c.x.col(j), alone);
      c.weight.add_apply_transposed(c.dy.col(j), dx_alone);
      CHECK(same_bits(alone, MatrixX<S>(y.col(j))));
      CHECK(same_bits(dx_alone, MatrixX<S>(dx.col(j))));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("a weight takes a low-rank term along as if it were added afterwards", "[laws]", WeightsUnderTest) {
  using W = typename TestType::Type;
  using S = typename W::Scalar;
  if constexpr (FusedWeight<W>) {
    for_each_weight_case<W>([](const WeightCase<W>& c) {
      for (const Index samples : {1, 5, 19}) {
        for (const Index rank : {0, 1, 3, 300}) {
          INFO(samples << " samples, rank " << rank);
          const MatrixX<S> x = noise<S>(c.in, samples, 1), dy = noise<S>(c.out, samples, 2), out = noise<S>(c.out, rank, 4),
                           in = noise<S>(c.in, rank, 5), right = noise<S>(rank, samples, 6);
          const LowRankTerm<S> output_term{out, right, S(0.7)}, input_term{in, right, S(0.7)};

          MatrixX<S> y = all_nan<S>(c.out, samples), expected(c.out, samples);
          c.weight.apply(x, output_term, y);
          c.weight.apply(x, expected);
          add_product(expected, out, right, S(0.7));
          CHECK(same_bits(y, expected));

          MatrixX<S> dx = all_nan<S>(c.in, samples), expected_dx = MatrixX<S>::Zero(c.in, samples);
          c.weight.apply_transposed(dy, input_term, dx);
          c.weight.add_apply_transposed(dy, expected_dx);
          add_product(expected_dx, in, right, S(0.7));
          CHECK(same_bits(dx, expected_dx));

          dx = expected_dx = noise<S>(c.in, samples, 3);
          c.weight.add_apply_transposed(dy, input_term, dx);
          c.weight.add_apply_transposed(dy, expected_dx);
          add_product(expected_dx, in, right, S(0.7));
          CHECK(same_bits(dx, expected_dx));
        }
      }
      MatrixX<S> y(c.out, 5), dx(c.in, 5);
      const MatrixX<S> left = noise<S>(c.out + 1, 2, 1), in = noise<S>(c.in, 2, 1), right = noise<S>(2, 6, 2);
      const LowRankTerm<S> tall{left, right.leftCols(5)}, wide{in, right};
      CHECK_THROWS_SAYING(ShapeError, c.weight.apply(c.x, tall, y), "rows of the left operand");
      CHECK_THROWS_SAYING(ShapeError, c.weight.apply_transposed(c.dy, wide, dx), "columns of the right operand");
    });
  }
}

TEMPLATE_LIST_TEST_CASE("a weight refuses what does not fit", "[laws]", WeightsUnderTest) {
  using W = typename TestType::Type;
  using S = typename W::Scalar;
  for_each_weight_case<W>([](const WeightCase<W>& c) {
    const auto tall = [&](Index rows) { return noise<S>(rows + 1, 5, 1); };
    MatrixX<S> y(c.out, 5), tall_y(c.out + 1, 5), wide_y(c.out, 6), dx = noise<S>(c.in, 5, 1), tall_dx = tall(c.in),
                                                                    wide_dx = noise<S>(c.in, 6, 1);
    const std::string out = "expected " + std::to_string(c.out), in = "expected " + std::to_string(c.in);
    CHECK_THROWS_SAYING(ShapeError, c.weight.apply(tall(c.in), y), "rows", in);
    CHECK_THROWS_SAYING(ShapeError, c.weight.apply(c.x, tall_y), "rows of y", out, "got " + std::to_string(c.out + 1));
    CHECK_THROWS_SAYING(ShapeError, c.weight.apply(c.x, wide_y), "samples in y", "expected 5", "got 6");
    CHECK_THROWS_SAYING(ShapeError, c.weight.add_apply_transposed(tall(c.out), dx), "rows", out);
    CHECK_THROWS_SAYING(ShapeError, c.weight.add_apply_transposed(c.dy, tall_dx), "rows");
    CHECK_THROWS_SAYING(ShapeError, c.weight.add_apply_transposed(c.dy, wide_dx), "columns", "expected 6", "got 5");
  });
}

}  // namespace dylora::test

#endif
