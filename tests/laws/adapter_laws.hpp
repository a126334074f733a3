#ifndef DYLORA_TESTS_LAWS_ADAPTER_LAWS_HPP
#define DYLORA_TESTS_LAWS_ADAPTER_LAWS_HPP

#include <algorithm>
#include <concepts>
#include <string>
#include <utility>
#include <vector>

#include "dylora/adapters/adapter.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/parallel.hpp"
#include "dylora/ranks/truncate.hpp"
#include "dylora/testing/gradient_check.hpp"
#include "support/catch.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/threads.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

/// What every adapter obeys. The including file says before which ones: using AdaptersUnderTest = InFloatAndDouble<...>.
namespace dylora::test {

/// One adapter to show a law on: fresh (B = 0) or trained (all at random), and a slice.
template <class A>
struct AdapterCase {
  using S = typename A::Scalar;
  static constexpr Index in = 9, out = 7, samples = 5;

  bool trained;
  RankSlice rank;
  A adapter = make<A>();
  Matrix<S> x = noise<S>(in, samples, 1);
  Matrix<S> dy = noise<S>(out, samples, 2);

  /// The same as another type.
  template <class T>
  T make() const {
    T made = make_adapter<T>(in, out, law_rank, 10);
    if (trained) randomize<T>(made, 3);
    return made;
  }

  A truncated(Index max_rank) const {
    A shorter = make_adapter<A>(in, out, max_rank, 10);
    copy_prefix(adapter, shorter);
    return shorter;
  }
};

/// Shows a law fresh and trained, at every slice.
template <class A, class F>
void for_each_adapter_case(F&& show) {
  for (const bool trained : {false, true}) {
    for (const RankSlice rank : law_slices()) {
      INFO((trained ? "trained, " : "fresh, ") << describe(rank));
      LawCount::add_case();
      show(AdapterCase<A>{trained, rank});
    }
  }
}

/// Calls f(begin, count, rank) for each run of neighbours at one rank.
template <class F>
void for_each_part(const std::vector<RankSlice>& mix, F&& f) {
  for (std::size_t begin = 0, end = 0; begin < mix.size(); begin = end) {
    while (end < mix.size() && mix[end] == mix[begin]) ++end;
    f(static_cast<Index>(begin), static_cast<Index>(end - begin), mix[begin]);
  }
}

/// Shows a law fresh and trained, whole and cut, at every mix of ranks.
template <class A, class F>
void for_each_mixed_adapter_case(F&& show) {
  for (const bool trained : {false, true}) {
    for (const Index components : {law_rank, Index{2}, Index{0}}) {
      AdapterCase<A> c{trained, law_rank};
      if (components < law_rank && !has_components(c.adapter)) continue;
      truncate(c.adapter, components);
      for (const std::vector<RankSlice>& mix : law_mixes()) {
        INFO((trained ? "trained, " : "fresh, ") << components << " components, mix " << &mix - law_mixes().data());
        LawCount::add_case();
        show(c, mix);
      }
    }
  }
}

/// What a forward and a backward add to zero.
template <class A>
struct AdapterResult {
  using S = typename A::Scalar;
  Matrix<S> y, dx;
  typename A::Gradients gradients;

