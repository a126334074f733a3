#ifndef DYLORA_IO_GGUF_ADAPTER_HPP
#define DYLORA_IO_GGUF_ADAPTER_HPP

#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/adapter_file.hpp"
#include "dylora/io/bytes/atomic_file.hpp"
#include "dylora/io/bytes/tensor.hpp"
#include "dylora/io/gguf/adapter_reader.hpp"
#include "dylora/io/gguf/contents.hpp"
#include "dylora/io/gguf/gguf.hpp"
#include "dylora/io/gguf/modules.hpp"
#include "dylora/io/gguf/names.hpp"
#include "dylora/io/gguf/scale.hpp"
#include "dylora/io/gguf/writer.hpp"
#include "dylora/io/load_report.hpp"

/// LoRA adapters as llama.cpp loads them (its src/llama-adapter.cpp): two tensors for each module, A (r × in) and B (out × r), and one α
/// for all, so that the scale of a module is α / r. Without an α, or with α = 0, it is 1.
///
///     const GgufOptions options{.architecture = "gpt2", .name = gguf_gpt2_name};
///     save_gguf("adapter.gguf", model, 4, options);     // the first 4 components of every adapter
///     load_gguf("adapter.gguf", model, options);
///
/// A and B are written as they are for every architecture: Hugging Face's Conv1D of GPT-2 has its weight transposed, but not its adapter.
namespace dylora {

namespace detail {

/// `cut` are the tensors of the modules without a component.
inline std::vector<AdapterScale> write_gguf_adapter(const std::filesystem::path& path, const std::vector<GgufFactors>& modules,
                                                    const std::vector<std::string>& cut, const GgufOptions& options) {
  std::vector<AdapterScale> report;
  const float alpha = gguf_alpha(modules, options.baked);
  GgufContents contents;
  contents.metadata = {
      {"general.architecture", options.architecture}, {"general.type", std::string("adapter")}, {"adapter.type", std::string("lora")}};
  if (alpha > 0) contents.metadata.push_back({"adapter.lora.alpha", alpha});
  if (!cut.empty()) contents.metadata.push_back({rank_0_key, GgufArray(cut)});
  std::vector<RowMatrix<float>> values;
  values.reserve(modules.size());
  for (const GgufFactors& module : modules) {
    const float scale = gguf_scale(alpha, module.rank());
    const double missing = scale == static_cast<float>(module.scale) ? 1 : module.scale / static_cast<double>(scale);
    values.emplace_back((missing * module.B).cast<float>());
    if (!module.A.allFinite() || !values.back().allFinite()) {
      throw NonFiniteError("save_gguf: " + module.place.subject() + ": expected values that are finite as F32, got others");
    }
    contents.tensors.push_back(gguf_tensor(tensor_view(module.place.in_file + ".weight.lora_a", module.A)));
    contents.tensors.push_back(gguf_tensor(tensor_view(module.place.in_file + ".weight.lora_b", values.back())));
    report.push_back({module.place.in_file, module.rank(), alpha, scale});
  }
  for (const std::string& tensor : cut) report.push_back({tensor});
  require_writable(contents);
  AtomicFile file(path);
  write_gguf(file, contents);
  file.commit();
  return report;
}

}  // namespace detail

/// Writes every adapter at its own rank, one for each in the order of for_each_layer, in F32. Those of rank 0 are named in an entry of this
/// library, "dylora.rank_0", so that loading leaves no other adapter in their place. Returns what was written. A, B and the scale of a
/// float model are in the file to the bit; but where no α gives all modules their scales, B takes along the rest, and is rounded once.
///
/// Throws with no file changed: std::invalid_argument unless there is a rank in [0, its components] for each adapter, for a model that
/// trains something else besides, for a module that llama.cpp has no tensor for or whose scale is 0, and if nothing is left to write;
/// NonFiniteError for values that are not finite in F32 and for a scale that is not finite; FileError, as when another process is saving to
/// the path.
template <class T>
std::vector<AdapterScale> save_gguf(const std::filesystem::path& path, const T& model, const std::vector<Index>& ranks,
                                    const GgufOptions& options) {
  std::vector<detail::GgufFactors> modules;
  std::vector<std::string> cut;
  const detail::GgufFormat format{"save_gguf", options};
  detail::for_each_module_at(format, model, ranks, [&](const detail::GgufPlace& place, const auto&, const auto& values) {
    if (values.factors.A.rows() == 0) return cut.push_back(place.in_file);
    modules.push_back(detail::gguf_factors(place, values.factors));
  });
  return detail::write_gguf_adapter(path, modules, cut, options);
}

/// Writes every adapter at one rank; those that have fewer components, with all they have.
template <class T>
std::vector<AdapterScale> save_gguf(const std::filesystem::path& path, const T& model, Index rank, const GgufOptions& options) {
  return save_gguf(path, model, detail::same_rank(detail::GgufFormat{"save_gguf", options}, model, rank), options);
}

/// Every adapter takes the rank that the file has for it as its max_rank, and the scale α / r by its alpha. Its scale rule stays, and says
/// what the scale is at lower ranks; gradients and optimisers made before no longer fit. Those that the file says have rank 0 get no
/// component. F32, F16, BF16 and F64 are read. A plain LoRA has its components in no order: ranks/order.hpp orders them.
///
/// With nothing changed, throws FormatError, beginning with `file`, for what is no LoRA of options.architecture; for a pair that lacks one
/// half, does not fit, is quantised or not finite; and if options.strict, with both lists, when the model and the file do not have the same
/// adapters. Throws std::invalid_argument as save_gguf does for the model's modules, and for an adapter whose scale rule has no such scale.
template <class T>
LoadReport load_gguf(const GgufContents& contents, const std::string& file, T& model, const GgufOptions& options) {
  detail::require_gguf_options(options);
  GgufAdapter adapters(contents, file, options);
  const detail::GgufFormat format{"load_gguf", options};
  return detail::load_adapters(format, adapters, model, options.strict, [&]<class A>(const auto& place, const A& module) {
    auto factors = adapters.take<typename A::Scalar>(place.in_file, module.in_features(), module.out_features(), place.heads);
    return factors ? std::optional(FileAdapter<typename A::Scalar>{std::move(*factors), adapters.alpha()}) : std::nullopt;
  });
}

/// The same from a file.
template <class T>
LoadReport load_gguf(const std::filesystem::path& path, T& model, const GgufOptions& options) {
  const GgufFile file(path);
  return load_gguf(file.contents(), file.name(), model, options);
}

}  // namespace dylora

#endif
