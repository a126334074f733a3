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
#include "dylora/io/bytes/tensor.hpp"
#include "dylora/io/peft/kinds.hpp"

/// How PEFT names the tensors of an adapter: "base_model.model.", the path of the module, and then
///
///     .lora_A.weight, .lora_B.weight          of a linear layer (rank × in, out × rank) or a convolution (rank × in × height × width,
///                                             out × rank / groups × 1 × 1)
///     .lora_embedding_A, .lora_embedding_B    of an embedding (rank × vocabulary, width × rank)
///     .lora_magnitude_vector                  under DoRA (out); some have .weight after it, as a model's own state does
///
/// where one may have the adapter's name, too: ".lora_A.default.weight".
namespace dylora {

inline constexpr std::string_view peft_prefix = "base_model.model.";

inline std::string peft_tensor_name(std::string_view module, char factor, PeftKind kind = PeftKind::linear) {
  const std::string path = std::string(peft_prefix) + std::string(module);
  return kind == PeftKind::embedding ? path + ".lora_embedding_" + factor : path + ".lora_" + factor + ".weight";
}

inline std::string peft_magnitude_name(std::string_view module) {
  return std::string(peft_prefix) + std::string(module) + ".lora_magnitude_vector";
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

/// The tensors of one module; null where there is no such tensor.
struct PeftFactors {
  const TensorView* A = nullptr;
  const TensorView* B = nullptr;
  const TensorView* magnitude = nullptr;  ///< of DoRA
  PeftKind kind = PeftKind::linear;       ///< of A and B
};

/// The tensors of an adapter by the paths of their modules.
struct PeftTensors {
  std::map<std::string, PeftFactors, std::less<>> modules;
  std::vector<std::string> others;  ///< names that are not those of such tensors
  std::string adapter;              ///< the adapter's name, where the tensors have it: "….lora_A.default.weight"
};

namespace detail {

struct PeftTensorName {
  std::string_view module;
  char part = 'A';  // or 'B', or 'm' for the magnitude
  bool embedding = false;
  bool bias = false;
  std::string_view adapter = {};
};

/// None for what is no name of such a tensor.
inline std::optional<PeftTensorName> parse_peft_tensor_name(std::string_view name) {
  const std::size_t at = name.rfind(".lora_");
  if (!name.starts_with(peft_prefix) || at == name.npos || at <= peft_prefix.size()) return std::nullopt;
  PeftTensorName result{.module = name.substr(peft_prefix.size(), at - peft_prefix.size())};
  std::string_view rest = name.substr(at + std::string_view(".lora_").size());
  const auto take = [&](std::string_view beginning) {
    const bool there = rest.starts_with(beginning);
    if (there) rest.remove_prefix(beginning.size());
    return there;
  };
  const bool magnitude = take("magnitude_vector");
  result.embedding = !magnitude && take("embedding_");
  if (!magnitude && !rest.starts_with('A') && !rest.starts_with('B')) return std::nullopt;
  result.part = magnitude ? 'm' : rest.front();
  if (!magnitude) rest.remove_prefix(1);
  if (magnitude && rest.ends_with(".weight")) rest.remove_suffix(std::string_view(".weight").size());
  if (!magnitude && !result.embedding) {
    result.bias = rest.ends_with(".bias");
    if (!result.bias && !rest.ends_with(".weight")) return std::nullopt;
    rest.remove_suffix(std::string_view(result.bias ? ".bias" : ".weight").size());
  }
  if (rest.empty()) return result;
  if (rest.front() != '.' || rest.size() == 1 || rest.find('.', 1) != rest.npos) return std::nullopt;
  result.adapter = rest.substr(1);
  return result;
}

}  // namespace detail

/// Sorts the tensors, which must outlive the result. Throws FormatError, beginning with `file`, for those that change what the factors mean
/// (biases), for factors that no linear layer, embedding or two-dimensional convolution has, and for several adapters in one file.
inline PeftTensors sort_peft_tensors(std::span<const TensorView> tensors, const std::string& file) {
  PeftTensors sorted;
  for (const TensorView& tensor : tensors) {
    const auto fail = [&](const std::string& what) { throw FormatError(file + ": tensor " + in_quotes(tensor.name) + ": " + what); };
    const std::optional<detail::PeftTensorName> name = detail::parse_peft_tensor_name(tensor.name);
    if (!name) {
      sorted.others.push_back(tensor.name);
      continue;
    }
    if (name->bias) fail("expected the factors of a plain LoRA, got a bias (lora_bias), which is not supported");
    if (sorted.modules.empty()) sorted.adapter = name->adapter;
    if (name->adapter != sorted.adapter)
      fail("expected tensors of one adapter, called " + in_quotes(sorted.adapter) + ", got one of " + in_quotes(name->adapter));
    PeftFactors& factors = sorted.modules[std::string(name->module)];
    const TensorView*& place = name->part == 'A' ? factors.A : name->part == 'B' ? factors.B : factors.magnitude;
    if (place != nullptr) fail("expected one of its kind, got " + in_quotes(place->name) + " too");
    place = &tensor;
    if (name->part == 'm') continue;
    const bool convolution = !name->embedding && tensor.shape.size() == 4;
    if (tensor.shape.size() != 2 && !convolution)
      fail("expected a matrix, the factor of a linear layer or an embedding, or one of a two-dimensional convolution, got " +
           describe_shape(tensor.shape) + ", which is not supported");
    const PeftKind kind = name->embedding ? PeftKind::embedding : convolution ? PeftKind::convolution : PeftKind::linear;
    const bool first = factors.A == nullptr || factors.B == nullptr;
    if (!first && kind != factors.kind)
      fail("expected a factor of " + described(factors.kind) + ", as the other one, got one of " + described(kind));
    factors.kind = kind;
  }
  return sorted;
}

}  // namespace dylora

#endif
