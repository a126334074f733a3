#ifndef DYLORA_IO_PEFT_TENSORS_HPP
#define DYLORA_IO_PEFT_TENSORS_HPP

#include <functional>
#include <map>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/io/tensor.hpp"

/// How PEFT names the tensors of an adapter: "base_model.model.", the path of the module, ".lora_A.weight" (r × in) or ".lora_B.weight"
/// (out × r).
namespace dylora {

inline constexpr std::string_view peft_prefix = "base_model.model.";

inline std::string peft_tensor_name(std::string_view module, char factor) {
  return std::string(peft_prefix) + std::string(module) + ".lora_" + factor + ".weight";
}

/// Where a layer is inside the wrapped model: its name in this model after this model's own path, which may end with its dot or not.
/// Throws std::invalid_argument for what is no dotted path then: a layer by itself has no name and needs a prefix.
inline std::string peft_module_path(std::string_view prefix, std::string_view name) {
  const std::string_view own = prefix.ends_with('.') ? prefix.substr(0, prefix.size() - 1) : prefix;
  const std::string path = std::string(own) + (own.empty() || name.empty() ? "" : ".") + std::string(name);
  if (path.empty() || path.front() == '.' || path.back() == '.' || path.find("..") != path.npos)
    throw std::invalid_argument("PEFT: prefix: expected the path inside the wrapped model of what has no name itself, got " +
                                in_quotes(prefix));
  return path;
}

/// The factors of one module; null where there is no such tensor.
struct PeftFactors {
  const TensorView* A = nullptr;
  const TensorView* B = nullptr;
};

/// The tensors of an adapter by the paths of their modules.
struct PeftTensors {
  std::map<std::string, PeftFactors, std::less<>> modules;
  std::vector<std::string> others;  ///< names that are not those of factors
  std::string adapter;              ///< the adapter's name, where the tensors have it: "….lora_A.default.weight"
};

namespace detail {

struct PeftTensorName {
  std::string_view module;
  char factor = 'A';
  std::string_view adapter = {};
  std::string_view kind = {};  // "weight" or "bias"
};

inline std::optional<PeftTensorName> parse_peft_tensor_name(std::string_view name) {
  const std::size_t at = name.rfind(".lora_");
  if (!name.starts_with(peft_prefix) || at == name.npos || at <= peft_prefix.size()) return std::nullopt;
  PeftTensorName result{.module = name.substr(peft_prefix.size(), at - peft_prefix.size())};
  std::string_view rest = name.substr(at + std::string_view(".lora_").size());
  if (!rest.starts_with("A.") && !rest.starts_with("B.")) return std::nullopt;
  result.factor = rest.front();
  rest.remove_prefix(2);
  if (const std::size_t dot = rest.find('.'); dot != rest.npos) {
    if (dot == 0) return std::nullopt;
    result.adapter = rest.substr(0, dot);
    rest.remove_prefix(dot + 1);
  }
  result.kind = rest;
  return rest == "weight" || rest == "bias" ? std::optional(result) : std::nullopt;
}

}  // namespace detail

/// Sorts the tensors, which must outlive the result. Throws FormatError, beginning with `file`, for those that change what the factors mean
/// (magnitudes, biases), for factors of embeddings and convolutions, and for several adapters in one file.
inline PeftTensors sort_peft_tensors(std::span<const TensorView> tensors, const std::string& file) {
  PeftTensors sorted;
  for (const TensorView& tensor : tensors) {
    const auto fail = [&](const std::string& what) { throw FormatError(file + ": tensor " + in_quotes(tensor.name) + ": " + what); };
    if (tensor.name.find(".lora_magnitude_vector") != tensor.name.npos)
      fail("expected the factors of a plain LoRA, got a magnitude of DoRA, which is not supported");
    if (tensor.name.find(".lora_embedding_") != tensor.name.npos)
      fail("expected the factors of linear layers, got one of an embedding, which is not supported");
    const std::optional<detail::PeftTensorName> name = detail::parse_peft_tensor_name(tensor.name);
    if (!name) {
      sorted.others.push_back(tensor.name);
      continue;
    }
    if (name->kind == "bias") fail("expected the factors of a plain LoRA, got a bias (lora_bias), which is not supported");
    if (tensor.shape.size() != 2)
      fail("expected a matrix, the factor of a linear layer, got " + describe_shape(tensor.shape) + ", which is not supported");
    if (sorted.modules.empty()) sorted.adapter = name->adapter;
    if (name->adapter != sorted.adapter)
      fail("expected tensors of one adapter, called " + in_quotes(sorted.adapter) + ", got one of " + in_quotes(name->adapter));
    PeftFactors& factors = sorted.modules[std::string(name->module)];
    (name->factor == 'A' ? factors.A : factors.B) = &tensor;
  }
  return sorted;
}

}  // namespace dylora

#endif
