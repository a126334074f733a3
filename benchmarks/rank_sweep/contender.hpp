#ifndef DYLORA_BENCHMARKS_RANK_SWEEP_CONTENDER_HPP
#define DYLORA_BENCHMARKS_RANK_SWEEP_CONTENDER_HPP

#include <dylora/dylora.hpp>
#include <functional>
#include <string>
#include <vector>

/// What is compared: ways to train adapters of rank R, which differ in the ranks of each step and in what the scale makes of them.
namespace rank_sweep {

using namespace dylora;

struct Contender {
  std::string name;
  Index max_rank;
  ScaleRule scale;
  std::function<StepRanks(Index, Rng&)> plan;
  Index steps;
  Index ordered_before = 0;  ///< order_components and a fresh optimiser before this step, or after the last; 0 never
  bool distilled = false;    ///< lower ranks learn what max_rank says about their windows instead of the next byte
};

inline constexpr double alpha = 16;

/// A plain LoRA: rank r only. Truncated, it is the first contender; one for each rank is the search that DyLoRA replaces.
inline Contender lora(Index rank, Index steps) {
  return {"LoRA r=" + std::to_string(rank), rank, alpha_over_rank, FreshRanks{UniformRank{rank, rank}}, steps};
}

/// The same run in two better ways of truncating it: without the jump of the scale, and with its components ordered by the singular values
/// of their product.
inline std::vector<Contender> truncated_loras(Index max_rank, Index steps) {
  const FreshRanks top{UniformRank{max_rank, max_rank}};
  const std::string name = "LoRA r=" + std::to_string(max_rank) + ", truncated";
  return {{name + ", constant", max_rank, alpha_over_max_rank, top, steps},
          {name + ", ordered", max_rank, alpha_over_max_rank, top, steps, steps}};
}

/// The library's recommendation, in so many times the steps of the others.
inline Contender recommended(Index max_rank, Index steps, Index times = 1) {
  const std::string name = times == 1 ? "recommended" : "recommended, " + std::to_string(times) + "× the steps";
  return {name, max_rank, alpha_over_max_rank, recommended_plan(max_rank, times * steps), times * steps};
}

/// Rank R alone at first, then its product re-expressed so that every prefix is the best there is, then all ranks in shares that favour the
/// highest and the lowest.
inline Contender ordered_start(Index max_rank, Index steps) {
  const Index first = steps / 10;
  const UniformRank top{max_rank, max_rank}, bottom{1, 1}, any{1, max_rank};
  const MixedRanks mixed({{top, 7.0 / 16}, {bottom, 3.0 / 16}, {any, 3.0 / 16}, {any, 3.0 / 16}});
  return {"ordered start, constant", max_rank, alpha_over_max_rank, Phases{FreshRanks{top}, first, mixed}, steps, first};
}

/// One DyLoRA run each. The first is the paper's.
inline std::vector<Contender> dyloras(Index R, Index steps, bool quick) {
  const UniformRank uniform{1, R};
  std::vector<Contender> all{{"uniform, α/b (paper)", R, alpha_over_rank, FreshRanks{uniform}, steps}};
  if (!quick) {
    all.push_back({"uniform, α/b, frozen", R, alpha_over_rank, FreshRanks{FrozenPrefix{uniform}}, steps});
    all.push_back({"uniform, α/√b", R, alpha_over_sqrt_rank, FreshRanks{uniform}, steps});
    all.push_back({"uniform, constant", R, alpha_over_max_rank, FreshRanks{uniform}, steps});
    all.push_back({"geometric, constant", R, alpha_over_max_rank, FreshRanks{GeometricRank{1, R, 0.25}}, steps});
    all.push_back({"4 fresh ranks, constant", R, alpha_over_max_rank, FreshRanks{uniform, 4}, steps});
    all.push_back({"moving range, constant", R, alpha_over_max_rank,
                   MovingRange({.from = {R, R}, .to = {1, R}, .steps = steps / 2, .draws = 4}), steps});
    all.push_back({"sandwich, α/√b", R, alpha_over_sqrt_rank, Sandwich{1, R}, steps});
  }
  all.push_back({"sandwich, constant", R, alpha_over_max_rank, Sandwich{1, R}, steps});
  if (!quick) {
    Contender distilled{"sandwich, distilled", R, alpha_over_max_rank, Sandwich{1, R}, steps};
    distilled.distilled = true;
    all.push_back(distilled);
    all.push_back({"every rank, constant", R, alpha_over_max_rank, EveryRank{1, R}, steps});
    std::vector<double> weights;
    for (Index b = 1; b <= R; ++b) weights.push_back(1.5 - static_cast<double>(b - 1) / static_cast<double>(std::max<Index>(1, R - 1)));
    all.push_back({"every rank, weighted", R, alpha_over_max_rank, WeightedRanks{EveryRank{1, R}, weights}, steps});
  }
  if (!quick) all.push_back(ordered_start(R, steps));
  all.push_back(recommended(R, steps));
  return all;
}

}  // namespace rank_sweep

#endif
