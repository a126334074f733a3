#ifndef DYLORA_IO_GGUF_ADAPTER_READER_HPP
#define DYLORA_IO_GGUF_ADAPTER_READER_HPP

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "dylora/adapters/factors.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/adapter_file.hpp"
#include "dylora/io/bytes/tensor.hpp"
#include "dylora/io/gguf/contents.hpp"
#include "dylora/io/gguf/modules.hpp"
#include "dylora/io/gguf/scale.hpp"

namespace dylora {

namespace detail {

/// The two tensors of a module.
struct GgufPair {
  const GgufTensor *a = nullptr, *b = nullptr;
};

}  // namespace detail

/// What an adapter file says, read without a model. Each module is taken out; what is left was for none. Holds pointers to the tensors of
/// the contents, which must outlive it.
///
///     GgufAdapter adapter(contents, "adapter.gguf", {.architecture = "gpt2"});
///     const auto factors = adapter.take<float>("blk.0.attn_qkv", 768, 2304);  // Δ = scale · B · A
class GgufAdapter {
 public:
  /// Throws FormatError, beginning with `file`, for what is no LoRA adapter of that architecture.
  GgufAdapter(const GgufContents& contents, std::string file, const GgufOptions& options) : file_(std::move(file)) {
    require_text(contents, "general.type", "adapter");
    require_text(contents, "adapter.type", "lora");
    require_text(contents, "general.architecture", options.architecture);
    if (contents.find("adapter.alora.invocation_tokens") != nullptr) {
      fail("expected an adapter for all tokens, got adapter.alora.invocation_tokens, for what follows some");
    }
    if (contents.find("adapter.lora.alpha") != nullptr) {
      const float* alpha = contents.find_as<float>("adapter.lora.alpha");
      if (alpha == nullptr || !std::isfinite(*alpha)) fail("adapter.lora.alpha: expected a finite number as f32, got another");
      alpha_ = *alpha;
    }
    if (alpha_ == 0) notes_.push_back("there is no adapter.lora.alpha, or it is 0: the scale is 1");
    if (alpha_ < 0) notes_.push_back("adapter.lora.alpha is negative: its sign is now in B");
    if (contents.find(detail::rank_0_key) != nullptr) {
      const auto* array = contents.find_as<GgufArray>(detail::rank_0_key);
      const auto* tensors = array == nullptr ? nullptr : std::get_if<std::vector<std::string>>(array);
      if (tensors == nullptr) fail(std::string(detail::rank_0_key) + ": expected an array of strings, got another value");
      cut_.insert(tensors->begin(), tensors->end());
    }
    for (const GgufTensor& tensor : contents.tensors) {
      const std::string_view name = tensor.name, suffix = ".weight.lora_a";
      const std::string module(name.substr(0, name.size() - std::min(name.size(), suffix.size())));
      if (name.ends_with(".weight.lora_a")) {
        pairs_[module].a = &tensor;
      } else if (name.ends_with(".weight.lora_b")) {
        pairs_[module].b = &tensor;
      } else {
        others_.push_back(tensor.name);
      }
    }
  }

  /// As messages begin with it.
  const std::string& name() const { return file_; }
  /// Of all modules; 0 where the file has none.
  float alpha() const { return alpha_; }
  /// What was assumed or changed on the way.
  const std::vector<std::string>& notes() const { return notes_; }

