#include "dylora/linalg/parallel.hpp"

#include <atomic>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "dylora/adapters/stacked.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/sequences.hpp"
#include "dylora/layers/attention/attention.hpp"
#include "dylora/layers/attention/merged.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/ranks/groups.hpp"
#include "dylora/ranks/plan.hpp"
#include "dylora/ranks/sampler.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/loss.hpp"
#include "dylora/train/train_step.hpp"
#include "support/catch.hpp"
#include "support/make.hpp"
#include "support/threads.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

/// f gives the same bits however threads are used.
template <class F>
void check_same_bits(F&& f) {
  const auto expected = f();
  REQUIRE(expected.size() > 0);
  for_each_threading(f, [&](const auto& got, const std::string& where) {
    INFO(where);
    CHECK(same_bits(got, expected));
  });
}

template <class L, class Forward>
VectorX<typename L::Scalar> outputs_and_gradients(const L& layer, const MatrixX<typename L::Scalar>& dy, Forward&& forward) {
  using S = typename L::Scalar;
  typename L::Cache cache;
  auto gradients = zeros_like(layer);
  const MatrixX<S> y = forward(cache), dx = layer.backward(dy, cache, gradients);
  return joined<S>({y.reshaped(), dx.reshaped(), values<L>(gradients)});
}

template <class S>
Attention<S> big_attention(Index features, Index max_rank) {
  const auto projection = [&](Index out, std::uint64_t seed) { return MakeLayer<Linear<S>>::make(features, out, true, max_rank, seed); };
  Attention<S> attention(projection(features, 1), projection(features / 2, 4), projection(features / 2, 7), projection(features, 10),
                         {.heads = 4, .key_value_heads = 2});
  randomize<Attention<S>>(attention, 3);
  return attention;
}

/// 200 steps of DyLoRA with AdamW, in turn two micro-batches at ranks of their own and one batch of several ranks, each with its share of
/// the sequences; what the losses and the parameters were.
template <class L, class Forward>
VectorX<float> train(L layer, Index max_rank, const Sequences& sequences, Forward&& forward) {
  Rng rng(6);
  const Index samples = sequences.tokens();
  const MatrixX<float> x = noise<float>(layer.in_features(), samples, 4), target = noise<float>(layer.out_features(), samples, 5);
  auto gradients = zeros_like(layer);
  typename L::Cache cache;
  MatrixX<float> y(target.rows(), samples), dy = y, dx(x.rows(), samples);
  AdamW optimizer(layer, {.lr = 1e-2, .weight_decay = 0.01, .max_norm = 1});
  const auto pass = [&](const BatchRanks& ranks, double weight) {
    forward(layer, x, ranks, cache, y);
    const double value = mse<float>(y, target, dy, weight);
    layer.backward(dy, cache, gradients, dx);
    return value;
  };
  VectorX<float> losses(200);
  for (Index step = 0; step < losses.size(); ++step) {
    if (step % 2 == 0) {
      losses[step] = static_cast<float>(train_step(layer, optimizer, gradients, FreshRanks(UniformRank{1, max_rank}, 2)(step, rng),
                                                   [&](Index, RankSlice rank, double weight) { return pass(rank, weight); }));
    } else {
      const BatchRanks ranks = batch_ranks(divide_sequences(Sandwich(1, max_rank)(step, rng), sequences.count()), sequences);
      losses[step] = static_cast<float>(train_step(layer, optimizer, gradients, [&] { return pass(ranks, 1); }));
    }
  }
  return joined<float>({losses, values<L>(layer)});
}

}  // namespace

// Sizes are past the threshold for threads, and no multiple of a register tile or of the depth block.

TEMPLATE_TEST_CASE("a linear layer gives the same bits for any number of threads", "", float, double) {
  using S = TestType;
  using L = Linear<S>;
  L layer = MakeLayer<L>::make(530, 300, true, 37, 1);
  randomize<L>(layer, 2);
  const MatrixX<S> x = noise<S>(530, 70, 3), dy = noise<S>(300, 70, 4);
  const BatchRanks mixed = BatchRanks::per_sequence(Sequences({31, 1, 20, 18}), {37, RankSlice::none(), {19, 18}, 1});
  for (const BatchRanks& ranks : {BatchRanks(1), BatchRanks(19, 18), BatchRanks(37), mixed}) {
    check_same_bits([&] { return outputs_and_gradients(layer, dy, [&](auto& cache) { return layer.forward(x, ranks, cache); }); });
  }
}

