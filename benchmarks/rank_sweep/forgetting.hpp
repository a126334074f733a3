#ifndef DYLORA_BENCHMARKS_RANK_SWEEP_FORGETTING_HPP
#define DYLORA_BENCHMARKS_RANK_SWEEP_FORGETTING_HPP

#include <dylora/analysis/intruders.hpp>
#include <dylora/dylora.hpp>
#include <nlohmann/json.hpp>
#include <vector>

#include "finetune/adapted_model.hpp"

namespace rank_sweep {

using namespace dylora;
using nlohmann::json;

/// What an adapted model has made of its weights at each of result["ranks"]: intruder dimensions of all weights together, those that are
/// also outside of every window of 5 %, and the mean cosine of a leading direction with the nearest of the frozen weight.
inline void add_intruders(const finetune::AdaptedModel& model, json& result) {
  const std::vector<MatrixX<float>> before = model.merged(RankSlice::none());
  std::vector<BaseSpectrum> spectra;
  for (const MatrixX<float>& weight : before) spectra.emplace_back(weight);
  for (const Index rank : result["ranks"]) {
    const std::vector<MatrixX<float>> after = model.merged(rank);
    Index count = 0, robust = 0;
    double cosine = 0;
    for (std::size_t i = 0; i < after.size(); ++i) {
      const Intruders found = spectra[i].intruders(after[i], {});
      count += found.count;
      robust += spectra[i].intruders(after[i], {.window = 0.05}).count;
      for (const TunedDirection& direction : found.directions)
        cosine += direction.cosine / static_cast<double>(found.directions.size() * after.size());
    }
    result["intruders"].push_back(count);
    result["intruders_in_windows"].push_back(robust);
    result["mean_cosine"].push_back(cosine);
  }
  result["weights"] = before.size();
}

}  // namespace rank_sweep

#endif