  /// The factors of a tensor, named without its ".weight.lora_a"; none if the file says nothing about it. B is in the file's order of rows,
  /// or if `heads` are given, for which the file has another (io/gguf/modules.hpp), in the model's. Throws FormatError, naming the tensor,
  /// if they are not an r × in and an out × r matrix of finite numbers.
  template <class S>
  std::optional<LowRankFactors<S>> take(const std::string& base, Index in_features, Index out_features, Index heads = 0) {
    const auto pair = pairs_.extract(base);
    if (cut_.erase(base) > 0) {
      if (!pair.empty()) fail("tensor " + in_quotes(base) + ": expected either factors or a place in " + detail::rank_0_key + ", got both");
      return LowRankFactors<S>{RowMatrix<S>(0, in_features), MatrixX<S>(out_features, 0), 1};
    }
    if (pair.empty()) return std::nullopt;
    const detail::GgufPair tensors = pair.mapped();
    for (const auto& [tensor, suffix] : {std::pair(tensors.a, ".weight.lora_a"), std::pair(tensors.b, ".weight.lora_b")}) {
      if (tensor == nullptr) fail("tensor " + in_quotes(base + suffix) + ": expected it beside its other half, got none");
    }
    const Index rank = std::max<Index>(matrix_view(*tensors.a).shape.front(), 1);
    const TensorView a = matrix_view(*tensors.a, rank, in_features), b = matrix_view(*tensors.b, out_features, rank);
    LowRankFactors<S> factors{finite_matrix_of<S>(a, file_), finite_matrix_of<S>(b, file_)};
    if (detail::gguf_scale(alpha_, rank) == 0)
      fail("adapter.lora.alpha: expected one that is not 0 when divided by a rank of " + std::to_string(rank) + ", got less");
    // Not rounded to float: the adapter does that where it is one of floats, and its alpha is then this one.
    factors.scale = alpha_ == 0 ? 1 : std::abs(static_cast<double>(alpha_)) / static_cast<double>(rank);
    if (alpha_ < 0) factors.B = -factors.B;
    if (heads > 0) factors.B = detail::gguf_row_order(out_features, heads).inverse() * factors.B;
    return factors;
  }

  /// What no module took.
  std::vector<std::string> unmatched() const {
    std::vector<std::string> names = others_;
    for (const auto& [module, pair] : pairs_) {
      for (const GgufTensor* tensor : {pair.a, pair.b}) {
        if (tensor != nullptr) names.push_back(tensor->name);
      }
    }
    for (const std::string& tensor : cut_) names.push_back(std::string(detail::rank_0_key) + ": " + tensor);
    return names;
  }

  [[noreturn]] void fail(const std::string& what) const { throw FormatError(file_ + ": " + what); }

 private:
  void require_text(const GgufContents& contents, const std::string& key, const std::string& expected) const {
    const auto* text = contents.find_as<std::string>(key);
    if (text == nullptr || *text != expected) {
      fail(key + ": expected " + in_quotes(expected) + ", got " + (text == nullptr ? "none" : in_quotes(*text)));
    }
  }

  /// In two dimensions: ggml leaves out trailing ones of extent 1, which lead here, or fills up with them.
  TensorView matrix_view(const GgufTensor& tensor) const {
    std::optional<TensorView> view = tensor.view();
    if (!view || !view->is_floating_point()) {
      fail("tensor " + in_quotes(tensor.name) + ": expected F32, F16, BF16 or F64, got " + std::string(tensor.type->name));
    }
    while (view->shape.size() > 2 && view->shape.front() == 1) view->shape.erase(view->shape.begin());
    while (view->shape.size() < 2) view->shape.insert(view->shape.begin(), 1);
    return *view;
  }

  /// The same, checked before anything is made of a shape that a file without any data may claim.
  TensorView matrix_view(const GgufTensor& tensor, Index rows, Index cols) const {
    TensorView view = matrix_view(tensor);
    const std::vector<Index> expected{rows, cols};
    if (view.shape != expected) {
      fail("tensor " + in_quotes(tensor.name) + ": expected a matrix of " + describe_shape(expected) + ", got " +
           describe_shape(tensor.shape));
    }
    return view;
  }

  std::string file_;
  float alpha_ = 0;
  std::map<std::string, detail::GgufPair> pairs_;
  std::set<std::string> cut_;
  std::vector<std::string> others_, notes_;
};

}  // namespace dylora

#endif