  bool operator==(const AdapterResult& other) const {
    return same_bits(y, other.y) && same_bits(dx, other.dx) && same_bits(values<A>(gradients), values<A>(other.gradients));
  }
};

template <class A>
AdapterResult<A> run(const A& adapter, const Matrix<typename A::Scalar>& x, const Matrix<typename A::Scalar>& dy, const BatchRanks& ranks,
                     typename A::Cache cache = fresh_cache<A>()) {
  using S = typename A::Scalar;
  AdapterResult<A> result{Matrix<S>::Zero(adapter.out_features(), x.cols()), Matrix<S>::Zero(x.rows(), x.cols()), zeros_like(adapter)};
  adapter.add_forward(x, ranks, cache, result.y);
  adapter.add_backward(x, dy, cache, result.gradients, result.dx);
  return result;
}

/// The first parameter that has not the same shape in both, as an error describes it; two empty strings if there is none.
template <class A>
std::pair<std::string, std::string> first_unequal_shapes(const typename A::Gradients& one, const typename A::Gradients& other) {
  std::pair<std::string, std::string> shapes;
  A::zip_parameters(
      [&](Parameter, const auto& a, const auto& b) {
        const auto shape = [](const auto& m) { return std::to_string(m.rows()) + " × " + std::to_string(m.cols()); };
        if (shapes.first.empty() && shape(a) != shape(b)) shapes = {shape(a), shape(b)};
      },
      one, other);
  return shapes;
}

template <class A>
AdapterResult<A> run(const AdapterCase<A>& c) {
  return run(c.adapter, c.x, c.dy, c.rank);
}

TEMPLATE_LIST_TEST_CASE("an adapter's backward is the derivative of its forward", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  STATIC_REQUIRE(Adapter<A>);
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    if constexpr (std::same_as<typename A::Scalar, double>) {
      Rng rng(4);
      const GradientReport report = check_gradients(c.adapter, c.x, c.rank, rng, fresh_cache<A>());
      INFO(report.where);
      CHECK(report.entries == c.x.size() + parameter_count(c.adapter));
      CHECK(report.error < 1e-6);
    } else {  // as the double adapter, which is held to differences
      using D = typename TestType::InDouble::Type;
      const auto got = run(c);
      const auto exact = run(c.template make<D>(), in_double(c.x), in_double(c.dy), c.rank);
      CHECK(gap(in_double(got.y), exact.y) < rounding<float>);
      CHECK(gap(in_double(got.dx), exact.dx) < rounding<float>);
      CHECK(gap(values<A>(got.gradients).template cast<double>(), values<D>(exact.gradients)) < rounding<float>);
    }
  });
}

TEMPLATE_LIST_TEST_CASE("an adapter's delta is its forward as a matrix", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  if constexpr (!MergeableAdapter<A>) return;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    if constexpr (MergeableAdapter<A>) {
      const Matrix<S> delta = c.adapter.delta(c.rank);
      CHECK(gap(in_double(delta).lazyProduct(in_double(c.x)), in_double(run(c.adapter, c.x, c.dy, c.rank, {}).y)) < rounding<S>);
      if (!c.trained) CHECK(delta.isZero(0));
      CHECK(c.adapter.delta(RankSlice::none()).isZero(0));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("an adapter at no rank or with B = 0 adds nothing", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    const auto none = run(c.adapter, c.x, c.dy, RankSlice::none());
    CHECK(none.y.isZero(0));
    CHECK(none.dx.isZero(0));
    CHECK(values<A>(none.gradients).isZero(0));
    if (!c.trained) {
      CHECK(run(c).y.isZero(0));
      CHECK(run(c).dx.isZero(0));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("an adapter at rank b is the adapter truncated to b bit for bit", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    const Index b = c.rank.active;
    const A truncated = c.truncated(b);
    const auto whole = run(c), part = run(truncated, c.x, c.dy, c.rank);
    CHECK(same_bits(whole.y, part.y));
    CHECK(same_bits(whole.dx, part.dx));
    CHECK(same_bits(component_values<A>(whole.gradients, 0, b), component_values<A>(part.gradients, 0)));
    CHECK(same_bits(shared_values<A>(whole.gradients), shared_values<A>(part.gradients)));
    if constexpr (MergeableAdapter<A>) CHECK(same_bits(c.adapter.delta(c.rank), truncated.delta(c.rank)));
  });
}

TEMPLATE_LIST_TEST_CASE("components past the rank are neither read nor written by an adapter", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    const auto clean = run(c);
    A poisoned = c.adapter;
    fill_components<A>(poisoned, nan<S>, c.rank.active);
    CHECK(run(poisoned, c.x, c.dy, c.rank) == clean);
    CHECK(clean.y.allFinite());
    CHECK(clean.dx.allFinite());
    CHECK(component_values<A>(clean.gradients, 0, c.rank.active).allFinite());
    CHECK(component_values<A>(clean.gradients, c.rank.active).isZero(0));
    CHECK(shared_values<A>(clean.gradients).allFinite());
    if constexpr (MergeableAdapter<A>) CHECK(same_bits(poisoned.delta(c.rank), c.adapter.delta(c.rank)));
  });
}

