#ifndef DYLORA_IO_PEFT_HPP
#define DYLORA_IO_PEFT_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <filesystem>
#include <functional>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/core/concepts.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/factors.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/load_report.hpp"
#include "dylora/io/peft_config.hpp"
#include "dylora/io/peft_reader.hpp"
#include "dylora/io/peft_tensors.hpp"
#include "dylora/io/peft_writer.hpp"
#include "dylora/io/portable_adapters.hpp"

/// Adapters in the folders of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.
///
///     save_peft("rank_4", model, 4, {.prefix = "transformer"});                    // each adapter's first 4 components: a LoRA of rank 4
///     save_peft("searched", model, {8, 2, 0, 5}, {.prefix = "transformer"});       // a rank for each of the model's adapters
///     const LoadReport report = load_peft("rank_4", model, {.prefix = "transformer"});
///
/// Where the wrapped model has other names than this one, as "c_attn" for "qkv_proj", the options have a function for them.
///
/// Saved at rank b, the factors are A[:b] and B[:, :b] as they are, and lora_alpha is the one for which PEFT's scale, lora_alpha / r, is
/// s(b): under α/b it is α itself. Whatever the scale rule, PEFT computes what forward(x, b) does. (Under another rule than α/b it happens
/// that no lora_alpha gives s(b) to the last bit of a double; then it is the next number.)
namespace dylora {

struct SavePeftOptions {
  std::string prefix = {};  ///< where the model is inside the wrapped one: "transformer"; a Linear by itself is what this says
  std::function<std::string(std::string_view module)> name = {};  ///< the wrapped model's name for a module; none: the model's own
  bool baked = false;           ///< B ← s(b) · B and lora_alpha = r: for programs that know nothing of lora_alpha
  bool fan_in_fan_out = false;  ///< whether the base has its weights as in × out, as GPT-2 does; A and B are the same
  std::string base_model_name_or_path = {};
  std::string task_type = {};  ///< "CAUSAL_LM" and others; PEFT chooses its wrapper by it
};

struct LoadPeftOptions {
  std::string prefix = {};                                        ///< as in SavePeftOptions
  std::function<std::string(std::string_view module)> name = {};  ///< as in SavePeftOptions
  bool strict = true;  ///< whether it is an error if the model lacks an adapter of the file or the file one of the model
};

namespace detail {

/// A module's path in the files.
template <class Options>
std::string peft_path(const Options& options, std::string_view name) {
  return peft_module_path(options.prefix, options.name ? options.name(name) : std::string(name));
}

}  // namespace detail

/// Writes every adapter of the model at its own rank, one for each PortableAdapter in the order of for_each_layer; 0 leaves the module
/// without one. Returns what the files say of each.
///
/// Modules at rank 0 have no tensors; the metadata names them, so that a load gives back all of the model. Other files in the folder stay.
/// Both files are complete on the disk before either takes its name. Should the process stop between the two names, the new config lies
/// beside the old weights. These have a checksum of r, lora_alpha, use_rslora and the patterns of their own config: load_peft refuses the
/// pair unless it is still the old adapter. Other programs do not look at it, and what they wrote has none.
///
/// With nothing written, throws std::invalid_argument unless there is a rank in [0, its components] for each, for a model with no component
/// or with trained parameters outside of its adapters, for an adapter that is no low-rank product or whose scale is 0, and for paths that
/// are too long for a pattern; NonFiniteError for one that is not finite; FileError, as when another process is saving to the folder.
template <class T>
std::vector<AdapterScale> save_peft(const std::filesystem::path& folder, const T& model, const std::vector<Index>& ranks,
                                    const SavePeftOptions& options = {}) {
  require_only_adapters(model, "save_peft");
  std::size_t count = 0;
  for_each_portable_adapter(model, [&](const auto&) { ++count; });
  if (ranks.size() != count)
    throw std::invalid_argument("save_peft: expected a rank for each of " + std::to_string(count) + " adapters, got " +
                                std::to_string(ranks.size()));
  std::vector<AdapterScale> report;
  std::vector<detail::PeftModule> modules;
  std::set<std::string> paths;
  auto rank_of_file = ranks.begin();
  const auto path_of = [&](std::string_view name) { return detail::peft_path(options, name); };
  for_each_portable_adapter(model, "save_peft", path_of, [&]<class A>(const std::string& path, const A& adapter) {
    using S = typename A::Scalar;
    const std::string module = "save_peft: module " + in_quotes(path);
    if (!paths.insert(path).second) throw std::invalid_argument(module + ": expected a name of its own, got that of another");
    const Index wanted = *rank_of_file++;
    require_in_range(wanted, 0, adapter.components(), module + ": rank");
    LowRankFactors<S> factors = adapter.factors(wanted);
    const Index rank = factors.A.rows();
    if (rank == 0) return report.push_back({path});
    require_scale<S>(factors.scale, module);
    if (options.baked) factors.B *= static_cast<S>(std::exchange(factors.scale, 1));
    if (!factors.A.allFinite() || !factors.B.allFinite()) throw NonFiniteError(module + ": expected finite factors, got others");
    report.push_back({path, rank, detail::lora_alpha_giving(factors.scale, rank), factors.scale});
    modules.push_back({report.back(), std::move(factors.A), RowMatrix<S>(factors.B)});
  });
  if (modules.empty()) throw std::invalid_argument("save_peft: expected a model with an adapter that has a component, got none");

  PeftConfig config{
      .fan_in_fan_out = options.fan_in_fan_out, .base_model_name_or_path = options.base_model_name_or_path, .task_type = options.task_type};
  detail::describe_modules(modules, config);
  detail::write_peft(folder, config, modules, report);
  return report;
}

/// The same at one rank for all; those that have fewer components, with all they have. Throws std::invalid_argument, too, for a rank outside
/// [1, the largest max_rank].
template <class T>
std::vector<AdapterScale> save_peft(const std::filesystem::path& folder, const T& model, Index rank, const SavePeftOptions& options = {}) {
  const auto ranks = portable_ranks(rank, "save_peft", [&](auto&& f) { for_each_portable_adapter(model, f); });
  return save_peft(folder, model, ranks, options);
}

/// Sets the adapters of the model to those of a folder that PEFT or save_peft has written. Each takes the rank of the file as its max_rank,
/// and the scale by its alpha: lora_alpha / r, or lora_alpha / √r under use_rslora, with rank_pattern and alpha_pattern. Its scale rule
/// stays, and says what the scale is at lower ranks; gradients and optimisers made before no longer fit. A plain LoRA has its components in
/// no order: adapters/order_components.hpp orders them.
///
/// With nothing changed, throws FileError for what cannot be read; FormatError for what is not a plain LoRA of linear layers that fits,
/// named, or not of one save; and if `strict`, with both lists, when the model and the file do not have the same adapters; std::invalid_argument for an adapter
/// that is no PortableAdapter or whose scale rule has no such scale.
template <class T>
LoadReport load_peft(const std::filesystem::path& folder, T& model, const LoadPeftOptions& options = {}) {
  detail::PeftFolder file(folder);
  LoadReport report;
  std::vector<std::function<void()>> assignments;
  const auto path_of = [&](std::string_view name) { return detail::peft_path(options, name); };
  for_each_portable_adapter(model, "load_peft", path_of, [&]<class A>(const std::string& path, A& adapter) {
    auto found = file.template take<typename A::Scalar>(path, adapter.in_features(), adapter.out_features());
    if (!found && adapter.components() > 0) report.missing_modules.push_back(path);
    if (!found) return;
    AdapterScale taken{path, found->factors.A.rows(), found->alpha, 0};
    A loaded = adapter;
    try {
      loaded.set_factors(std::move(found->factors));
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("load_peft: module " + in_quotes(path) + ": " + error.what());
    }
    if (taken.rank > 0) taken.scale = loaded.factors(loaded.max_rank()).scale;
    report.adapters.push_back(std::move(taken));
    assignments.push_back([&adapter, prepared = std::move(loaded)]() mutable { adapter = std::move(prepared); });
  });
  report.unmatched_tensors = file.unmatched();
  report.notes = file.notes();
  if (options.strict) detail::require_complete(report, file.name());
  for (const auto& assign : assignments) assign();
  return report;
}

}  // namespace dylora

#endif
