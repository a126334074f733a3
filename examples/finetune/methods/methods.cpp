#include "finetune/methods.hpp"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
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

Options for_method(Options o, const std::function<bool(const std::string&)>& is_given) {
  const auto is_one_of = [&](std::initializer_list<const char*> names) {
    return std::any_of(names.begin(), names.end(), [&](const char* name) { return o.method == name; });
  };
  const auto refuse_unless = [&](const std::string& option, std::initializer_list<const char*> names) {
    if (is_given(option) && !is_one_of(names)) {
      std::string expected;
      for (const char* name : names) expected += (expected.empty() ? "" : ", ") + std::string(name);
      throw std::invalid_argument("--method: with " + option + " expected one of " + expected + ", got " + o.method);
    }
  };
  refuse_unless("--lr-ratio", {"lora+"});
  refuse_unless("--modules", {"multilora"});
  refuse_unless("--bases", {"nola"});
  refuse_unless("--links", {"chain"});
  refuse_unless("--interval", {"periodic"});
  refuse_unless("--base", {"dylora", "lora", "rslora", "lora+"});
  refuse_unless("--checkpoint",
                {"dylora", "lora", "rslora", "lora+", "dora", "reslora", "multilora", "nola", "pissa", "olora", "embedding"});
  refuse_unless("--layer-budget", {"dylora", "lora", "rslora", "lora+", "dora", "multilora", "pissa", "olora", "adalora"});
  if (o.method == "periodic" && is_given("--save"))
    throw std::invalid_argument(
        "--save: expected a --method that leaves the base as it is, got periodic, whose adapters become part of it");
  if (o.method == "chain" && o.links > o.steps)
    throw std::invalid_argument("--links: expected at most --steps " + std::to_string(o.steps) + ", got " + std::to_string(o.links));

  if (is_one_of({"lora", "adalora", "flow"})) {
    if ((is_given("--sampler") && o.sampler != "fixed") || o.mode != "nested")
      throw std::invalid_argument("--method " + o.method + ": expected --sampler fixed and --mode nested, which is all it is, got " +
                                  o.sampler + " and " + o.mode);
    o.sampler = "fixed";
  }
  if (o.method == "rslora") {
    if (is_given("--scale") && o.scale != "sqrt-rank")
      throw std::invalid_argument("--method rslora: expected --scale sqrt-rank, which is all it is, got " + o.scale);
    o.scale = "sqrt-rank";
  }
  return o;
}

}  // namespace finetune
