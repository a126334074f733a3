#ifndef DYLORA_IO_GGUF_MODULES_HPP
#define DYLORA_IO_GGUF_MODULES_HPP

#include <Eigen/Core>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/adapter_file.hpp"
#include "dylora/io/portable_adapters.hpp"

namespace dylora {

struct GgufOptions {
  std::string architecture = {};  ///< general.architecture of the base model: "gpt2", "llama" and so on; llama.cpp refuses another
  std::function<std::string(std::string_view module)> name = {};  ///< the base's tensor for a module, without ".weight": gguf_gpt2_name, …
  Index heads = 0;            ///< where llama.cpp has the rows of q and k in another order, as for "llama"; 0 leaves the rows as they are
  Index key_value_heads = 0;  ///< the same for k; 0 means as many as heads
  bool converted = false;     ///< the rows of the model's q and k are in that order already: its weights came from a GGUF file
  bool baked = false;         ///< saving: B takes all of the scale along, so that a reader who ignores alpha is right, too
  bool strict = true;         ///< loading: whether it is an error if the model lacks an adapter of the file or the file one of the model
};

namespace detail {

/// The tensors are "….weight.lora_a" and "….weight.lora_b", after the name in the file.
struct GgufPlace : AdapterPlace {
  Index heads = 0;  // of the rows that are in another order in the file; 0 if they are not
};

using GgufRowOrder = Eigen::PermutationMatrix<Eigen::Dynamic, Eigen::Dynamic, Index>;

/// Where each row of a weight of Hugging Face's Llama is in llama.cpp's: in each head, the two halves that RoPE pairs there become pairs of
/// neighbours. As the transposition of heads × 2 × head_dim/2 to heads × head_dim/2 × 2. Multiply a matrix by it from the left.
inline GgufRowOrder gguf_row_order(Index rows, Index heads) {
  const Index head_dim = rows / heads, half = head_dim / 2;
  GgufRowOrder order(rows);
  for (Index i = 0; i < rows; ++i) {
    const Index in_head = i % head_dim;
    order.indices()(i) = i - in_head + 2 * (in_head % half) + in_head / half;
  }
  return order;
}

inline void require_gguf_options(const GgufOptions& options) {
  if (options.architecture.empty()) throw std::invalid_argument("GgufOptions: architecture: expected the base model's, got none");
  if (!options.name) throw std::invalid_argument("GgufOptions: name: expected a function from modules to tensors, got none");
}

/// Throws std::invalid_argument where llama.cpp would refuse the tensor, skip it or take it for something else.
inline GgufPlace gguf_place(std::string_view module, std::string tensor, Index out_features, const GgufOptions& options) {
  GgufPlace result{{std::string(module), std::move(tensor)}};
  const auto refuse = [&](const std::string& what) {
    throw std::invalid_argument(result.subject() + ", tensor " + in_quotes(result.in_file) + ": " + what);
  };
  const std::string_view name = result.in_file;
  if (name.empty()) refuse("expected a name from GgufOptions::name, got none");
  if (name == "token_embd" || name == "position_embd") refuse("expected a linear layer, got an embedding: its adapter has another layout");
  if (name.ends_with("_norm")) refuse("expected a linear layer, got a norm: llama.cpp passes over its adapter");

  const bool query = name.ends_with(".attn_q"), key = name.ends_with(".attn_k");
  if (options.converted || !(query || key)) return result;
  if (options.heads == 0 && options.architecture == "llama") refuse("GgufOptions::heads: expected the number of heads, got 0");
  result.heads = key && options.key_value_heads > 0 ? options.key_value_heads : options.heads;
  if (result.heads < 0 || (result.heads > 0 && out_features % (2 * result.heads) != 0)) {
    refuse("expected a number of heads that divides its " + std::to_string(out_features) + " rows into even parts, got " +
           std::to_string(result.heads));
  }
  return result;
}

/// GGUF as io/adapter_file.hpp has formats.
struct GgufFormat {
  std::string_view caller;
  const GgufOptions& options;

  /// Calls f(place, module) for each adapter of the model that a file can have. Passes over those without any component that have no name,
  /// and what has nothing to train. Throws std::invalid_argument, naming the module, for an adapter that is no low-rank product and for one
  /// that has no tensor of its own.
  template <class T, class F>
  void for_each_module(T& model, F&& f) const {
    require_gguf_options(options);
    std::map<std::string, std::string> modules;
    const auto own_name = [](std::string_view module) { return std::string(module); };
    for_each_portable_adapter(model, caller, own_name, [&]<class A>(const std::string& module, A& adapter) {
      std::string tensor = options.name(module);
      if (tensor.empty() && adapter.components() == 0) return;
      const GgufPlace place = gguf_place(module, std::move(tensor), adapter.out_features(), options);
      const auto [other, added] = modules.try_emplace(place.in_file, module);
      if (!added) {
        throw std::invalid_argument(place.subject() + ": expected a tensor of its own, got " + in_quotes(place.in_file) + ", which is " +
                                    in_quotes(other->second) + "'s");
      }
      f(place, AdapterModule<A>(adapter));
    });
  }
};

}  // namespace detail

}  // namespace dylora

#endif
