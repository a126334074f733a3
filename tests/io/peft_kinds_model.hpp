#ifndef DYLORA_TESTS_IO_PEFT_KINDS_MODEL_HPP
#define DYLORA_TESTS_IO_PEFT_KINDS_MODEL_HPP

#include <cstdint>
#include <string_view>
#include <vector>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/layers/conv2d.hpp"
#include "dylora/layers/embedding.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/methods/dora/dora_linear.hpp"
#include "io/peft_model.hpp"
#include "support/values.hpp"

/// Models of the modules that PEFT has besides linear layers, for the tests and the program that write such files.
namespace dylora::test {

/// Every kind but DoRA. Each has five components; of the grouped convolution, each group.
template <class S>
struct KindsModel {
  using Scalar = S;
  struct Gradients {};
  static constexpr Index layers = 4;

  Embedding<S> wte;
  Conv2d<S> conv, grouped;
  Linear<S> fc;

  /// The same frozen weights for every seed of the adapters.
  explicit KindsModel(LowRankOptions options = {.max_rank = peft_rank, .alpha = peft_alpha}, std::uint64_t seed = 2)
      : KindsModel(options, Rng(1)) {
    randomize<KindsModel>(*this, seed);
  }

  Index max_rank() const { return peft_rank; }

  static void members(const auto& f, auto&... t) {
    f(Child<Embedding<S>>{"wte"}, t.wte...);
    f(Child<Conv2d<S>>{"conv"}, t.conv...);
    f(Child<Conv2d<S>>{"grouped"}, t.grouped...);
    f(Child<Linear<S>>{"fc"}, t.fc...);
  }

 private:
  KindsModel(LowRankOptions options, Rng rng)
      : wte(noise<S>(6, 9, 11), options, rng),
        conv(noise<S>(6, 12, 12), {.in_channels = 2, .image = {3, 4}, .kernel = {2, 3}, .padding = {1, 0}}, options, rng),
        grouped(noise<S>(10, 8, 13), {.in_channels = 4, .image = {3, 3}, .kernel = {2, 2}, .stride = {2, 1}, .groups = 2}, options, rng),
        fc(MatrixX<S>(noise<S>(6, 7, 14)), options, rng) {}
};

/// What each part makes of one batch at a rank, below each other.
template <class S>
MatrixX<S> outputs(const KindsModel<S>& model, Index rank) {
  const auto at = [&](const auto& part) { return slice(std::min(rank, part.max_rank())); };
  const std::vector<Index> ids{3, 0, 8};
  const MatrixX<S> embedded = model.wte.forward(ids, at(model.wte));
  const MatrixX<S> convolved = model.conv.forward(noise<S>(model.conv.in_features(), 3, 5), at(model.conv));
  const MatrixX<S> grouped = model.grouped.forward(noise<S>(model.grouped.in_features(), 3, 6), at(model.grouped));
  const MatrixX<S> mapped = model.fc.forward(noise<S>(7, 3, 7), at(model.fc));
  MatrixX<S> all(embedded.rows() + convolved.rows() + grouped.rows() + mapped.rows(), 3);
  all << embedded, convolved, grouped, mapped;
  return all;
}

/// DoRA in all layers: with a magnitude for all ranks, and for each.
template <class S>
struct DoraModel {
  using Scalar = S;
  struct Gradients {};
  using Shared = DoraLinear<S>;
  using Nested = DoraLinear<S, LowRank<S>, DenseWeight<S>, Magnitude::nested>;
  static constexpr Index layers = 2;

  Shared q;
  Nested v;

  explicit DoraModel(LowRankOptions options = {.max_rank = peft_rank, .alpha = peft_alpha}, std::uint64_t seed = 2)
      : DoraModel(options, Rng(1)) {
    randomize<DoraModel>(*this, seed);
  }

  Index max_rank() const { return peft_rank; }

  static void members(const auto& f, auto&... t) {
    f(Child<Shared>{"q"}, t.q...);
    f(Child<Nested>{"v"}, t.v...);
  }

 private:
  DoraModel(LowRankOptions options, Rng rng)
      : q(MatrixX<S>(noise<S>(6, 7, 15)), {.adapter = options}, rng), v(MatrixX<S>(noise<S>(5, 7, 16)), {.adapter = options}, rng) {}
};

template <class S>
MatrixX<S> outputs(const DoraModel<S>& model, Index rank) {
  const MatrixX<S> x = noise<S>(7, 3, 7);
  const auto at = [&](const auto& part) { return slice(std::min(rank, part.max_rank())); };
  MatrixX<S> all(11, 3);
  all << model.q.forward(x, at(model.q)), model.v.forward(x, at(model.v));
  return all;
}

}  // namespace dylora::test

#endif
