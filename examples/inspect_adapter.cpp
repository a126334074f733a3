// Shows what an adapter holds and how far it can be cut: a safetensors file, a PEFT folder or a GGUF file. Merges a PEFT folder into its
// base model at any rank.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/io/bytes/tensor.hpp"
#include "dylora/ranks/scale.hpp"
#include "inspect/contents.hpp"
#include "inspect/merge.hpp"
#include "inspect/peft_adapter.hpp"
#include "inspect/spectrum.hpp"
#include "program.hpp"

namespace {

using namespace inspect;
using dylora::in_quotes;

const std::map<std::string, dylora::ScaleRule> scale_rules{
    {"max-rank", dylora::alpha_over_max_rank}, {"rank", dylora::alpha_over_rank}, {"sqrt-rank", dylora::alpha_over_sqrt_rank}};

struct Options {
  std::string path, base, out, scale_rule = "max-rank";
  Index rank = 0;
  bool fan_in_fan_out = false, json = false;
};

void declare(CLI::App& app, Options& o) {
  app.add_option("path", o.path, "A safetensors file, a folder of PEFT's or of a model's, or a GGUF file")->required();
  app.add_flag("--json", o.json, "Print a JSON document");
  app.add_option(
         "--scale-rule", o.scale_rule,
         "The scale at a rank below that of the file: max-rank leaves it as it is, which suits plain LoRA and DyLoRA trained with a "
         "constant scale; rank and sqrt-rank make it alpha / b and alpha / sqrt(b), for DyLoRA that was trained so")
      ->check(CLI::IsMember(scale_rules));
  CLI::Option* merge = app.add_option("--merge", o.base, "Add the adapter to this model: a safetensors file, or a folder of them");
  CLI::Option* out = app.add_option("--out", o.out, "The safetensors file for the sum: the whole model, in its own types")->needs(merge);
  merge->needs(out);
  app.add_option("--rank", o.rank, "Merge the first components only, this many; 0 for all there are")
      ->check(CLI::NonNegativeNumber)
      ->needs(merge);
  app.add_flag("--fan-in-fan-out", o.fan_in_fan_out, "The model has the weights as in x out, whatever the adapter says")->needs(merge);
}

/// All modules together: what is lost if each is cut to the same rank.
struct Summary {
  Index parameters = 0, largest_rank = 0;
  LostEnergy given, best;
};

Summary summary_of(const std::vector<Module>& modules) {
  Summary summary;
  for (const Module& m : modules) summary.largest_rank = std::max(summary.largest_rank, m.rank);
  summary.given.assign(static_cast<std::size_t>(summary.largest_rank) + 1, 0);
  summary.best = summary.given;
  for (const Module& m : modules) {
    summary.parameters += m.rank * (m.in_features + m.out_features);
    for (std::size_t b = 0; b < m.spectrum.given.size(); ++b) {
      summary.given[b] += m.spectrum.given[b];
      summary.best[b] += m.spectrum.best[b];
    }
  }
  return summary;
}

/// The ranks that a table shows: all of a few, powers of two of many.
std::vector<Index> shown_ranks(Index largest) {
  std::vector<Index> ranks;
  for (Index rank = 1; rank < largest; rank = largest <= 16 ? rank + 1 : 2 * rank) ranks.push_back(rank);
  ranks.push_back(largest);
  return ranks;
}

void print_values(const char* what, const std::vector<double>& values) {
  constexpr std::size_t most = 16;
  std::printf("  %s", what);
  for (std::size_t i = 0; i < std::min(most, values.size()); ++i) std::printf(" %.3g", values[i]);
  std::printf(values.size() > most ? " … (%zu)\n" : "\n", values.size());
}

void print_module(const Module& m) {
  const Spectrum& s = m.spectrum;
  std::printf("\nmodule %s: %td × %td, rank %td, scale %g (%s), ‖ΔW‖ %.4g\n", in_quotes(m.name).c_str(), m.out_features, m.in_features,
              m.rank, m.scale, m.scale_source.c_str(), std::sqrt(s.best.front()));
  print_values("‖s B_i‖ ‖A_i‖  ", s.components);
  print_values("singular values", s.singular_values);
  std::printf("  99 %% of ‖ΔW‖²: rank %td in this order, rank %td in the best\n", rank_keeping(0.99, s.given), rank_keeping(0.99, s.best));
}

void print_summary(const std::vector<Module>& modules, const std::string& scale_rule) {
  const Summary all = summary_of(modules);
  std::printf(
      "\nall modules: %zu, %td parameters, largest rank %td, ‖ΔW‖ %.4g; 99 %% of ‖ΔW‖²: rank %td in this order, rank %td in the best\n",
      modules.size(), all.parameters, all.largest_rank, std::sqrt(all.best.front()), rank_keeping(0.99, all.given),
      rank_keeping(0.99, all.best));
  std::printf("relative error of ΔW if all are cut to one rank (--scale-rule %s):\n rank   in this order   in the best\n",
              scale_rule.c_str());
  for (const Index rank : shown_ranks(all.largest_rank)) {
    std::printf("%5td   %13.4g   %11.4g\n", rank, relative_error(all.given, rank), relative_error(all.best, rank));
  }
}

void print(const Contents& contents, const Options& o) {
  std::printf("%s: %s\n", in_quotes(o.path).c_str(), contents.kind.c_str());
  if (contents.step) std::printf("step: %td\n", *contents.step);
  if (!contents.metadata.empty()) std::printf("\nmetadata:\n");
  for (const auto& [key, value] : contents.metadata) std::printf("  %s: %s\n", in_quotes(key).c_str(), in_quotes(value).c_str());
  Index elements = 0;
  std::size_t bytes = 0;
  if (!contents.tensors.empty()) std::printf("\ntensors:\n");
  for (const Tensor& t : contents.tensors) {
    std::printf("  %-60s %-8s %s\n", in_quotes(t.name).c_str(), std::string(t.type).c_str(), dylora::describe_shape(t.shape).c_str());
    elements += dylora::element_count(t.shape);
    bytes += t.bytes;
  }
  std::printf("tensors: %zu, elements: %td, bytes: %zu\n", contents.tensors.size(), elements, bytes);
  for (const Module& m : contents.modules) print_module(m);
  if (!contents.modules.empty()) print_summary(contents.modules, o.scale_rule);
  for (const std::string& note : contents.notes) std::printf("note: %s\n", note.c_str());
}

void print_json(const nlohmann::ordered_json& document) {
  std::printf("%s\n", document.dump(2, ' ', true, nlohmann::json::error_handler_t::replace).c_str());  // GGUF's names may not be UTF-8
}

/// Relative errors at ranks 0, 1, ….
std::vector<double> relative_errors(const LostEnergy& lost) {
  std::vector<double> errors;
  for (std::size_t b = 0; b < lost.size(); ++b) errors.push_back(relative_error(lost, static_cast<Index>(b)));
  return errors;
}

nlohmann::ordered_json spectrum_json(const LostEnergy& given, const LostEnergy& best) {
  return {{"norm", std::sqrt(best.front())},
          {"rank_keeping_99_percent", {{"given", rank_keeping(0.99, given)}, {"best", rank_keeping(0.99, best)}}},
          {"relative_error", {{"given", relative_errors(given)}, {"best", relative_errors(best)}}}};
}

void print_json(const Contents& contents, const Options& o) {
  nlohmann::ordered_json document{{"path", o.path}, {"kind", contents.kind}, {"scale_rule", o.scale_rule}};
  if (contents.step) document["step"] = *contents.step;
  document["metadata"] = nlohmann::ordered_json::object();
  for (const auto& [key, value] : contents.metadata) document["metadata"][key] = value;
  document["tensors"] = nlohmann::ordered_json::array();
  for (const Tensor& t : contents.tensors) document["tensors"].push_back({{"name", t.name}, {"type", t.type}, {"shape", t.shape}});
  document["modules"] = nlohmann::ordered_json::array();
  for (const Module& m : contents.modules) {
    nlohmann::ordered_json module{{"name", m.name},   {"in_features", m.in_features},  {"out_features", m.out_features}, {"rank", m.rank},
                                  {"scale", m.scale}, {"scale_source", m.scale_source}};
    module.update(spectrum_json(m.spectrum.given, m.spectrum.best));
    module.update({{"components", m.spectrum.components}, {"singular_values", m.spectrum.singular_values}});
    document["modules"].push_back(module);
  }
  if (!contents.modules.empty()) {
    const Summary all = summary_of(contents.modules);
    document["all_modules"] = spectrum_json(all.given, all.best);
    document["all_modules"].update({{"parameters", all.parameters}, {"largest_rank", all.largest_rank}});
  }
  document["notes"] = contents.notes;
  print_json(document);
}

void run_merge(const Options& o) {
  if (!std::filesystem::is_directory(o.path)) {
    throw std::invalid_argument(o.path + ": --merge: expected a PEFT folder, which has the scale and the model's own names, got a file");
  }
  PeftAdapter adapter(o.path);
  const std::vector<MergedTensor> merged = merge(
      adapter, {.base = o.base, .out = o.out, .rank = o.rank, .rule = scale_rules.at(o.scale_rule), .fan_in_fan_out = o.fan_in_fan_out});
  double change = 0, rounding = 0;
  for (const MergedTensor& t : merged) {
    change = std::max(change, t.largest_change);
    rounding = std::max(rounding, t.largest_rounding);
  }
  if (o.json) {
    nlohmann::ordered_json document{{"path", o.path},
                                    {"base", o.base},
                                    {"out", o.out},
                                    {"scale_rule", o.scale_rule},
                                    {"largest_change", change},
                                    {"largest_rounding", rounding}};
    for (const MergedTensor& t : merged) {
      document["merged"].push_back({{"tensor", t.name},
                                    {"module", t.module},
                                    {"type", t.type},
                                    {"rank", t.rank},
                                    {"scale", t.scale},
                                    {"fan_in_fan_out", t.transposed},
                                    {"largest_change", t.largest_change},
                                    {"largest_rounding", t.largest_rounding}});
    }
    return print_json(document);
  }
  bool cut = false;
  for (const MergedTensor& t : merged) {
    std::printf("%s: %s, %s, rank %td of %td, scale %g, largest change %.4g, largest rounding error %.4g\n", in_quotes(t.name).c_str(),
                std::string(t.type).c_str(), t.transposed ? "in × out" : "out × in", t.rank, t.of, t.scale, t.largest_change,
                t.largest_rounding);
    cut = cut || t.rank < t.of;
  }
  if (cut) std::printf("scale at the lower rank: --scale-rule %s\n", o.scale_rule.c_str());
  std::printf("%zu tensors merged, all others as they were, in %s; largest change %.4g, largest rounding error %.4g\n", merged.size(),
              in_quotes(o.out).c_str(), change, rounding);
}

void run(const Options& o) {
  if (!o.base.empty()) {
    run_merge(o);
  } else if (const Contents contents = read_contents(o.path, scale_rules.at(o.scale_rule)); o.json) {
    print_json(contents, o);
  } else {
    print(contents, o);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return program::run_main(argc, argv, "inspect_adapter",
                           "Show what an adapter holds, and what is lost at lower ranks; merge it into its base model", Options{}, declare,
                           [](const Options& options, const CLI::App&) { run(options); });
}
