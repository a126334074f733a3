#ifndef DYLORA_TESTS_LAWS_ADAPTER_LAWS_HPP
#define DYLORA_TESTS_LAWS_ADAPTER_LAWS_HPP

#include <algorithm>
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
#include "laws/laws.hpp"
#include "support/catch.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/threads.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

/// What every adapter obeys. The including file says before which ones: using AdaptersUnderTest = InFloatAndDouble<...>.
namespace dylora::test {

template <class A>
Result<A> run(const A& adapter, const MatrixX<typename A::Scalar>& x, const MatrixX<typename A::Scalar>& dy, const BatchRanks& ranks,
              typename A::Cache cache = fresh_cache<A>()) {
  using S = typename A::Scalar;
  Result<A> result{MatrixX<S>::Zero(adapter.out_features(), x.cols()), MatrixX<S>::Zero(x.rows(), x.cols()), zeros_like(adapter)};
  typename A::Workspace workspace;
  adapter.add_forward(x, ranks, cache, result.y);
  adapter.add_backward(x, dy, cache, result.gradients, workspace, result.dx);
  return result;
}

/// One adapter to show a law on: fresh (B = 0) or trained (all at random), and a slice.
template <class A>
struct AdapterCase {
  using S = typename A::Scalar;
  using Subject = A;
  static constexpr Index in = 9, out = 7, samples = 5;

  bool trained;
  RankSlice rank;
  A subject = make<A>();
  MatrixX<S> x = noise<S>(in, samples, 1);
  MatrixX<S> dy = noise<S>(out, samples, 2);

  /// The same as another type.
  template <class T>
  T make() const {
    T made = make_adapter<T>(in, out, law_rank, 10);
    if (trained) randomize<T>(made, 3);
    return made;
  }

  Result<A> run(const A& other, const BatchRanks& ranks) const { return test::run(other, x, dy, ranks); }
  Result<A> run() const { return run(subject, rank); }
  template <class D>
  Result<D> run_as() const {
    return test::run(make<D>(), in_double(x), in_double(dy), rank);
  }

  A truncated(Index max_rank) const {
    A shorter = make_adapter<A>(in, out, max_rank, 10);
    copy_prefix(subject, shorter);
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
      if (components < law_rank && !has_components(c.subject)) continue;
      truncate(c.subject, components);
      for (const std::vector<RankSlice>& mix : law_mixes()) {
        INFO((trained ? "trained, " : "fresh, ") << components << " components, mix " << &mix - law_mixes().data());
        LawCount::add_case();
        show(c, mix);
      }
    }
  }
}

/// The first parameter that has not the same shape in both, as an error describes it; two empty strings if there is none.
template <class A>
std::pair<std::string, std::string> first_unequal_shapes(const typename A::Gradients& one, const typename A::Gradients& other) {
  std::pair<std::string, std::string> shapes;
  for_each_parameter<A>(
      [&](Parameter, const auto& a, const auto& b) {
        const auto shape = [](const auto& m) { return std::to_string(m.rows()) + " × " + std::to_string(m.cols()); };
        if (shapes.first.empty() && shape(a) != shape(b)) shapes = {shape(a), shape(b)};
      },
      one, other);
  return shapes;
}

TEMPLATE_LIST_TEST_CASE("an adapter's backward is the derivative of its forward", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  STATIC_REQUIRE(Adapter<A>);
  for_each_adapter_case<A>([](const AdapterCase<A>& c) { check_backward_is_derivative<typename TestType::InDouble::Type>(c); });
}

TEMPLATE_LIST_TEST_CASE("an adapter's delta is its forward as a matrix", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  if constexpr (!MergeableAdapter<A>) return;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    if constexpr (MergeableAdapter<A>) {
      const MatrixX<S> delta = c.subject.delta(c.rank);
      CHECK(gap(in_double(delta).lazyProduct(in_double(c.x)), in_double(run(c.subject, c.x, c.dy, c.rank, {}).y)) < rounding<S>);
      if (!c.trained) CHECK(delta.isZero(0));
      CHECK(c.subject.delta(RankSlice::none()).isZero(0));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("an adapter at no rank or with B = 0 adds nothing", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    const auto none = c.run(c.subject, RankSlice::none());
    CHECK(none.y.isZero(0));
    CHECK(none.dx.isZero(0));
    CHECK(values<A>(none.gradients).isZero(0));
    if (!c.trained) {
      CHECK(c.run().y.isZero(0));
      CHECK(c.run().dx.isZero(0));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("an adapter at rank b is the adapter truncated to b bit for bit", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    const A truncated = c.truncated(c.rank.active);
    check_rank_is_truncation(c, truncated);
    if constexpr (MergeableAdapter<A>) CHECK(same_bits(c.subject.delta(c.rank), truncated.delta(c.rank)));
  });
}

TEMPLATE_LIST_TEST_CASE("components past the rank are neither read nor written by an adapter", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    const A poisoned = check_unread_past_rank(c);
    const auto clean = c.run();
    CHECK(clean.dx.allFinite());
    CHECK(component_values<A>(clean.gradients, 0, c.rank.active).allFinite());
    CHECK(shared_values<A>(clean.gradients).allFinite());
    if constexpr (MergeableAdapter<A>) CHECK(same_bits(poisoned.delta(c.rank), c.subject.delta(c.rank)));
  });
}