TEMPLATE_LIST_TEST_CASE("a frozen prefix of an adapter gets no gradient and what is trained gets that of nested mode", "[laws]",
                        AdaptersUnderTest) {
  using A = typename TestType::Type;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    const Index b = c.rank.active, t = c.rank.trainable_from;
    const auto frozen = run(c), nested = run(c.adapter, c.x, c.dy, b);
    CHECK(same_bits(frozen.y, nested.y));
    CHECK(same_bits(frozen.dx, nested.dx));
    CHECK(component_values<A>(frozen.gradients, 0, t).isZero(0));
    CHECK(same_bits(component_values<A>(frozen.gradients, t, b), component_values<A>(nested.gradients, t, b)));
    CHECK(same_bits(shared_values<A>(frozen.gradients), shared_values<A>(nested.gradients)));
  });
}

TEMPLATE_LIST_TEST_CASE("an adapter's batch of several ranks equals its parts run apart bit for bit", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  for_each_mixed_adapter_case<A>([](const AdapterCase<A>& c, const std::vector<RankSlice>& mix) {
    Matrix<S> y = Matrix<S>::Zero(c.out, c.samples), dx = Matrix<S>::Zero(c.in, c.samples);
    auto gradients = zeros_like(c.adapter);
    for_each_part(mix, [&](Index begin, Index n, RankSlice rank) {
      typename A::Cache cache;
      const Matrix<S> x = c.x.middleCols(begin, n), dy = c.dy.middleCols(begin, n);
      c.adapter.add_forward(x, rank, cache, y.middleCols(begin, n));
      c.adapter.add_backward(x, dy, cache, gradients, dx.middleCols(begin, n));
    });
    const auto mixed = run(c.adapter, c.x, c.dy, BatchRanks::per_sample(mix), {});
    CHECK(same_bits(mixed.y, y));
    CHECK(same_bits(mixed.dx, dx));
    CHECK(same_bits(values<A>(mixed.gradients), values<A>(gradients)));
    CHECK(trained_components<A>(mixed.gradients) == trained_components<A>(gradients));
  });
}

TEMPLATE_LIST_TEST_CASE("what an adapter drops and gives for a sample does not depend on the ranks of the others", "[laws]",
                        AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  for_each_mixed_adapter_case<A>([](const AdapterCase<A>& c, const std::vector<RankSlice>& mix) {
    const auto mixed = run(c.adapter, c.x, c.dy, BatchRanks::per_sample(mix));
    for_each_part(mix, [&](Index begin, Index n, RankSlice rank) {
      const auto at_one_rank = run(c.adapter, c.x, c.dy, rank);
      CHECK(same_bits(Matrix<S>(mixed.y.middleCols(begin, n)), Matrix<S>(at_one_rank.y.middleCols(begin, n))));
      CHECK(same_bits(Matrix<S>(mixed.dx.middleCols(begin, n)), Matrix<S>(at_one_rank.dx.middleCols(begin, n))));
    });
  });
}

