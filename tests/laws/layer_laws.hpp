#ifndef DYLORA_TESTS_LAWS_LAYER_LAWS_HPP
#define DYLORA_TESTS_LAWS_LAYER_LAWS_HPP

#include <algorithm>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/sequences.hpp"
#include "dylora/ranks/truncate.hpp"
#include "dylora/train/adamw.hpp"
#include "laws/laws.hpp"
#include "support/catch.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

/// What every layer obeys. The including file says before which ones: using LayersUnderTest = InFloatAndDouble<...>.
namespace dylora::test {

template <class L>
Result<L> run(const L& layer, const MatrixX<typename L::Scalar>& x, const MatrixX<typename L::Scalar>& dy, const BatchRanks& ranks,
              typename L::Cache cache = fresh_cache<L>()) {
  Result<L> result{layer.forward(x, ranks, cache), {}, zeros_like(layer)};
  result.dx = layer.backward(dy, cache, result.gradients);
  return result;
}

/// One layer to show a law on: a way to set its type up, fresh (B = 0) or trained (all at random), and a slice.
template <class L>
struct LayerCase {
  using S = typename L::Scalar;
  using Subject = L;

  int variant;
  bool trained;
  RankSlice rank;
  L subject = make<L>();
  MatrixX<S> x = noise<S>(subject.in_features(), MakeLayer<L>::samples, 1);
  MatrixX<S> dy = noise<S>(subject.out_features(), MakeLayer<L>::samples, 2);

  /// The same as another type.
  template <class M>
  M make() const {
    M made = MakeLayer<M>::make(variant, law_rank);
    if (trained) randomize<M>(made, 3);
    return made;
  }

  Result<L> run(const L& other, const BatchRanks& ranks) const { return test::run(other, x, dy, ranks); }
  Result<L> run() const { return run(subject, rank); }
  template <class D>
  Result<D> run_as() const {
    return test::run(make<D>(), in_double(x), in_double(dy), rank);
  }

  /// A layer whose adapter has the first components only.
  L truncated(Index max_rank) const {
    L shorter = MakeLayer<L>::make(variant, max_rank);
    copy_prefix(subject, shorter);
    return shorter;
  }
};

/// Shows a law on every way to set L up, fresh and trained, at every slice.
template <class L, class F>
void for_each_layer_case(F&& show) {
  for (int variant = 0; variant < MakeLayer<L>::variants; ++variant) {
    for (const bool trained : {false, true}) {
      for (const RankSlice rank : law_slices()) {
        INFO("variant " << variant << (trained ? ", trained, " : ", fresh, ") << describe(rank));
        LawCount::add_case();
        show(LayerCase<L>{variant, trained, rank});
      }
    }
  }
}

/// A batch of five sequences, which to a layer that knows none are nothing but their tokens, and a rank for each sequence.
template <class L>
struct MixedBatch {
  using S = typename L::Scalar;

  Sequences sequences{{2, 1, 3, 1, 2}};
  std::vector<RankSlice> mix;
  MatrixX<S> x, dy;

  MixedBatch(const L& layer, std::vector<RankSlice> mix_)
      : mix(std::move(mix_)), x(noise<S>(layer.in_features(), 9, 1)), dy(noise<S>(layer.out_features(), 9, 2)) {}

  BatchRanks ranks() const { return BatchRanks::per_sequence(sequences, mix); }

