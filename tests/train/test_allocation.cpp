#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <span>
#include <vector>

#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/sequences.hpp"
#include "dylora/layers/conv2d.hpp"
#include "dylora/layers/layer.hpp"
#include "dylora/methods/chain/chain.hpp"
#include "dylora/methods/dora/dora_linear.hpp"
#include "dylora/methods/lora_flow/flow.hpp"
#include "dylora/methods/multilora.hpp"
#include "dylora/methods/nola/nola.hpp"
#include "dylora/methods/pissa/offset_low_rank.hpp"
#include "dylora/methods/reslora/stack.hpp"
#include "dylora/ranks/groups.hpp"
#include "dylora/ranks/plan.hpp"
#include "dylora/ranks/sampler.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/loss.hpp"
#include "dylora/train/train_step.hpp"
#include "support/catch.hpp"
#include "support/make.hpp"
#include "support/threads.hpp"

/// Every request for heap memory is counted by standing in front of glibc's own functions: Eigen's and operator new's end there too. The
/// sanitizers stand there themselves, and other C libraries have no such way around, so there this file tests nothing and says so.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define DYLORA_TESTS_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define DYLORA_TESTS_SANITIZED
#endif
#endif

#if defined(__GLIBC__) && !defined(DYLORA_TESTS_SANITIZED)

namespace {

std::atomic<std::size_t> requests = 0, bytes = 0, largest = 0;

void note(std::size_t size) {
  ++requests;
  bytes += size;
  std::size_t before = largest;
  while (before < size && !largest.compare_exchange_weak(before, size)) {}
}

}  // namespace

