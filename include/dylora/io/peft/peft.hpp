#ifndef DYLORA_IO_PEFT_PEFT_HPP
#define DYLORA_IO_PEFT_PEFT_HPP

#include <filesystem>
#include <functional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dylora/core/types.hpp"
#include "dylora/io/adapter_file.hpp"
#include "dylora/io/load_report.hpp"
#include "dylora/io/peft/config.hpp"
#include "dylora/io/peft/modules.hpp"
#include "dylora/io/peft/reader.hpp"
#include "dylora/io/peft/writer.hpp"

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
/// saved as the factors() that compute the same, which are rounded where they fold something in, as gains.
///
/// Besides linear layers, PEFT has these, each in tensors of its own (io/peft/tensors.hpp):
///
///     Embedding     as it is
///     Conv2d        each group's A with zeros for the other groups' channels, since PEFT's reads all: rank b is b · groups in the file
///     a magnitude   beside the adapter of a linear layer: use_dora, and the magnitude at rank b. PEFT has DoRA in all modules of a file or
///                   in none. A magnitude for each rank becomes that of the file at every rank when it is loaded;
///                   io/parameters_file.hpp keeps those of all ranks
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
  std::vector<AdapterScale> report;
  std::vector<detail::PeftModule> modules;
  std::set<std::string> paths;
  const detail::PeftFormat format{"save_peft", options.prefix, options.name};
  detail::for_each_module_at(format, model, ranks, [&](const detail::AdapterPlace& place, const auto& module, auto values) {
    if (!paths.insert(place.in_file).second)
      throw std::invalid_argument("save_peft: " + place.subject() + ": expected a name of its own, got that of another");
    detail::PeftModule saved = detail::peft_module(place.in_file, module.shape(), std::move(values), options.baked);
    report.push_back(saved.adapter);
    if (saved.adapter.rank > 0) modules.push_back(std::move(saved));
  });
  PeftConfig config{
      .fan_in_fan_out = options.fan_in_fan_out, .base_model_name_or_path = options.base_model_name_or_path, .task_type = options.task_type};
  detail::describe_modules(modules, config);
  detail::write_peft(folder, config, modules, report);
  return report;
}

/// The same at one rank for all; those that have fewer components, with all they have. Throws std::invalid_argument, too, for a rank
/// outside [1, the largest max_rank].
template <class T>
std::vector<AdapterScale> save_peft(const std::filesystem::path& folder, const T& model, Index rank, const SavePeftOptions& options = {}) {
  const detail::PeftFormat format{"save_peft", options.prefix, options.name};
  return save_peft(folder, model, detail::same_rank(format, model, rank), options);
}

/// Sets the adapters of the model to those of a folder that PEFT or save_peft has written. Each takes the rank of the file as its max_rank,
/// and the scale by its alpha: lora_alpha / r, or lora_alpha / √r under use_rslora, with rank_pattern and alpha_pattern. Its scale rule
/// stays, and says what the scale is at lower ranks; gradients and optimisers made before no longer fit. A plain LoRA has its components in
/// no order: ranks/order.hpp orders them.
///
/// With nothing changed, throws FileError for what cannot be read; FormatError for what is no LoRA, or under use_dora no DoRA,
/// that fits the model's layers, named, or not of one save; and if `strict`, with both lists, when the model and the file do not have the
/// same adapters; std::invalid_argument for an adapter that is no PortableAdapter or whose scale rule has no such scale, and for a
/// convolution with dilation.
template <class T>
LoadReport load_peft(const std::filesystem::path& folder, T& model, const LoadPeftOptions& options = {}) {
  PeftFolder file(folder);
  const detail::PeftFormat format{"load_peft", options.prefix, options.name};
  return detail::load_adapters(format, file, model, options.strict, [&]<class Module>(const auto& place, const Module& module) {
    return file.take<typename Module::Scalar>(place.in_file, module.shape());
  });
}

}  // namespace dylora

#endif
