#ifndef DYLORA_IO_GGUF_NAMES_HPP
#define DYLORA_IO_GGUF_NAMES_HPP

#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

/// What llama.cpp calls the tensors of a model, after its modules' names at Hugging Face. "lm_head" is "output" there, which a model has
/// only if its embeddings are not tied: llama.cpp refuses an adapter for a tensor that the base lacks.
namespace dylora {

namespace detail {

/// Pairs of a module and its tensor.
using GgufNames = std::initializer_list<std::pair<std::string_view, std::string_view>>;

inline std::string gguf_name_among(GgufNames names, std::string_view module) {
  for (const auto& [from, to] : names) {
    if (from == module) return std::string(to);
  }
  return "";
}

/// "h.12.attn.c_attn" becomes "blk.12." and what `in_block` has for "attn.c_attn", where `blocks` is "h.".
inline std::string gguf_name(std::string_view module, std::string_view blocks, GgufNames in_block, GgufNames outside) {
  if (!module.starts_with(blocks)) return gguf_name_among(outside, module);
  module.remove_prefix(blocks.size());
  const std::size_t dot = module.find('.');
  const std::string_view block = module.substr(0, dot);
  if (block.empty() || dot == module.npos || block.find_first_not_of("0123456789") != block.npos) return "";
  const std::string name = gguf_name_among(in_block, module.substr(dot + 1));
  return name.empty() ? "" : "blk." + std::string(block) + '.' + name;
}

inline std::string_view without_prefix(std::string_view text, std::string_view prefix) {
  return text.starts_with(prefix) ? text.substr(prefix.size()) : text;
}

}  // namespace detail

/// GPT-2: "h.0.attn.c_attn", with or without "transformer." in front, is "blk.0.attn_qkv". The projections of an attention go by this
/// library's names, too: qkv_proj and o_proj. Empty for a module that llama.cpp has no name for, as q, k and v apart.
inline std::string gguf_gpt2_name(std::string_view module) {
  return detail::gguf_name(detail::without_prefix(module, "transformer."), "h.",
                           {{"attn.c_attn", "attn_qkv"},
                            {"attn.qkv_proj", "attn_qkv"},
                            {"attn.c_proj", "attn_output"},
                            {"attn.o_proj", "attn_output"},
                            {"mlp.c_fc", "ffn_up"},
                            {"mlp.c_proj", "ffn_down"},
                            {"ln_1", "attn_norm"},
                            {"ln_2", "ffn_norm"}},
                           {{"wte", "token_embd"}, {"wpe", "position_embd"}, {"ln_f", "output_norm"}, {"lm_head", "output"}});
}

/// Llama and what is built like it: "model.layers.0.self_attn.q_proj", with or without "model.", is "blk.0.attn_q". Empty for a module
/// that llama.cpp has no name for.
inline std::string gguf_llama_name(std::string_view module) {
  return detail::gguf_name(detail::without_prefix(module, "model."), "layers.",
                           {{"self_attn.q_proj", "attn_q"},
                            {"self_attn.k_proj", "attn_k"},
                            {"self_attn.v_proj", "attn_v"},
                            {"self_attn.o_proj", "attn_output"},
                            {"mlp.gate_proj", "ffn_gate"},
                            {"mlp.up_proj", "ffn_up"},
                            {"mlp.down_proj", "ffn_down"},
                            {"input_layernorm", "attn_norm"},
                            {"post_attention_layernorm", "ffn_norm"}},
                           {{"embed_tokens", "token_embd"}, {"norm", "output_norm"}, {"lm_head", "output"}});
}

}  // namespace dylora

#endif
