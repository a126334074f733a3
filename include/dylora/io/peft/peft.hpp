#ifndef DYLORA_IO_PEFT_PEFT_HPP
#define DYLORA_IO_PEFT_PEFT_HPP

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

#include "dylora/adapters/factors.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/load_report.hpp"
#include "dylora/io/peft/config.hpp"
#include "dylora/io/peft/kinds.hpp"
#include "dylora/io/peft/modules.hpp"
#include "dylora/io/peft/reader.hpp"
#include "dylora/io/peft/tensors.hpp"
#include "dylora/io/peft/writer.hpp"
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
/// that no lora_alpha gives s(b) to the last bit of a double; then it is the next number.) An adapter that is more than its factors is
/// saved as the factors() that compute the same, which are rounded where they fold something in, as the gains of a MultiLora.
///
/// Besides linear layers, PEFT has these, each in tensors of its own (io/peft/tensors.hpp):
///
///     Embedding     as it is
///     Conv2d        each group's A with zeros for the other groups' channels, since PEFT's reads all: rank b is b · groups in the file
///     DoraLinear    use_dora, and the magnitude at rank b. PEFT has DoRA in all modules of a file or in none. A magnitude for each rank
///                   becomes that of the file at every rank when it is loaded; io/parameters_file.hpp keeps those of all ranks
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

/// call(), whose std::invalid_argument begins with the module's name.
template <class Call>
auto naming(const std::string& module, Call&& call) {
  try {
    return call();
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(module + ": " + error.what());
  }
}

/// A module's path in the files.
template <class Options>
std::string peft_path(const Options& options, std::string_view name) {
  return peft_module_path(options.prefix, options.name ? options.name(name) : std::string(name));
}

}  // namespace detail

/// Writes every adapter of the model at its own rank, one for each PortableAdapter in the order of for_each_module; 0 leaves the module
/// without one. Returns what the files say of each.
///
/// Modules at rank 0 have no tensors; the metadata names them, so that a load gives back all of the model. Other files in the folder stay.
/// Both files are complete on the disk before either takes its name. Should the process stop between the two names, the new config lies
/// beside the old weights. These have a checksum of r, lora_alpha, use_rslora and the patterns of their own config: load_peft refuses the
/// pair unless it is still the old adapter. Other programs do not look at it, and what they wrote has none.
///
/// With nothing written, throws std::invalid_argument unless there is a rank in [0, its components] for each, for a model with no component
/// or with trained parameters outside of its adapters, for an adapter that is no low-rank product or whose scale is 0, for DoRA in some
/// modules only, for a convolution with dilation or whose groups differ in rank, and for paths that are too long for a pattern;
/// NonFiniteError for one that is not finite; FileError, as when another process is saving to the folder.
template <class T>
std::vector<AdapterScale> save_peft(const std::filesystem::path& folder, const T& model, const std::vector<Index>& ranks,
                                    const SavePeftOptions& options = {}) {
  require_only_adapters(model, "save_peft");
  const auto path_of = [&](std::string_view name) { return detail::peft_path(options, name); };
  std::size_t count = 0;
  detail::for_each_peft_module(model, "save_peft", path_of, [&](const std::string&, const auto&) { ++count; });
  if (ranks.size() != count)
    throw std::invalid_argument("save_peft: expected a rank for each of " + std::to_string(count) + " adapters, got " +
                                std::to_string(ranks.size()));
  std::vector<AdapterScale> report;
  std::vector<detail::PeftModule> modules;
  std::set<std::string> paths;
  auto rank_of_file = ranks.begin();
  std::optional<bool> dora;
  detail::for_each_peft_module(model, "save_peft", path_of, [&]<class M>(const std::string& path, const M& module) {
    using S = typename M::Scalar;
    const std::string subject = "save_peft: module " + in_quotes(path);
    if (!paths.insert(path).second) throw std::invalid_argument(subject + ": expected a name of its own, got that of another");
    const Index wanted = *rank_of_file++;
    require_in_range(wanted, 0, module.components(), subject + ": rank");
    PeftAdapter<S> values = detail::naming(subject, [&] { return module.values(wanted); });
    LowRankFactors<S>& factors = values.factors;
    const PeftShape shape = module.shape();
    const Index rank = factors.A.rows();
    if (rank == 0) return report.push_back({path});
    if (dora.value_or(shape.dora) != shape.dora)
      throw std::invalid_argument(subject + ": use_dora: expected DoRA in all modules or in none, as PEFT has it, got a layer " +
                                  (shape.dora ? "with a magnitude after one without" : "without a magnitude after one with it"));
    dora = shape.dora;
    require_scale<S>(factors.scale, subject);
    if (options.baked) factors.B *= static_cast<S>(std::exchange(factors.scale, 1));
    if (!factors.A.allFinite() || !factors.B.allFinite()) throw NonFiniteError(subject + ": expected finite factors, got others");
    if (!values.magnitude.allFinite()) throw NonFiniteError(subject + ": expected a finite magnitude, got another");
    report.push_back({path, rank, detail::lora_alpha_giving(factors.scale, rank), factors.scale});
    modules.push_back(detail::peft_module(report.back(), shape, std::move(values)));
  });
  if (modules.empty()) throw std::invalid_argument("save_peft: expected a model with an adapter that has a component, got none");

  PeftConfig config{.use_dora = dora.value_or(false),
                    .fan_in_fan_out = options.fan_in_fan_out,
                    .base_model_name_or_path = options.base_model_name_or_path,
                    .task_type = options.task_type};
  detail::describe_modules(modules, config);
  detail::write_peft(folder, config, modules, report);
  return report;
}