TEMPLATE_LIST_TEST_CASE("a component reaches no sample of an adapter's batch whose rank is without it", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  for_each_mixed_adapter_case<A>([](const AdapterCase<A>& c, const std::vector<RankSlice>& mix) {
    const BatchRanks ranks = BatchRanks::per_sample(mix);
    const auto clean = run(c.adapter, c.x, c.dy, ranks);
    for (const Index spoilt : {0, 1, 3, 5}) {
      A poisoned = c.adapter;
      fill_components<A>(poisoned, nan<S>, spoilt);
      // And NaN from before in every buffer, also where the ranks of this batch leave it unwritten.
      auto cache = fresh_cache<A>();
      AdapterResult<A> result{all_nan<S>(c.out, 2 * c.samples), all_nan<S>(c.in, 2 * c.samples), zeros_like(poisoned)};
      poisoned.add_forward(all_nan<S>(c.in, 2 * c.samples), law_rank, cache, result.y);
      poisoned.add_backward(all_nan<S>(c.in, 2 * c.samples), all_nan<S>(c.out, 2 * c.samples), cache, result.gradients, result.dx);
      seed_dropout(cache);
      result.y = Matrix<S>::Zero(c.out, c.samples);
      result.dx = Matrix<S>::Zero(c.in, c.samples);
      set_zero(poisoned, result.gradients);
      poisoned.add_forward(c.x, ranks, cache, result.y);
      poisoned.add_backward(c.x, c.dy, cache, result.gradients, result.dx);
      for_each_part(mix, [&](Index begin, Index n, RankSlice rank) {
        if (rank.active > spoilt) return;
        CHECK(same_bits(Matrix<S>(result.y.middleCols(begin, n)), Matrix<S>(clean.y.middleCols(begin, n))));
        CHECK(same_bits(Matrix<S>(result.dx.middleCols(begin, n)), Matrix<S>(clean.dx.middleCols(begin, n))));
      });
      if constexpr (!couples_components<A>)
        CHECK(same_bits(component_values<A>(result.gradients, 0, spoilt), component_values<A>(clean.gradients, 0, spoilt)));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("an adapter frozen up to its rank passes gradient on and no component learns", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    const Index b = c.rank.active;
    const auto frozen = run(c.adapter, c.x, c.dy, BatchRanks(b, b)), nested = run(c.adapter, c.x, c.dy, b);
    CHECK(same_bits(frozen.y, nested.y));
    CHECK(same_bits(frozen.dx, nested.dx));
    CHECK(component_values<A>(frozen.gradients, 0).isZero(0));
    CHECK(same_bits(shared_values<A>(frozen.gradients), shared_values<A>(nested.gradients)));
    for (const std::string& trained : trained_components<A>(frozen.gradients)) CHECK(trained.find('1') == std::string::npos);
  });
}

TEMPLATE_LIST_TEST_CASE("an adapter cut to its first components is at every rank what it was at those", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    if (!has_components(c.adapter)) return;
    for (Index components = 0; components <= law_rank; ++components) {
      A cut = c.adapter;
      truncate(cut, components);
      CHECK(cut.max_rank() == c.adapter.max_rank());
      const Index b = std::min(c.rank.active, components), t = std::min(c.rank.trainable_from, components);
      const RankSlice left = b == 0 ? RankSlice::none() : RankSlice(b, t);
      const auto got = run(cut, c.x, c.dy, c.rank), whole = run(c.adapter, c.x, c.dy, left);
      CHECK(same_bits(got.y, whole.y));
      CHECK(same_bits(got.dx, whole.dx));
      CHECK(same_bits(component_values<A>(got.gradients, 0), component_values<A>(whole.gradients, 0, components)));
      CHECK(same_bits(shared_values<A>(got.gradients), shared_values<A>(whole.gradients)));
      const auto noted = trained_components<A>(got.gradients), expected = trained_components<A>(whole.gradients);
      for (std::size_t i = 0; i < noted.size(); ++i) CHECK(noted[i] == expected[i].substr(0, static_cast<std::size_t>(components)));
      if constexpr (MergeableAdapter<A>) CHECK(same_bits(cut.delta(c.rank), c.adapter.delta(left)));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("an adapter is linear in its input", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  if constexpr (!MergeableAdapter<A>) return;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    const Matrix<S> z = noise<S>(c.in, c.samples, 6);
    const Matrix<S> sum = run(c.adapter, c.x + z, c.dy, c.rank).y, apart = run(c).y + run(c.adapter, z, c.dy, c.rank).y;
    CHECK(gap(in_double(sum), in_double(apart)) < rounding<S>);
    CHECK(same_bits(run(c.adapter, Matrix<S>(4 * c.x), c.dy, c.rank).y, Matrix<S>(4 * run(c).y)));
    CHECK(same_bits(run(c.adapter, c.x, Matrix<S>(4 * c.dy), c.rank).dx, Matrix<S>(4 * run(c).dx)));
  });
}

TEMPLATE_LIST_TEST_CASE("an adapter adds to y and dx and gradients", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    const auto clean = run(c);
    const Matrix<S> y_before = noise<S>(c.out, c.samples, 6), dx_before = noise<S>(c.in, c.samples, 7);
    Matrix<S> y = y_before, dx = dx_before;
    auto cache = fresh_cache<A>();
    auto before = zeros_like(c.adapter), gradients = zeros_like(c.adapter);
    randomize<A>(before, 5);
    randomize<A>(gradients, 5);
    c.adapter.add_forward(c.x, c.rank, cache, y);
    c.adapter.add_backward(c.x, c.dy, cache, gradients, dx);
    CHECK(gap(in_double(y), in_double<S>(y_before + clean.y)) < rounding<S>);
    CHECK(gap(in_double(dx), in_double<S>(dx_before + clean.dx)) < rounding<S>);
    const Vector<S> sum = values<A>(before) + values<A>(clean.gradients);
    CHECK(gap(in_double<S>(values<A>(gradients)), in_double<S>(sum)) < rounding<S>);
    const Index b = c.rank.active, t = c.rank.trainable_from;
    CHECK(same_bits(component_values<A>(gradients, 0, t), component_values<A>(before, 0, t)));
    CHECK(same_bits(component_values<A>(gradients, b), component_values<A>(before, b)));
  });
}

