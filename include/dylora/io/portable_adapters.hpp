#ifndef DYLORA_IO_PORTABLE_ADAPTERS_HPP
#define DYLORA_IO_PORTABLE_ADAPTERS_HPP

#include <algorithm>
#include <concepts>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "dylora/adapters/adapter.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"

/// The adapters of a model that other programs can have: what every format of files asks of them.
namespace dylora {

/// A layer whose outputs have a trained length besides: what its file says of its adapter alone is another function.
template <class L>
concept MagnitudeLayer = requires(const L& layer) { layer.magnitude; };

/// A frozen table whose columns are looked up.
template <class L>
concept EmbeddingLayer = requires(const L& layer) {
  { layer.vocabulary() } -> std::same_as<Index>;
};

/// A convolution: projections of the patches of its input, one for each group.
template <class M>
concept ConvolutionModule = requires(const M& module) {
  module.groups.front();
  module.unfold.options().kernel;
};

namespace detail {

template <class F>
struct ModuleVisitor {
  F& f;

  template <class M>
  auto enter(std::string_view name, M& module) const {
    constexpr bool is_module = AdaptedLayer<M> || ConvolutionModule<M>;
    if constexpr (is_module) f(name, module);
    return std::bool_constant<!is_module>{};
  }
};

/// Throws for a part that has something to train, and that no file has a place for.
template <class T, class NameOf>
void require_nothing_trained(const T& part, std::string_view what, NameOf&& name_of, std::string_view name) {
  if (parameter_count(part) > 0)
    throw std::invalid_argument(std::string(what) + ": module " + in_quotes(name_of(name)) +
                                ": expected an adapter that is one low-rank product (PortableAdapter), got another kind");
}

}  // namespace detail

/// Calls f(name, module) for each module inside the model as other programs divide it: for each layer of for_each_layer, but where several
/// are one module, as the groups of a convolution, for that.
template <class T, class F>
void for_each_module(T& model, F&& f) {
  visit_members(detail::ModuleVisitor<F>{f}, model);
}

/// Calls f(adapter) for each PortableAdapter of a layer inside the model, in the order of for_each_layer.
template <class T, class F>
void for_each_portable_adapter(T& model, F&& f) {
  for_each_layer(model, [&](std::string_view, auto& layer) {
    if constexpr (PortableAdapter<std::remove_cvref_t<decltype(layer.adapter)>>) f(layer.adapter);
  });
}

/// Calls f(name_of(name), adapter) for each PortableAdapter of a linear layer, and passes over what has nothing to train. Throws
/// std::invalid_argument, beginning with `what` and naming the module, for an adapter of another kind and for one of another layer than a
/// linear one, one with a magnitude included: no file that has room for adapters alone has a place for it.
template <class T, class NameOf, class F>
void for_each_portable_adapter(T& model, std::string_view what, NameOf&& name_of, F&& f) {
  for_each_module(model, [&]<class M>(std::string_view name, M& module) {
    const auto refuse = [&](const auto& part, const char* got) {
      if (parameter_count(part) > 0)
        throw std::invalid_argument(std::string(what) + ": module " + in_quotes(name_of(name)) +
                                    ": expected the adapter of a linear layer, got " + got + ", which the file has no place for");
    };
    if constexpr (ConvolutionModule<M>) {
      refuse(module, "that of a convolution");
    } else if constexpr (MagnitudeLayer<M>) {
      refuse(module.adapter, "one with a magnitude");
    } else if constexpr (EmbeddingLayer<M>) {
      refuse(module.adapter, "that of an embedding");
    } else if constexpr (PortableAdapter<std::remove_cvref_t<decltype(module.adapter)>>) {
      f(name_of(name), module.adapter);
    } else {
      detail::require_nothing_trained(module.adapter, what, name_of, name);
    }
  });
}

/// Throws std::invalid_argument, beginning with `what`, for a trained parameter that is outside of every layer, or in one besides its
/// adapter and magnitude: a file of adapters would lose it in silence.
template <class T>
void require_only_adapters(const T& model, std::string_view what) {
  std::vector<std::string> layers;
  for_each_layer(model, [&]<class L>(std::string_view name, const L& layer) {
    layers.push_back(std::string(name) + (name.empty() ? "" : "."));
    Index others = parameter_count(layer) - parameter_count(layer.adapter);
    if constexpr (MagnitudeLayer<L>) others -= layer.magnitude.size();
    if (others != 0)
      throw std::invalid_argument(std::string(what) + ": layer " + in_quotes(name) + ": expected one that trains its adapter alone, got " +
                                  std::to_string(others) + " parameters besides, which the files have no place for");
  });
  for_each_parameter(
      [&](Parameter parameter, const auto&) {
        const bool inside = std::any_of(layers.begin(), layers.end(), [&](const auto& layer) { return parameter.name.starts_with(layer); });
        if (!inside)
          throw std::invalid_argument(std::string(what) + ": parameter " + in_quotes(parameter.name) +
                                      ": expected one of a layer's adapter, got another, which the files have no place for");
      },
      model);
}

}  // namespace dylora

#endif