extern "C" {
void* __libc_malloc(std::size_t) noexcept;
void* __libc_calloc(std::size_t, std::size_t) noexcept;
void* __libc_realloc(void*, std::size_t) noexcept;
void* __libc_memalign(std::size_t, std::size_t) noexcept;

void* malloc(std::size_t size) noexcept {
  note(size);
  return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) noexcept {
  note(count * size);
  return __libc_calloc(count, size);
}
void* realloc(void* memory, std::size_t size) noexcept {
  note(size);
  return __libc_realloc(memory, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  note(size);
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** memory, std::size_t alignment, std::size_t size) noexcept {
  note(size);
  *memory = __libc_memalign(alignment, size);
  return *memory == nullptr ? 12 : 0;  // ENOMEM
}
}

namespace dylora::test {

namespace {

struct Heap {
  std::size_t requests, bytes, largest;
};

/// What f() asked the heap for.
template <class F>
Heap heap_of(F&& f) {
  ::requests = ::bytes = ::largest = 0;
  f();
  return {::requests, ::bytes, ::largest};
}

/// Runs `step` until every buffer has met its largest shape, and then looks. One thread: which member of a team a task meets first, and so
/// when that member's packing memory grows, is up to the scheduler.
template <class Step>
Heap steady(Step&& step) {
  const auto run = [&] {
    for (int i = 0; i < 20; ++i) step();
    return heap_of([&] {
      for (int i = 0; i < 20; ++i) step();
    });
  };
#ifdef _OPENMP
  return with_threads(1, run);
#else
  return run();
#endif
}

/// Where memory is seen from outside, so that no compiler may do without it.
const void* volatile seen;

/// After a backward the gradients of an adapter or a layer own what zeros_like has made and no more: an optimiser that makes its moments in
/// their image, and a worker who brings its own, copy no scratch memory.
template <class T>
void check_gradients_are_parameters(const T& trained) {
  const MatrixX<float> x = noise<float>(trained.in_features(), 6, 1), dy = noise<float>(trained.out_features(), 6, 2);
  const BatchRanks ranks = BatchRanks::per_sample({3, 3, 1, {3, 2}, RankSlice::none(), 2});
  auto gradients = zeros_like(trained);
  const auto owned = [&] {
    return heap_of([&] {
             const auto copy = gradients;
             seen = &copy;
           })
        .bytes;
  };
  const std::size_t before = owned();
  auto cache = fresh_cache<T>();
  typename T::Workspace workspace;
  MatrixX<float> y = MatrixX<float>::Zero(dy.rows(), dy.cols()), dx = MatrixX<float>::Zero(x.rows(), x.cols());
  if constexpr (Layer<T>) {
    trained.forward(x, ranks, cache, y);
    trained.backward(dy, cache, gradients, workspace, dx);
  } else {
    trained.add_forward(x, ranks, cache, y);
    trained.add_backward(x, dy, cache, gradients, workspace, dx);
  }
  CHECK(owned() == before);
}

}  // namespace

TEST_CASE("the counter sees Eigen's matrices and operator new and reallocation") {
  CHECK(heap_of([] { seen = MatrixX<float>(100, 50).data(); }).largest >= 100 * 50 * sizeof(float));
  CHECK(heap_of([] { seen = std::vector<double>(1000).data(); }).largest >= 1000 * sizeof(double));
  CHECK(heap_of([] {
          MatrixX<float> m(10, 1);
          m.conservativeResize(10, 700);
          seen = m.data();
        }).largest >= 10 * 700 * sizeof(float));
  CHECK(heap_of([] {}).requests == 0);
}

TEST_CASE("gradients hold parameters and nothing else, whatever backward they have been through") {
  Rng rng(1);
  const LowRankOptions options{.max_rank = 3};
  const Index in = 9, out = 9;
  const MatrixX<float> W = noise<float>(out, in, 3);
  const LowRank<float> low_rank(noise<float>(3, in, 4), noise<float>(out, 3, 5), options);
  const auto linear = [&] { return Linear<float>(W, low_rank); };
  check_gradients_are_parameters(low_rank);
  check_gradients_are_parameters(Dropout<LowRank<float>>(low_rank, 0.5));
  check_gradients_are_parameters(Stacked<LowRank<float>>(std::vector{low_rank, low_rank}));
  check_gradients_are_parameters(Nola<float>(in, out, {.max_rank = 3, .bases = 4}, rng));
  check_gradients_are_parameters(NolaBases<float>(in, out, {.max_rank = 3, .bases = 4}, rng));
  check_gradients_are_parameters(MultiLora<float>(in, out, {.max_rank = 3}, rng));
  check_gradients_are_parameters(OffsetLowRank<float>(low_rank.A, low_rank.B, options));
  check_gradients_are_parameters(Chain<LowRank<float>>({low_rank, low_rank}, options));
  check_gradients_are_parameters(Flow<float>({low_rank, low_rank}));
  check_gradients_are_parameters(linear());
  check_gradients_are_parameters(Linear<float, Dropout<LowRank<float>>>(W, Dropout<LowRank<float>>(low_rank, 0.5)));
  check_gradients_are_parameters(Conv2d<float>(W, {.in_channels = 1, .image = {5, 5}, .kernel = {3, 3}}, options, rng));
  check_gradients_are_parameters(Attention<float>(linear(), linear(), linear(), linear(), {.heads = 3}));
  check_gradients_are_parameters(DoraLinear<float>(W, {.adapter = options}, rng));
  check_gradients_are_parameters(ResidualStack<float, Shortcut::input>({W, W}, {.adapter = options}, rng));
  check_gradients_are_parameters(ResidualStack<float, Shortcut::block>({W, W}, {.adapter = options}, rng));
}

TEST_CASE("a steady training loop of a linear layer allocates nothing as large as an activation") {
  using L = Linear<float>;
  const Index in = 64, out = 48, samples = 80;
  L layer = MakeLayer<L>::make(in, out, true, 8, 1);
  auto gradients = zeros_like(layer);
  L::Cache cache;
  L::Workspace workspace;
  AdamW optimizer(layer, {.max_norm = 1});
  Rng rng(5);
  const MatrixX<float> x = noise<float>(in, samples, 2), target = noise<float>(out, samples, 3);
  MatrixX<float> y(out, samples), dy(out, samples), dx(in, samples);
  const Heap heap = steady([&] {
    const StepRanks plan = FreshRanks(UniformRank{1, 8}, 4)(optimizer.steps(), rng);
    (void)train_step(layer, optimizer, gradients, plan, [&](Index i, RankSlice rank, double weight) {
      const Index n = i == 1 ? samples / 2 : samples;  // and the batch varies as well
      // The third has a rank for each sample.
      const BatchRanks ranks = i == 2 ? batch_ranks(divide_sequences(Sandwich(1, 8)(0, rng), n), Sequences::equal(n, 1)) : BatchRanks(rank);
      layer.forward(x.leftCols(n), ranks, cache, y.leftCols(n));
      const double loss = mse<float>(y.leftCols(n), target.leftCols(n), dy.leftCols(n), weight);
      layer.backward(dy.leftCols(n), cache, gradients, workspace, dx.leftCols(n));
      return loss;
    });
  });
  INFO(heap.requests << " requests, " << heap.bytes << " bytes, the largest " << heap.largest);
  const Index activation = std::min(in, out) * samples / 2;  // features × samples of the smallest activation
  CHECK(heap.largest < static_cast<std::size_t>(activation) * sizeof(float));
}

TEST_CASE("a steady training loop of an attention allocates nothing as large as an activation") {
  using L = Attention<float>;
  const Index features = 32;
  const Sequences sequences({70, 3, 17}), shorter({20, 25});
  const auto projection = [&](Index out, std::uint64_t seed) { return MakeLayer<Linear<float>>::make(features, out, true, 8, seed); };
  L attention(projection(features, 1), projection(features / 2, 4), projection(features / 2, 7), projection(features, 10),
              {.heads = 4, .key_value_heads = 2});
  auto gradients = zeros_like(attention);
  L::Cache cache;
  L::Workspace workspace;
  AdamW optimizer(attention, {.max_norm = 1});
  Rng rng(5);
  const MatrixX<float> x = noise<float>(features, sequences.tokens(), 2);
  std::vector<Index> targets(static_cast<std::size_t>(sequences.tokens()), 3);
  MatrixX<float> y(features, sequences.tokens()), dx = y;
  const Heap heap = steady([&] {
    const StepRanks plan = FreshRanks(FrozenPrefix{UniformRank{1, 8}}, 3)(optimizer.steps(), rng);
    (void)train_step(attention, optimizer, gradients, plan, [&](Index i, RankSlice rank, double weight) {
      const Sequences& batch = i == 1 ? shorter : sequences;
      const Index n = batch.tokens();
      const BatchRanks ranks =  // the third has a rank for each sequence
          i == 2 ? batch_ranks(divide_sequences(FreshRanks(UniformRank{1, 8}, batch.count())(0, rng), batch.count()), batch)
                 : BatchRanks(rank);
      attention.forward(x.leftCols(n), batch, ranks, cache, y.leftCols(n));
      const std::span<const Index> wanted(targets.data(), static_cast<std::size_t>(n));
      const double loss = cross_entropy<float>(y.leftCols(n), wanted, y.leftCols(n), {.weight = weight});
      attention.backward(y.leftCols(n), cache, gradients, workspace, dx.leftCols(n));
      return loss;
    });
  });
  INFO(heap.requests << " requests, " << heap.bytes << " bytes, the largest " << heap.largest);
  const Index activation = features / 2 * shorter.tokens();  // features × tokens of the smallest activation: keys
  CHECK(heap.largest < static_cast<std::size_t>(activation) * sizeof(float));
}

TEST_CASE("a warm product and a warm optimiser step ask the heap for nothing of their operands' size") {
  using L = Linear<float>;
  L layer = MakeLayer<L>::make(300, 200, false, 8, 1);
  const MatrixX<float> x = noise<float>(300, 40, 2);
  MatrixX<float> y(200, 40);
  CHECK(steady([&] { set_product(y, layer.base.W, x); }).requests == 0);
  auto gradients = zeros_like(layer);
  randomize<L>(gradients, 1);
  gradients.adapter.A.components.insert(8);
  gradients.adapter.B.components.insert(8);
  AdamW optimizer(layer);
  CHECK(steady([&] { optimizer.step(layer, gradients); }).largest < 200 * sizeof(float));
}

}  // namespace dylora::test

#else

TEST_CASE("counting allocations needs glibc without a sanitizer in front of it") { SUCCEED(); }

#endif