TEMPLATE_LIST_TEST_CASE("an adapter's cache is overwritten by each forward and read by any number of backward", "[laws]",
                        AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    const auto clean = run(c);
    auto cache = fresh_cache<A>();
    auto gradients = zeros_like(c.adapter);
    // A bigger call leaves NaN in every buffer of the cache and of the gradients' workspace.
    Matrix<S> y = all_nan<S>(c.out, 2 * c.samples), dx = all_nan<S>(c.in, 2 * c.samples);
    c.adapter.add_forward(all_nan<S>(c.in, 2 * c.samples), law_rank, cache, y);
    c.adapter.add_backward(all_nan<S>(c.in, 2 * c.samples), all_nan<S>(c.out, 2 * c.samples), cache, gradients, dx);
    seed_dropout(cache);
    y = Matrix<S>::Zero(c.out, c.samples);
    c.adapter.add_forward(c.x, c.rank, cache, y);
    CHECK(same_bits(y, clean.y));
    for (int time = 0; time < 2; ++time) {
      set_zero(c.adapter, gradients);
      dx = Matrix<S>::Zero(c.in, c.samples);
      c.adapter.add_backward(c.x, c.dy, cache, gradients, dx);
      CHECK(same_bits(dx, clean.dx));
      CHECK(same_bits(values<A>(gradients), values<A>(clean.gradients)));
    }
  });
}

// Past the threshold for threads, with edges in every direction.
TEMPLATE_LIST_TEST_CASE("an adapter gives the same bits on any number of threads", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  constexpr Index in = 71, out = 61, samples = 401, many = 301, max_rank = 31;
  static_assert(out * max_rank * many > parallel_work);
  A adapter = make_adapter<A>(in, out, max_rank, 10);
  randomize<A>(adapter, 3);
  const Matrix<S> x = noise<S>(in, samples, 1), dy = noise<S>(out, samples, 2);
  std::vector<RankSlice> mix(samples, max_rank);
  std::fill(mix.begin() + many, mix.begin() + 360, RankSlice(17, 6));
  std::fill(mix.begin() + 360, mix.end(), RankSlice::none());
  for (const BatchRanks& ranks : {BatchRanks(max_rank), BatchRanks::per_sample(mix)}) {
    LawCount::add_case();
    const auto call = [&] { return run(adapter, x, dy, ranks); };
    const auto expected = call();
    for_each_threading(call, [&](const AdapterResult<A>& result, const std::string& where) {
      INFO(where);
      CHECK(result == expected);
    });
  }
}