/// The same at one rank for all; those that have fewer components, with all they have. Throws std::invalid_argument, too, for a rank outside
/// [1, the largest max_rank].
template <class T>
std::vector<AdapterScale> save_peft(const std::filesystem::path& folder, const T& model, Index rank, const SavePeftOptions& options = {}) {
  const auto ranks = portable_ranks(rank, "save_peft", [&](auto&& f) {
    detail::for_each_peft_module(
        model, "save_peft", [&](std::string_view name) { return detail::peft_path(options, name); },
        [&](const std::string&, const auto& module) { f(module); });
  });
  return save_peft(folder, model, ranks, options);
}

/// Sets the adapters of the model to those of a folder that PEFT or save_peft has written. Each takes the rank of the file as its max_rank,
/// and the scale by its alpha: lora_alpha / r, or lora_alpha / √r under use_rslora, with rank_pattern and alpha_pattern. Its scale rule
/// stays, and says what the scale is at lower ranks; gradients and optimisers made before no longer fit. A plain LoRA has its components in
/// no order: ranks/order.hpp orders them.
///
/// With nothing changed, throws FileError for what cannot be read; FormatError for what is no LoRA, or under use_dora no DoRA,
/// that fits the model's layers, named, or not of one save; and if `strict`, with both lists, when the model and the file do not have the
/// same adapters; std::invalid_argument for an adapter that is no PortableAdapter or whose scale rule has no such scale, and for a convolution
/// with dilation.
template <class T>
LoadReport load_peft(const std::filesystem::path& folder, T& model, const LoadPeftOptions& options = {}) {
  PeftFolder file(folder);
  LoadReport report;
  std::vector<std::function<void()>> assignments;
  const auto path_of = [&](std::string_view name) { return detail::peft_path(options, name); };
  detail::for_each_peft_module(model, "load_peft", path_of, [&]<class M>(const std::string& path, const M& module) {
    auto found = file.template take<typename M::Scalar>(path, module.shape());
    if (!found && module.components() > 0) report.missing_modules.push_back(path);
    if (!found) return;
    AdapterScale taken{path, found->factors.A.rows(), found->alpha, 0};
    auto prepared = detail::naming("load_peft: module " + in_quotes(path), [&] { return module.prepare(std::move(*found)); });
    taken.scale = prepared.scale;
    report.adapters.push_back(std::move(taken));
    assignments.push_back(std::move(prepared.assign));
  });
  report.unmatched_tensors = file.unmatched();
  report.notes = file.notes();
  if (options.strict) detail::require_complete(report, file.name());
  for (const auto& assign : assignments) assign();
  return report;
}

}  // namespace dylora

#endif
