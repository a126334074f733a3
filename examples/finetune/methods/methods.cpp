#include "finetune/methods.hpp"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace finetune {
namespace {

using MakeModel = AnyModel (*)(const text::BaseModel&, const Options&);

const std::vector<std::pair<std::string, MakeModel>>& methods() {
  static const std::vector<std::pair<std::string, MakeModel>> all{
      {"dylora", adapt_by_low_rank},     {"lora", adapt_by_low_rank},   {"rslora", adapt_by_low_rank},   {"lora+", adapt_by_low_rank},
      {"dora", adapt_by_dora},           {"reslora", adapt_by_reslora}, {"periodic", adapt_by_low_rank}, {"chain", adapt_by_chain},
      {"multilora", adapt_by_multilora}, {"nola", adapt_by_nola},       {"prilora", adapt_by_prilora},   {"flow", adapt_by_flow},
      {"pissa", adapt_by_init},          {"olora", adapt_by_init},      {"adalora", adapt_by_low_rank},  {"embedding", adapt_embedding},
  };
  return all;
}

}  // namespace

const std::vector<std::string>& method_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const auto& [name, make] : methods()) all.push_back(name);
    return all;
  }();
  return names;
}

AnyModel adapt_base(const text::BaseModel& base, const Options& options) {
  const auto found = std::find_if(methods().begin(), methods().end(), [&](const auto& method) { return method.first == options.method; });
  return found->second(base, options);
}

Options for_method(Options options, bool has_sampler, bool has_scale) {
  const bool one_rank = options.method == "lora" || options.method == "adalora";
  if (one_rank && !has_sampler) options.sampler = "fixed";
  if (options.method == "rslora" && !has_scale) options.scale = "sqrt-rank";
  return options;
}

}  // namespace finetune