  /// Calls f(begin, part, rank) for each run of neighbouring sequences at one rank, where `part` are those sequences.
  template <class F>
  void for_each_part(F&& f) const {
    for (std::size_t first = 0, end = 0; first < mix.size(); first = end) {
      std::vector<Index> lengths;
      for (; end < mix.size() && mix[end] == mix[first]; ++end) lengths.push_back(sequences.length(static_cast<Index>(end)));
      f(sequences.begin(static_cast<Index>(first)), Sequences(lengths), mix[first]);
    }
  }
};

/// forward over these sequences, if the layer has any use for them.
template <class L>
MatrixX<typename L::Scalar> forward_over(const L& layer, ConstMatrixRef<typename L::Scalar> x, const Sequences& sequences,
                                        const BatchRanks& ranks, typename L::Cache& cache) {
  if constexpr (requires { layer.forward(x, sequences, ranks, cache); }) {
    return layer.forward(x, sequences, ranks, cache);
  } else {
    return layer.forward(x, ranks, cache);
  }
}
template <class A>
MatrixX<typename A::Scalar> forward_over(const Ragged<A>& layer, ConstMatrixRef<typename A::Scalar> x, const Sequences& sequences,
                                         const BatchRanks& ranks, typename A::Cache& cache) {
  return static_cast<const A&>(layer).forward(x, sequences, ranks, cache);
}

template <class L>
Result<L> run_over(const L& layer, const MixedBatch<L>& batch, const BatchRanks& ranks, typename L::Cache cache = fresh_cache<L>()) {
  Result<L> result{forward_over(layer, batch.x, batch.sequences, ranks, cache), {}, zeros_like(layer)};
  result.dx = layer.backward(batch.dy, cache, result.gradients);
  return result;
}

/// A forward and a backward that leave NaN in every buffer they use.
template <class L>
void backward_through_nan(const L& layer, Index samples, typename L::Cache& cache, typename L::Gradients& gradients,
                          typename L::Workspace& workspace) {
  using S = typename L::Scalar;
  MatrixX<S> dx(layer.in_features(), samples);
  (void)layer.forward(all_nan<S>(layer.in_features(), samples), law_rank, cache);
  layer.backward(all_nan<S>(layer.out_features(), samples), cache, gradients, workspace, dx);
}

/// Shows a law on every way to set L up, fresh and trained, whole and cut, at every mix of ranks.
template <class L, class F>
void for_each_mixed_layer_case(F&& show) {
  for (int variant = 0; variant < MakeLayer<L>::variants; ++variant) {
    for (const bool trained : {false, true}) {
      for (const Index components : {law_rank, Index{2}, Index{0}}) {
        LayerCase<L> c{variant, trained, law_rank};
        if (components < law_rank && !has_components(c.subject)) continue;
        truncate(c.subject, components);
        for (const std::vector<RankSlice>& mix : law_mixes()) {
          INFO("variant " << variant << (trained ? ", trained, " : ", fresh, ") << components << " components, mix "
                          << &mix - law_mixes().data());
          LawCount::add_case();
          show(c.subject, MixedBatch<L>(c.subject, mix));
        }
      }
    }
  }
}

TEMPLATE_LIST_TEST_CASE("a layer's backward is the derivative of its forward", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  for_each_layer_case<L>([](const LayerCase<L>& c) { check_backward_is_derivative<typename TestType::InDouble::Type>(c); });
}

TEMPLATE_LIST_TEST_CASE("a layer's forward equals its merged weights and merging leaves it as it was", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  using S = typename L::Scalar;
  for_each_layer_case<L>([](const LayerCase<L>& c) {
    if constexpr (is_mergeable<L>) {
      const VectorX<S> base = frozen_values(c.subject), parameters = values<L>(c.subject);
      const MatrixX<S> merged = Merged<L>(c.subject.merged(c.rank)).forward(c.x, RankSlice::none());
      CHECK(gap(in_double(merged), in_double(c.subject.forward(c.x, c.rank))) < rounding<S>);
      CHECK(same_bits(frozen_values(c.subject), base));
      CHECK(same_bits(values<L>(c.subject), parameters));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("a layer without its adapter or with B = 0 is its base bit for bit", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  for_each_layer_case<L>([](const LayerCase<L>& c) {
    const auto base = run(without_adapter(c.subject), c.x, c.dy, RankSlice::none());
    const auto none = c.run(c.subject, RankSlice::none());
    CHECK(same_bits(none.y, base.y));
    CHECK(same_bits(none.dx, base.dx));
    CHECK(values<L>(none.gradients).isZero(0));
    check_nothing_trained<L>(none.gradients);
    if (!c.trained) {
      const auto fresh = c.run();
      CHECK(same_bits(fresh.y, base.y));
      CHECK(same_bits(fresh.dx, base.dx));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("a layer at rank b is the layer truncated to b bit for bit", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  for_each_layer_case<L>([](const LayerCase<L>& c) {
    const L truncated = c.truncated(c.rank.active);
    check_rank_is_truncation(c, truncated);
    CHECK(same_bits(c.subject.forward(c.x, c.rank), truncated.forward(c.x, c.rank)));
  });
}

TEMPLATE_LIST_TEST_CASE("components past the rank are neither read nor written by a layer", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  using S = typename L::Scalar;
  for_each_layer_case<L>([](const LayerCase<L>& c) {
    check_unread_past_rank(c);

    // Gradients of what did not take part are not even read: garbage stays what it is.
    auto cache = fresh_cache<L>();
    (void)c.subject.forward(c.x, c.rank, cache);
    auto gradients = zeros_like(c.subject);
    fill_components<L>(gradients, nan<S>, c.rank.active);
    fill_components<L>(gradients, nan<S>, 0, c.rank.trainable_from);
    (void)c.subject.backward(c.dy, cache, gradients);
    CHECK(same_bits(component_values<L>(gradients, c.rank.trainable_from, c.rank.active),
                    component_values<L>(c.run().gradients, c.rank.trainable_from, c.rank.active)));
  });
}

TEMPLATE_LIST_TEST_CASE("a frozen prefix of a layer gets no gradient and what is trained gets that of nested mode", "[laws]",
                        LayersUnderTest) {
  using L = typename TestType::Type;
  for_each_layer_case<L>([](const LayerCase<L>& c) {
    const Index b = c.rank.active, t = c.rank.trainable_from;
    check_frozen_prefix(c);
    const auto frozen = c.run();
    if (values<L>(c.subject).size() > 0) {
      CHECK_FALSE((component_values<L>(frozen.gradients, t, b).isZero(0) && shared_values<L>(frozen.gradients).isZero(0)));
      std::string expected;
      for (Index i = 0; i < law_rank; ++i) expected += i >= t && i < b ? '1' : '0';
      for (const std::string& trained : trained_components<L>(frozen.gradients)) CHECK((trained == expected || trained.empty()));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("a layer's batch of several ranks equals its parts run apart bit for bit", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  using S = typename L::Scalar;
  for_each_mixed_layer_case<L>([](const L& layer, const MixedBatch<L>& batch) {
    Result<L> apart{MatrixX<S>(layer.out_features(), batch.x.cols()), MatrixX<S>(layer.in_features(), batch.x.cols()), zeros_like(layer)};
    batch.for_each_part([&](Index begin, const Sequences& part, RankSlice rank) {
      typename L::Cache cache;
      const Index n = part.tokens();
      apart.y.middleCols(begin, n) = forward_over(layer, batch.x.middleCols(begin, n), part, rank, cache);
      apart.dx.middleCols(begin, n) = layer.backward(batch.dy.middleCols(begin, n), cache, apart.gradients);
    });
    check_batch_is_its_parts(run_over(layer, batch, batch.ranks(), {}), apart);
  });
}

TEMPLATE_LIST_TEST_CASE("what a layer drops and gives for a sequence does not depend on the ranks of the others", "[laws]",
                        LayersUnderTest) {
  using L = typename TestType::Type;
  for_each_mixed_layer_case<L>([](const L& layer, const MixedBatch<L>& batch) {
    const auto mixed = run_over(layer, batch, batch.ranks());
    batch.for_each_part([&](Index begin, const Sequences& part, RankSlice rank) {
      check_same_outputs(mixed, run_over(layer, batch, rank), begin, part.tokens());
    });
  });
}

TEMPLATE_LIST_TEST_CASE("a component reaches no sequence of a layer's batch whose rank is without it", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  using S = typename L::Scalar;
  for_each_mixed_layer_case<L>([](const L& layer, const MixedBatch<L>& batch) {
    const auto clean = run_over(layer, batch, batch.ranks());
    for (const Index spoilt : {0, 1, 3, 5}) {
      L poisoned = layer;
      fill_components<L>(poisoned, nan<S>, spoilt);
      // And NaN from before in every buffer, also where the ranks of this batch leave it unwritten.
      auto cache = fresh_cache<L>();
      typename L::Workspace workspace;
      auto gradients = zeros_like(poisoned);
      backward_through_nan(poisoned, 2 * batch.x.cols(), cache, gradients, workspace);
      seed_dropout(cache);
      Result<L> result{forward_over(poisoned, batch.x, batch.sequences, batch.ranks(), cache), batch.x, zeros_like(poisoned)};
      poisoned.backward(batch.dy, cache, gradients, workspace, result.dx);
      batch.for_each_part([&](Index begin, const Sequences& part, RankSlice rank) {
        if (rank.active <= spoilt) check_same_outputs(result, clean, begin, part.tokens());
      });
    }
  });
}

TEMPLATE_LIST_TEST_CASE("a layer frozen up to its rank passes gradient on and no component learns", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  for_each_layer_case<L>([](const LayerCase<L>& c) {
    const auto frozen = check_frozen_up_to_rank(c);
    if (c.trained) {
      L layer = c.subject;
      AdamW optimizer(layer, {.lr = 0.1, .weight_decay = 0.1});
      optimizer.step(layer, frozen.gradients);
      CHECK(same_bits(component_values<L>(layer, 0), component_values<L>(c.subject, 0)));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("a layer cut to its first components is at every rank what it was at those", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  for_each_layer_case<L>([](const LayerCase<L>& c) {
    check_cut(c, [&](const L& cut, RankSlice left) {
      if constexpr (is_mergeable<L>)
        CHECK(same_bits(frozen_values(Merged<L>(cut.merged(c.rank))), frozen_values(Merged<L>(c.subject.merged(left)))));
      CHECK(same_bits(cut.forward(c.x, c.rank), c.subject.forward(c.x, left)));
    });
  });
}

TEMPLATE_LIST_TEST_CASE("a layer refuses ranks that are for another number of columns and a rank too high among others", "[laws]",
                        LayersUnderTest) {
  using L = typename TestType::Type;
  using S = typename L::Scalar;
  for (int variant = 0; variant < MakeLayer<L>::variants; ++variant) {
    LawCount::add_case();
    const LayerCase<L> c{variant, true, 3};
    const Index n = c.x.cols();
    const auto ranks = [](Index columns, RankSlice last) {
      std::vector<RankSlice> each(static_cast<std::size_t>(columns), 2);
      each.back() = last;
      return BatchRanks::per_sample(each);
    };
    const auto expected = "expected " + std::to_string(n);
    const MatrixX<S> before = noise<S>(c.subject.out_features(), n, 3);
    MatrixX<S> y = before;
    auto gradients = zeros_like(c.subject);
    const auto refuses = [&]<class Error>(Error, const BatchRanks& refused, const std::string& what, const std::string& should,
                                          const std::string& got) {
      auto cache = fresh_cache<L>();
      (void)c.subject.forward(c.x, 3, cache);
      CHECK_THROWS_SAYING(Error, c.subject.forward(c.x, refused), "forward", what, should, got);
      CHECK_THROWS_SAYING(Error, c.subject.forward(c.x, refused, cache), "forward", what, should, got);
      CHECK_THROWS_SAYING(ShapeError, c.subject.backward(c.dy, cache, gradients), "cache", "expected 0");
      (void)c.subject.forward(c.x, 3, cache);
      CHECK_THROWS_SAYING(Error, c.subject.forward(c.x, refused, cache, y), "forward", what, should, got);
      CHECK_THROWS_SAYING(ShapeError, c.subject.backward(c.dy, cache, gradients), "cache", "expected 0");
    };
    refuses(ShapeError(""), ranks(n + 1, 1), "columns that the ranks are for", expected, "got " + std::to_string(n + 1));
    refuses(ShapeError(""), ranks(n - 1, 1), "columns that the ranks are for", expected, "got " + std::to_string(n - 1));
    if (c.subject.max_rank() > 0) refuses(std::invalid_argument(""), ranks(n, 6), "rank", "max_rank = 5", "got 6");
    CHECK(same_bits(y, before));
    CHECK(values<L>(gradients).isZero(0));
    CHECK(c.subject.forward(c.x, ranks(n, 5)).allFinite());
  }
}

TEMPLATE_LIST_TEST_CASE("a layer overwrites y and dx and adds to gradients", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  using S = typename L::Scalar;
  for_each_layer_case<L>([](const LayerCase<L>& c) {
    const auto clean = c.run();
    auto cache = fresh_cache<L>();
    MatrixX<S> y = all_nan<S>(c.subject.out_features(), c.x.cols()), dx = all_nan<S>(c.subject.in_features(), c.x.cols());
    c.subject.forward(c.x, c.rank, cache, y);
    CHECK(same_bits(y, clean.y));

    auto before = zeros_like(c.subject), gradients = zeros_like(c.subject);
    randomize<L>(before, 5);
    randomize<L>(gradients, 5);
    c.subject.backward(c.dy, cache, gradients, dx);
    CHECK(same_bits(dx, clean.dx));
    const VectorX<S> sum = values<L>(before) + values<L>(clean.gradients);
    CHECK(gap(in_double<S>(values<L>(gradients)), in_double<S>(sum)) < rounding<S>);
  });
}

TEMPLATE_LIST_TEST_CASE("a layer's backward without dx has the same gradients bit for bit", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  if constexpr (requires(const L& layer, typename L::Cache& cache, typename L::Gradients& gradients, MatrixX<typename L::Scalar>& dy) {
                  layer.backward(dy, cache, gradients, no_dx);
                }) {
    for_each_layer_case<L>([](const LayerCase<L>& c) {
      const auto clean = c.run();
      auto cache = fresh_cache<L>();
      typename L::Workspace workspace;
      auto gradients = zeros_like(c.subject);
      backward_through_nan(c.subject, 2 * c.x.cols(), cache, gradients, workspace);
      seed_dropout(cache);
      (void)c.subject.forward(c.x, c.rank, cache);
      set_zero(c.subject, gradients);
      c.subject.backward(c.dy, cache, gradients, workspace, no_dx);
      CHECK(same_bits(values<L>(gradients), values<L>(clean.gradients)));
      set_zero(c.subject, gradients);
      c.subject.backward(c.dy, cache, gradients, no_dx);
      CHECK(same_bits(values<L>(gradients), values<L>(clean.gradients)));
    });
  }
}

TEMPLATE_LIST_TEST_CASE("a layer whose caller keeps x has none left of an earlier forward", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  if constexpr (requires(const L& layer, typename L::Cache& cache, MatrixX<typename L::Scalar>& x) { layer.apply(x, 1, cache, x); }) {
    for_each_layer_case<L>([](const LayerCase<L>& c) {
      auto cache = fresh_cache<L>();
      MatrixX<typename L::Scalar> y = c.subject.forward(c.x, c.rank, cache);
      c.subject.apply(c.x, c.rank, cache, y);
      auto gradients = zeros_like(c.subject);
      CHECK_THROWS_AS(c.subject.backward(c.dy, cache, gradients), ShapeError);
      CHECK(values<L>(gradients).isZero(0));
    });
  }
}

TEMPLATE_LIST_TEST_CASE("a layer's cache is overwritten by each forward and read by any number of backward", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  using S = typename L::Scalar;
  for_each_layer_case<L>([](const LayerCase<L>& c) {
    const auto clean = c.run();
    typename L::Cache cache;
    typename L::Workspace workspace;
    auto gradients = zeros_like(c.subject);
    // A bigger call leaves NaN in every buffer of the cache and of the workspace.
    backward_through_nan(c.subject, 2 * c.x.cols(), cache, gradients, workspace);
    seed_dropout(cache);
    CHECK(same_bits(c.subject.forward(c.x, c.rank, cache), clean.y));
    for (int time = 0; time < 2; ++time) {
      set_zero(c.subject, gradients);
      MatrixX<S> dx = all_nan<S>(c.x.rows(), c.x.cols());
      c.subject.backward(c.dy, cache, gradients, workspace, dx);
      CHECK(same_bits(dx, clean.dx));
      CHECK(same_bits(values<L>(gradients), values<L>(clean.gradients)));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("what other calls leave in a workspace reaches no backward of a layer", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  using S = typename L::Scalar;
  for_each_layer_case<L>([](const LayerCase<L>& c) {
    const auto clean = c.run();
    auto cache = fresh_cache<L>();
    (void)c.subject.forward(c.x, c.rank, cache);
    typename L::Workspace workspace;
    for (const Index samples : {c.x.cols() - 1, 2 * c.x.cols()}) {
      auto other_cache = fresh_cache<L>();
      auto other = zeros_like(c.subject), gradients = zeros_like(c.subject);
      MatrixX<S> dx = all_nan<S>(c.x.rows(), c.x.cols());
      backward_through_nan(c.subject, samples, other_cache, other, workspace);
      c.subject.backward(c.dy, cache, gradients, workspace, dx);
      CHECK(same_bits(dx, clean.dx));
      CHECK(same_bits(values<L>(gradients), values<L>(clean.gradients)));
    }
  });
}

TEMPLATE_LIST_TEST_CASE("inference is deterministic and equals the training forward that drops nothing", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  for_each_layer_case<L>([](const LayerCase<L>& c) {
    typename L::Cache cache;
    const auto y = c.subject.forward(c.x, c.rank);
    CHECK(same_bits(c.subject.forward(c.x, c.rank, cache), y));
    CHECK(same_bits(c.subject.forward(c.x, c.rank), y));
  });
}

TEMPLATE_LIST_TEST_CASE("training changes the trained components and never the base", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  using S = typename L::Scalar;
  for_each_layer_case<L>([](const LayerCase<L>& c) {
    L layer = c.subject;
    AdamW optimizer(layer, {.lr = 0.1, .weight_decay = 0.1});
    optimizer.step(layer, c.run().gradients);
    CHECK(same_bits(frozen_values(layer), frozen_values(c.subject)));
    const Index b = c.rank.active, t = c.rank.trainable_from;
    CHECK(same_bits(component_values<L>(layer, 0, t), component_values<L>(c.subject, 0, t)));
    CHECK(same_bits(component_values<L>(layer, b), component_values<L>(c.subject, b)));
    const VectorX<S> before = component_values<L>(c.subject, t, b), after = component_values<L>(layer, t, b);
    if (before.size() > 0) CHECK((before.array() != after.array()).any());
    if (c.trained) CHECK((before.array() != after.array()).all());
  });
}

TEMPLATE_LIST_TEST_CASE("threads share one const layer at ranks of their own", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  for (int variant = 0; variant < MakeLayer<L>::variants; ++variant) {
    LawCount::add_case();
    const LayerCase<L> c{variant, true, 1};
    std::vector<Result<L>> serial, shared(law_slices().size());
    for (const RankSlice rank : law_slices()) serial.push_back(run(c.subject, c.x, c.dy, rank));
    std::vector<std::thread> pool;
    for (std::size_t i = 0; i < shared.size(); ++i) {
      pool.emplace_back([&, i] {
        for (int time = 0; time < 3; ++time) shared[i] = run(c.subject, c.x, c.dy, law_slices()[i]);
      });
    }
    for (std::thread& thread : pool) thread.join();
    for (std::size_t i = 0; i < shared.size(); ++i) CHECK(shared[i] == serial[i]);
  }
}

TEMPLATE_LIST_TEST_CASE("a layer refuses what does not fit and says what was expected and what came", "[laws]", LayersUnderTest) {
  using L = typename TestType::Type;
  using S = typename L::Scalar;
  for (int variant = 0; variant < MakeLayer<L>::variants; ++variant) {
    LawCount::add_case();
    const LayerCase<L> c{variant, true, 3};
    const L& layer = c.subject;
    const Index in = layer.in_features(), out = layer.out_features(), n = c.x.cols();
    const std::string got = "got " + std::to_string(n + 1);
    typename L::Cache cache, unfilled;
    auto gradients = zeros_like(layer);
    MatrixX<S> y(out, n), dx(in, n);
    const auto expected = [](Index size) { return "expected " + std::to_string(size); };

    CHECK_THROWS_SAYING(ShapeError, layer.forward(noise<S>(in + 1, n, 1), 3), "forward", "rows of x", expected(in),
                        "got " + std::to_string(in + 1));
    CHECK_THROWS_SAYING(ShapeError, layer.forward(MatrixX<S>(in, 0), 3, cache), "forward", "x", "expected at least one", "empty batch");
    CHECK_THROWS_SAYING(ShapeError, layer.forward(MatrixX<S>(in, 0), 3), "forward", "x", "expected at least one", "empty batch");
    MatrixX<S> tall(out + 1, n), wide(out, n + 1);
    CHECK_THROWS_SAYING(ShapeError, layer.forward(c.x, 3, cache, tall), "forward", "rows of y", expected(out),
                        "got " + std::to_string(out + 1));
    CHECK_THROWS_SAYING(ShapeError, layer.forward(c.x, 3, cache, wide), "forward", "samples in y", expected(n), got);
    CHECK_THROWS_SAYING(std::invalid_argument, layer.forward(c.x, 0), "rank", "expected at least 1", "none()", "got 0");
    CHECK_THROWS_SAYING(std::invalid_argument, layer.forward(c.x, -2, cache), "rank", "expected at least 1", "got -2");
    if (layer.max_rank() > 0) {
      CHECK_THROWS_SAYING(std::invalid_argument, layer.forward(c.x, law_rank + 1), "rank", "max_rank = 5", "got 6");
      if constexpr (is_mergeable<L>)
        CHECK_THROWS_SAYING(std::invalid_argument, layer.merged(law_rank + 1), "rank", "max_rank = 5", "got 6");
    }

    CHECK_THROWS_SAYING(ShapeError, layer.backward(c.dy, unfilled, gradients), "backward", "dy", "cache", "expected 0",
                        "got " + std::to_string(n));
    CHECK_THROWS_SAYING(ShapeError, layer.backward(MatrixX<S>(out, 0), unfilled, gradients), "backward", "dy", "empty batch");
    layer.forward(c.x, 3, cache, y);
    CHECK_THROWS_SAYING(ShapeError, layer.backward(noise<S>(out + 1, n, 1), cache, gradients), "backward", "rows of dy", expected(out));
    CHECK_THROWS_SAYING(ShapeError, layer.backward(noise<S>(out, n + 1, 1), cache, gradients), "backward", "dy", expected(n), got);
    MatrixX<S> tall_dx(in + 1, n), wide_dx(in, n + 1);
    CHECK_THROWS_SAYING(ShapeError, layer.backward(c.dy, cache, gradients, tall_dx), "backward", "rows of dx", expected(in));
    CHECK_THROWS_SAYING(ShapeError, layer.backward(c.dy, cache, gradients, wide_dx), "backward", "samples in dx", expected(n), got);
    if (has_components(layer)) {
      typename L::Gradients empty;
      for_each_parameter([](Parameter, const auto&, auto&) {}, layer, empty);  // where it is a list: of as many, each empty
      CHECK_THROWS_SAYING(ShapeError, layer.backward(c.dy, cache, empty), "gradient of", "_", "zeros_like", "expected", "got 0 × ");
      // The right shape, but nowhere to note which components were trained.
      for_each_parameter([](Parameter, const auto& p, auto& g) { g.setZero(p.rows(), p.cols()); }, layer, empty);
      CHECK_THROWS_SAYING(ShapeError, layer.backward(c.dy, cache, empty), "gradient of", "_", "zeros_like", "with 5 rank components",
                          "with 0 rank components");
    }
    CHECK(values<L>(gradients).isZero(0));
    // A cache that another layer filled: of other components, or of another shape.
    if (layer.max_rank() > 0) {
      const L smaller = c.truncated(2);
      auto its_gradients = zeros_like(smaller);
      CHECK_THROWS_SAYING(std::invalid_argument, smaller.backward(c.dy, cache, its_gradients), "cache", "max_rank = 2", "got 3");
      CHECK(values<L>(its_gradients).isZero(0));
    }
    // A refused forward leaves a cache that no backward accepts, rather than one that is half new and half old.
    CHECK_THROWS_SAYING(ShapeError, layer.forward(c.x, 2, cache, tall), "rows of y");
    CHECK_THROWS_SAYING(ShapeError, layer.backward(c.dy, cache, gradients), "cache", "expected 0");
  }
}

}  // namespace dylora::test

#endif