TEMPLATE_LIST_TEST_CASE("an adapter refuses what does not fit and says what was expected and what came", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  const AdapterCase<A> c{true, 3};
  if (c.adapter.max_rank() == 0) {  // nothing to fit: it looks at nothing and changes nothing
    LawCount::add_case();
    CHECK(run(c).y.isZero(0));
    return;
  }
  for (const bool dropping : {false, true}) {
    LawCount::add_case();
    typename A::Cache cache, unfilled;
    if (dropping) seed_dropout(cache);
    auto gradients = zeros_like(c.adapter);
    Matrix<S> y(c.out, c.samples), dx = Matrix<S>::Zero(c.in, c.samples);
    y.setZero();
    const auto tall = [&](Index rows) { return noise<S>(rows + 1, c.samples, 1); };
    const auto wide = [&](Index rows) { return noise<S>(rows, c.samples + 1, 1); };
    Matrix<S> tall_y = tall(c.out), wide_y = wide(c.out), tall_dx = tall(c.in), wide_dx = wide(c.in);
    const A& a = c.adapter;
    CHECK_THROWS_SAYING(ShapeError, a.add_forward(tall(c.in), 3, cache, y), "add_forward", "rows of x", "expected 9", "got 10");
    CHECK_THROWS_SAYING(ShapeError, a.add_forward(c.x, 3, cache, tall_y), "add_forward", "rows of y", "expected 7", "got 8");
    CHECK_THROWS_SAYING(ShapeError, a.add_forward(c.x, 3, cache, wide_y), "add_forward", "samples in y", "expected 5", "got 6");
    CHECK_THROWS_SAYING(std::invalid_argument, a.add_forward(c.x, 6, cache, y), "add_forward", "rank", "max_rank = 5", "got 6");
    if constexpr (MergeableAdapter<A>) CHECK_THROWS_SAYING(std::invalid_argument, a.delta(6), "delta", "rank", "max_rank = 5", "got 6");
    CHECK_THROWS_SAYING(std::invalid_argument, a.add_forward(c.x, BatchRanks::per_sample({1, 1, 6, 1, 1}), cache, y), "add_forward", "rank",
                        "max_rank = 5", "got 6");
    CHECK_THROWS_SAYING(ShapeError, a.add_forward(c.x, BatchRanks::per_sample({1, 2, 3, 4}), cache, y), "add_forward",
                        "columns that the ranks are for", "expected 5", "got 4");
    CHECK(y.isZero(0));
    CHECK_THROWS_SAYING(ShapeError, a.add_backward(c.x, c.dy, unfilled, gradients, dx), "add_backward", "cache", "add_forward",
                        "expected 0", "got 5");
    a.add_forward(c.x, 3, cache, y);
    CHECK_THROWS_SAYING(ShapeError, a.add_backward(c.x, tall(c.out), cache, gradients, dx), "add_backward", "rows of dy", "expected 7",
                        "got 8");
    CHECK_THROWS_SAYING(ShapeError, a.add_backward(c.x, wide(c.out), cache, gradients, dx), "add_backward", "samples in dy", "expected 5",
                        "got 6");
    CHECK_THROWS_SAYING(ShapeError, a.add_backward(c.x, c.dy, cache, gradients, tall_dx), "add_backward", "rows of dx", "expected 9",
                        "got 10");
    CHECK_THROWS_SAYING(ShapeError, a.add_backward(c.x, c.dy, cache, gradients, wide_dx), "add_backward", "samples in dx", "expected 5",
                        "got 6");
    auto other = zeros_like(make_adapter<A>(c.in + 1, c.out, law_rank, 1));
    if (const auto [expected, got] = first_unequal_shapes<A>(gradients, other); expected != got)
      CHECK_THROWS_SAYING(ShapeError, a.add_backward(c.x, c.dy, cache, other, dx), "gradient of", "zeros_like", expected, got);
    if (has_components(a)) {
      A cut = a;
      truncate(cut, 2);
      auto cut_gradients = zeros_like(cut);
      Matrix<S> cut_y = Matrix<S>::Zero(c.out, c.samples);
      typename A::Cache before;  // filled by the adapter before it was cut
      a.add_forward(c.x, 3, before, cut_y);
      CHECK_THROWS_SAYING(std::invalid_argument, cut.add_backward(c.x, c.dy, before, cut_gradients, dx), "cache", "max_rank = 2", "got 3");
      cut_y.setZero();
      CHECK_THROWS_SAYING(std::invalid_argument, cut.add_forward(c.x, 6, before, cut_y), "add_forward", "rank", "max_rank = 5", "got 6");
      CHECK(cut_y.isZero(0));
      CHECK(values<A>(cut_gradients).isZero(0));
    }
    CHECK(values<A>(gradients).isZero(0));
    CHECK(dx.isZero(0));
  }
}

}  // namespace dylora::test

#endif