TEMPLATE_TEST_CASE("a wide batch gives the same bits for any number of threads", "", float, double) {
  using S = TestType;
  using L = Linear<S, LowRank<S>, WeightView<S, RowMatrix<S>>>;
  L layer = MakeLayer<L>::make(61, 47, false, 5, 1);
  randomize<L>(layer, 2);
  const MatrixX<S> x = noise<S>(61, 1037, 3), dy = noise<S>(47, 1037, 4);
  const BatchRanks mixed = BatchRanks::per_sequence(Sequences({600, 1, 300, 136}), {3, 5, RankSlice::none(), {4, 3}});
  for (const BatchRanks& ranks : {BatchRanks(3), mixed}) {
    check_same_bits([&] { return outputs_and_gradients(layer, dy, [&](auto& cache) { return layer.forward(x, ranks, cache); }); });
  }
}

TEMPLATE_TEST_CASE("a few tokens give the same bits for any number of threads", "", float, double) {
  using S = TestType;
  const auto check = [](const auto& layer) {
    using L = std::remove_cvref_t<decltype(layer)>;
    for (const Index tokens : {1, 3}) {
      const MatrixX<S> x = noise<S>(1030, tokens, 3), dy = noise<S>(700, tokens, 4);
      for (const Index rank : {1, 5}) {
        check_same_bits([&] { return outputs_and_gradients<L>(layer, dy, [&](auto& cache) { return layer.forward(x, rank, cache); }); });
      }
    }
  };
  auto column_major = MakeLayer<Linear<S>>::make(1030, 700, true, 5, 1);
  randomize<Linear<S>>(column_major, 2);
  check(column_major);
  using RowMajor = Linear<S, LowRank<S>, WeightView<S, RowMatrix<S>>>;
  auto row_major = MakeLayer<RowMajor>::make(1030, 700, true, 5, 1);
  randomize<RowMajor>(row_major, 2);
  check(row_major);
}

TEMPLATE_TEST_CASE("dot products give the same bits for any number of threads", "", float, double) {
  using S = TestType;
  const RowMatrix<S> lhs = noise<S>(16, 530, 1);
  const MatrixX<S> rhs = noise<S>(530, 70, 2);
  check_same_bits([&] {
    MatrixX<S> dst(16, 70);
    set_dot_products(dst, lhs, rhs);
    return VectorX<S>(dst.reshaped());
  });
}

TEST_CASE("a large buffer takes over every element on any number of threads") {
  const MatrixX<float> source = noise<float>(701, 811, 1);
  check_same_bits([&] {
    Buffer<float> buffer;
    buffer.assign(source);
    CHECK(same_bits(MatrixX<float>(buffer.view()), source));
    return VectorX<float>(buffer.view().reshaped());
  });
}

TEMPLATE_TEST_CASE("an attention gives the same bits for any number of threads", "", float, double) {
  using S = TestType;
  const Sequences sequences({70, 1, 131, 64});
  const MatrixX<S> x = noise<S>(60, sequences.tokens(), 3), dy = noise<S>(60, sequences.tokens(), 4);
  const BatchRanks mixed = BatchRanks::per_sequence(sequences, {7, RankSlice::none(), {4, 3}, 1});
  const auto check = [&](const auto& attention) {
    for (const BatchRanks& ranks : {BatchRanks(1), BatchRanks(4, 3), BatchRanks(7), mixed}) {
      check_same_bits(
          [&] { return outputs_and_gradients(attention, dy, [&](auto& cache) { return attention.forward(x, sequences, ranks, cache); }); });
    }
  };
  check(big_attention<S>(60, 7));

  using Slices = Linear<S, Stacked<LowRank<S>>>;
  MergedAttention<S, Slices> merged(MakeLayer<Slices>::make(60, 120, true, 7, 1), MakeLayer<Linear<S>>::make(60, 60, true, 7, 4),
                                    {.heads = 4, .key_value_heads = 2});
  randomize<MergedAttention<S, Slices>>(merged, 3);
  check(merged);
}