TEMPLATE_LIST_TEST_CASE("a frozen prefix of an adapter gets no gradient and what is trained gets that of nested mode", "[laws]",
                        AdaptersUnderTest) {
  using A = typename TestType::Type;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) { check_frozen_prefix(c); });
}

TEMPLATE_LIST_TEST_CASE("an adapter's batch of several ranks equals its parts run apart bit for bit", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  for_each_mixed_adapter_case<A>([](const AdapterCase<A>& c, const std::vector<RankSlice>& mix) {
    Result<A> apart{MatrixX<S>::Zero(c.out, c.samples), MatrixX<S>::Zero(c.in, c.samples), zeros_like(c.subject)};
    for_each_part(mix, [&](Index begin, Index n, RankSlice rank) {
      typename A::Cache cache;
      typename A::Workspace workspace;
      const MatrixX<S> x = c.x.middleCols(begin, n), dy = c.dy.middleCols(begin, n);
      c.subject.add_forward(x, rank, cache, apart.y.middleCols(begin, n));
      if constexpr (SelfContained<A>) {  // and so in a workspace of its own too
        c.subject.add_backward(x, dy, cache, apart.gradients, apart.dx.middleCols(begin, n));
      } else {
        c.subject.add_backward(x, dy, cache, apart.gradients, workspace, apart.dx.middleCols(begin, n));
      }
    });
    check_batch_is_its_parts(run(c.subject, c.x, c.dy, BatchRanks::per_sample(mix), {}), apart);
  });
}

TEMPLATE_LIST_TEST_CASE("what an adapter drops and gives for a sample does not depend on the ranks of the others", "[laws]",
                        AdaptersUnderTest) {
  using A = typename TestType::Type;
  for_each_mixed_adapter_case<A>([](const AdapterCase<A>& c, const std::vector<RankSlice>& mix) {
    const auto mixed = c.run(c.subject, BatchRanks::per_sample(mix));
    for_each_part(mix, [&](Index begin, Index n, RankSlice rank) { check_same_outputs(mixed, c.run(c.subject, rank), begin, n); });
  });
}

TEMPLATE_LIST_TEST_CASE("a component reaches no sample of an adapter's batch whose rank is without it", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  for_each_mixed_adapter_case<A>([](const AdapterCase<A>& c, const std::vector<RankSlice>& mix) {
    const BatchRanks ranks = BatchRanks::per_sample(mix);
    const auto clean = c.run(c.subject, ranks);
    for (const Index spoilt : {0, 1, 3, 5}) {
      A poisoned = c.subject;
      fill_components<A>(poisoned, nan<S>, spoilt);
      // And NaN from before in every buffer, also where the ranks of this batch leave it unwritten.
      auto cache = fresh_cache<A>();
      typename A::Workspace workspace;
      Result<A> result{all_nan<S>(c.out, 2 * c.samples), all_nan<S>(c.in, 2 * c.samples), zeros_like(poisoned)};
      poisoned.add_forward(all_nan<S>(c.in, 2 * c.samples), law_rank, cache, result.y);
      poisoned.add_backward(all_nan<S>(c.in, 2 * c.samples), all_nan<S>(c.out, 2 * c.samples), cache, result.gradients, workspace,
                            result.dx);
      seed_dropout(cache);
      result.y = MatrixX<S>::Zero(c.out, c.samples);
      result.dx = MatrixX<S>::Zero(c.in, c.samples);
      set_zero(poisoned, result.gradients);
      poisoned.add_forward(c.x, ranks, cache, result.y);
      poisoned.add_backward(c.x, c.dy, cache, result.gradients, workspace, result.dx);
      for_each_part(mix, [&](Index begin, Index n, RankSlice rank) {
        if (rank.active <= spoilt) check_same_outputs(result, clean, begin, n);
      });
      if constexpr (!couples_components<A>)
        CHECK(same_bits(component_values<A>(result.gradients, 0, spoilt), component_values<A>(clean.gradients, 0, spoilt)));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("an adapter frozen up to its rank passes gradient on and no component learns", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) { check_frozen_up_to_rank(c); });
}

TEMPLATE_LIST_TEST_CASE("an adapter cut to its first components is at every rank what it was at those", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    check_cut(c, [&](const A& cut, RankSlice left) {
      if constexpr (MergeableAdapter<A>) CHECK(same_bits(cut.delta(c.rank), c.subject.delta(left)));
    });
  });
}

