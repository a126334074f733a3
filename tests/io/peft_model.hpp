#ifndef DYLORA_TESTS_IO_PEFT_MODEL_HPP
#define DYLORA_TESTS_IO_PEFT_MODEL_HPP

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <vector>

#include "dylora/adapters/dropout.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/adapters/stacked.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/layers/linear.hpp"
#include "support/values.hpp"

/// A model with every kind of adapter that a file of adapters meets, for the tests and the program that write such files.
namespace dylora::test {

inline constexpr Index peft_in = 7, peft_out = 15, peft_rank = 5;

/// An α for which every scale of every rule at the ranks 1 to 5 is an α' / rank without rounding.
inline constexpr double peft_alpha = 2.5;

template <class S>
struct PeftBlock {
  struct Gradients {};

  Linear<S> q_proj;
  Linear<S, Stacked<LowRank<S>>> c_attn;
  Linear<S, Dropout<LowRank<S>>> c_fc;
  FrozenLinear<S> c_proj;

  PeftBlock(LowRankOptions options, Rng& rng)
      : q_proj(weight(rng), options, rng),
        c_attn(weight(rng), {.adapters = {options, with_rank(options, 0), options}}, rng),
        c_fc(weight(rng), {.adapter = with_rank(options, 3), .probability = 0.1}, rng),
        c_proj(weight(rng)) {}

  static void members(const auto& f, auto&... t) {
    f(Child<Linear<S>>{"attn.q_proj"}, t.q_proj...);
    f(Child<Linear<S, Stacked<LowRank<S>>>>{"attn.c_attn"}, t.c_attn...);
    f(Child<Linear<S, Dropout<LowRank<S>>>>{"mlp.c_fc"}, t.c_fc...);
    f(Child<FrozenLinear<S>>{"mlp.c_proj"}, t.c_proj...);
  }

 private:
  static MatrixX<S> weight(Rng& rng) { return random_uniform<S>(peft_out, peft_in, 1, rng); }
  static LowRankOptions with_rank(LowRankOptions options, Index max_rank) {
    options.max_rank = std::min(options.max_rank, max_rank);
    return options;
  }
};

template <class S>
struct PeftModel {
  using Scalar = S;
  struct Gradients {};

  std::vector<PeftBlock<S>> h;
  Linear<S> head;

  /// The same base for every seed of the adapters.
  explicit PeftModel(LowRankOptions options = {.max_rank = peft_rank, .alpha = peft_alpha}, std::uint64_t seed = 2)
      : PeftModel(options, Rng(1)) {
    randomize<PeftModel>(*this, seed);
  }

  Index max_rank() const { return peft_rank; }

  static void members(const auto& f, auto&... t) {
    f(Child<PeftBlock<S>>{"h"}, t.h...);
    f(Child<Linear<S>>{"head"}, t.head...);
  }

 private:
  PeftModel(LowRankOptions options, Rng rng)
      : h{PeftBlock<S>(options, rng), PeftBlock<S>(options, rng)},
        head(MatrixX<S>(random_uniform<S>(peft_out, peft_in, 1, rng)), options, rng) {}
};

/// All of the first `rank` components, of which there may be none.
inline RankSlice slice(Index rank) { return rank > 0 ? RankSlice(rank) : RankSlice::none(); }

/// What each layer of the model makes of one batch at a rank, beside each other.
template <class T>
auto layer_outputs(const T& model, Index rank) {
  using S = typename T::Scalar;
  const MatrixX<S> x = noise<S>(peft_in, 3, 9);
  MatrixX<S> outputs(peft_out, 0);
  for_each_layer(model, [&](std::string_view, const auto& layer) {
    outputs.conservativeResize(peft_out, outputs.cols() + 3);
    outputs.rightCols(3) = layer.forward(x, slice(std::min(rank, layer.max_rank())));
  });
  return outputs;
}

}  // namespace dylora::test

#endif