TEST_CASE("a cross entropy gives the same bits for any number of threads") {
  const MatrixX<float> logits = noise<float>(300, 530, 1);
  std::vector<Index> targets;
  for (Index i = 0; i < 530; ++i) targets.push_back(i % 300);
  check_same_bits([&] {
    const auto loss = cross_entropy<float>(logits, targets);
    return joined<float>({loss.gradient.reshaped(), VectorX<float>::Constant(1, static_cast<float>(loss.value))});
  });
}

TEST_CASE("training a linear layer gives the same bits for any number of threads") {
  using L = Linear<float>;
  const Sequences groups({20, 30, 15, 5});
  const auto forward = [](const L& layer, const auto& x, const BatchRanks& ranks, auto& cache, auto& y) {
    layer.forward(x, ranks, cache, y);
  };
  check_same_bits([&] { return train(MakeLayer<L>::make(90, 83, true, 6, 1), 6, groups, forward); });
}

TEST_CASE("training an attention gives the same bits for any number of threads") {
  using L = Attention<float>;
  const Sequences sequences({95, 1, 23, 40});
  const auto forward = [&](const L& layer, const auto& x, const BatchRanks& ranks, auto& cache, auto& y) {
    layer.forward(x, sequences, ranks, cache, y);
  };
  check_same_bits([&] { return train(big_attention<float>(24, 6), 6, sequences, forward); });
}

TEST_CASE("ranges cover everything once and begin at multiples of the grain") {
  const auto ranges = [](Index size, Index grain, double work) {
    std::mutex mutex;
    std::vector<std::pair<Index, Index>> result;
    for_each_range(size, grain, work, [&](Index begin, Index end) {
      const std::lock_guard lock(mutex);
      result.emplace_back(begin, end);
    });
    std::sort(result.begin(), result.end());
    return result;
  };
  using Ranges = std::vector<std::pair<Index, Index>>;
  CHECK(ranges(100, 16, 0) == Ranges{{0, 100}});
#ifdef _OPENMP
  for (const int threads : {1, 2, 3, 8}) {
    const Ranges split = with_threads(threads, [&] { return ranges(100, 16, 1e6); });
    REQUIRE(split.size() == static_cast<std::size_t>(std::min(threads, 7)));  // 7 grains, and a team is worth its start
    Index covered = 0;
    for (const auto& [begin, end] : split) {
      CHECK(begin == covered);
      CHECK(begin % 16 == 0);
      CHECK(end > begin);
      covered = end;
    }
    CHECK(covered == 100);
  }
  for (const Ranges& split : with_threads(8, [&] { return inside_team(2, [&] { return ranges(100, 16, 1e6); }); }))
    CHECK(split == Ranges{{0, 100}});
#endif
}

TEST_CASE("every task runs once") {
  for (const double work : {0.0, 1e6}) {
    std::vector<std::atomic<int>> runs(1000);
    for_each_task(1000, work, [&](Index i) { ++runs[static_cast<std::size_t>(i)]; });
    for (const auto& count : runs) CHECK(count == 1);
  }
  for_each_task(0, 1e6, [](Index) { FAIL("there is no task"); });
}

#ifdef _OPENMP
TEST_CASE("the library starts no team inside one of the caller's and leaves the settings of OpenMP alone") {
  const int threads = omp_get_max_threads(), levels = omp_get_max_active_levels(), dynamic = omp_get_dynamic();
  std::atomic<int> deepest = 0;
#pragma omp parallel num_threads(2)
  for_each_task(8, 1e6, [&](Index) { deepest = std::max<int>(deepest, omp_get_active_level()); });
  CHECK(deepest == 1);
  CHECK(omp_get_max_threads() == threads);
  CHECK(omp_get_max_active_levels() == levels);
  CHECK(omp_get_dynamic() == dynamic);
}
#endif

}  // namespace dylora::test