TEMPLATE_LIST_TEST_CASE("an adapter is linear in its input", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  if constexpr (!MergeableAdapter<A>) return;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    const MatrixX<S> z = noise<S>(c.in, c.samples, 6);
    const MatrixX<S> sum = run(c.subject, c.x + z, c.dy, c.rank).y, apart = c.run().y + run(c.subject, z, c.dy, c.rank).y;
    CHECK(gap(in_double(sum), in_double(apart)) < rounding<S>);
    CHECK(same_bits(run(c.subject, MatrixX<S>(4 * c.x), c.dy, c.rank).y, MatrixX<S>(4 * c.run().y)));
    CHECK(same_bits(run(c.subject, c.x, MatrixX<S>(4 * c.dy), c.rank).dx, MatrixX<S>(4 * c.run().dx)));
  });
}

TEMPLATE_LIST_TEST_CASE("an adapter adds to y and dx and gradients", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    const auto clean = c.run();
    const MatrixX<S> y_before = noise<S>(c.out, c.samples, 6), dx_before = noise<S>(c.in, c.samples, 7);
    MatrixX<S> y = y_before, dx = dx_before;
    auto cache = fresh_cache<A>();
    typename A::Workspace workspace;
    auto before = zeros_like(c.subject), gradients = zeros_like(c.subject);
    randomize<A>(before, 5);
    randomize<A>(gradients, 5);
    c.subject.add_forward(c.x, c.rank, cache, y);
    c.subject.add_backward(c.x, c.dy, cache, gradients, workspace, dx);
    CHECK(gap(in_double(y), in_double<S>(y_before + clean.y)) < rounding<S>);
    CHECK(gap(in_double(dx), in_double<S>(dx_before + clean.dx)) < rounding<S>);
    const VectorX<S> sum = values<A>(before) + values<A>(clean.gradients);
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
    const auto clean = c.run();
    auto cache = fresh_cache<A>();
    typename A::Workspace workspace;
    auto gradients = zeros_like(c.subject);
    // A bigger call leaves NaN in every buffer of the cache and of the workspace.
    MatrixX<S> y = all_nan<S>(c.out, 2 * c.samples), dx = all_nan<S>(c.in, 2 * c.samples);
    c.subject.add_forward(all_nan<S>(c.in, 2 * c.samples), law_rank, cache, y);
    c.subject.add_backward(all_nan<S>(c.in, 2 * c.samples), all_nan<S>(c.out, 2 * c.samples), cache, gradients, workspace, dx);
    seed_dropout(cache);
    y = MatrixX<S>::Zero(c.out, c.samples);
    c.subject.add_forward(c.x, c.rank, cache, y);
    CHECK(same_bits(y, clean.y));
    for (int time = 0; time < 2; ++time) {
      set_zero(c.subject, gradients);
      dx = MatrixX<S>::Zero(c.in, c.samples);
      c.subject.add_backward(c.x, c.dy, cache, gradients, workspace, dx);
      CHECK(same_bits(dx, clean.dx));
      CHECK(same_bits(values<A>(gradients), values<A>(clean.gradients)));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("what other calls leave in a workspace reaches no backward of an adapter", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  for_each_adapter_case<A>([](const AdapterCase<A>& c) {
    const auto clean = c.run();
    auto cache = fresh_cache<A>();
    MatrixX<S> y = MatrixX<S>::Zero(c.out, c.samples);
    c.subject.add_forward(c.x, c.rank, cache, y);
    typename A::Workspace workspace;
    for (const Index samples : {Index{1}, 2 * c.samples}) {
      auto other_cache = fresh_cache<A>();
      auto other = zeros_like(c.subject), gradients = zeros_like(c.subject);
      MatrixX<S> other_y = all_nan<S>(c.out, samples), other_dx = all_nan<S>(c.in, samples), dx = MatrixX<S>::Zero(c.in, c.samples);
      c.subject.add_forward(all_nan<S>(c.in, samples), law_rank, other_cache, other_y);
      c.subject.add_backward(all_nan<S>(c.in, samples), all_nan<S>(c.out, samples), other_cache, other, workspace, other_dx);
      c.subject.add_backward(c.x, c.dy, cache, gradients, workspace, dx);
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
  const MatrixX<S> x = noise<S>(in, samples, 1), dy = noise<S>(out, samples, 2);
  std::vector<RankSlice> mix(samples, max_rank);
  std::fill(mix.begin() + many, mix.begin() + 360, RankSlice(17, 6));
  std::fill(mix.begin() + 360, mix.end(), RankSlice::none());
  for (const BatchRanks& ranks : {BatchRanks(max_rank), BatchRanks::per_sample(mix)}) {
    LawCount::add_case();
    const auto call = [&] { return run(adapter, x, dy, ranks); };
    const auto expected = call();
    for_each_threading(call, [&](const Result<A>& result, const std::string& where) {
      INFO(where);
      CHECK(result == expected);
    });
  }
}

TEMPLATE_LIST_TEST_CASE("an adapter refuses what does not fit and says what was expected and what came", "[laws]", AdaptersUnderTest) {
  using A = typename TestType::Type;
  using S = typename A::Scalar;
  const AdapterCase<A> c{true, 3};
  if (c.subject.max_rank() == 0) {  // nothing to fit: it looks at nothing and changes nothing
    LawCount::add_case();
    CHECK(c.run().y.isZero(0));
    return;
  }
  for (const bool dropping : {false, true}) {
    LawCount::add_case();
    typename A::Cache cache, unfilled;
    if (dropping) seed_dropout(cache);
    auto gradients = zeros_like(c.subject);
    MatrixX<S> y(c.out, c.samples), dx = MatrixX<S>::Zero(c.in, c.samples);
    y.setZero();
    const auto tall = [&](Index rows) { return noise<S>(rows + 1, c.samples, 1); };
    const auto wide = [&](Index rows) { return noise<S>(rows, c.samples + 1, 1); };
    MatrixX<S> tall_y = tall(c.out), wide_y = wide(c.out), tall_dx = tall(c.in), wide_dx = wide(c.in);
    typename A::Workspace workspace;
    const A& a = c.subject;
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
    CHECK_THROWS_SAYING(ShapeError, a.add_backward(c.x, c.dy, unfilled, gradients, workspace, dx), "add_backward", "cache", "add_forward",
                        "expected 0", "got 5");
    a.add_forward(c.x, 3, cache, y);
    CHECK_THROWS_SAYING(ShapeError, a.add_backward(c.x, tall(c.out), cache, gradients, workspace, dx), "add_backward", "rows of dy", "expected 7",
                        "got 8");
    CHECK_THROWS_SAYING(ShapeError, a.add_backward(c.x, wide(c.out), cache, gradients, workspace, dx), "add_backward", "samples in dy", "expected 5",
                        "got 6");
    CHECK_THROWS_SAYING(ShapeError, a.add_backward(c.x, c.dy, cache, gradients, workspace, tall_dx), "add_backward", "rows of dx", "expected 9",
                        "got 10");
    CHECK_THROWS_SAYING(ShapeError, a.add_backward(c.x, c.dy, cache, gradients, workspace, wide_dx), "add_backward", "samples in dx", "expected 5",
                        "got 6");
    auto other = zeros_like(make_adapter<A>(c.in + 1, c.out, law_rank, 1));
    if (const auto [expected, got] = first_unequal_shapes<A>(gradients, other); expected != got)
      CHECK_THROWS_SAYING(ShapeError, a.add_backward(c.x, c.dy, cache, other, workspace, dx), "gradient of", "zeros_like", expected, got);
    if (has_components(a)) {
      A cut = a;
      truncate(cut, 2);
      auto cut_gradients = zeros_like(cut);
      MatrixX<S> cut_y = MatrixX<S>::Zero(c.out, c.samples);
      typename A::Cache before;  // filled by the adapter before it was cut
      a.add_forward(c.x, 3, before, cut_y);
      CHECK_THROWS_SAYING(std::invalid_argument, cut.add_backward(c.x, c.dy, before, cut_gradients, workspace, dx), "cache", "max_rank = 2", "got 3");
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
