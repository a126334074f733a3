#ifndef DYLORA_IO_PEFT_MODULES_HPP
#define DYLORA_IO_PEFT_MODULES_HPP

#include <algorithm>
#include <cstddef>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/adapters/adapter.hpp"
#include "dylora/adapters/factors.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/adapter_file.hpp"
#include "dylora/io/peft/kinds.hpp"
#include "dylora/io/peft/tensors.hpp"
#include "dylora/io/portable_adapters.hpp"

/// The modules of a model as PEFT has them: what each gives a file, and takes from one.
namespace dylora::detail {

/// A frozen weight and its adapter: a linear layer, with a magnitude or without, or an embedding.
template <class L>
class PeftLayer : public AdapterModule<std::remove_reference_t<decltype((std::declval<L&>().adapter))>> {
  using Base = AdapterModule<std::remove_reference_t<decltype((std::declval<L&>().adapter))>>;

 public:
  using S = typename Base::Scalar;

  explicit PeftLayer(L& layer) : Base(layer.adapter), layer_(layer) {}

  PeftShape shape() const {
    return {.kind = EmbeddingLayer<L> ? PeftKind::embedding : PeftKind::linear,
            .channels = Base::in_features(),
            .out = Base::out_features(),
            .dora = MagnitudeLayer<L>};
  }

  PeftAdapter<S> values(Index rank) const {
    PeftAdapter<S> result{Base::values(rank)};
    if constexpr (MagnitudeLayer<L>) {
      if (rank == 0) return result;
      const auto& magnitude = layer_.magnitude;
      result.magnitude = magnitude.col(0);
      for (Index k = 1; k < std::min(rank, magnitude.cols()); ++k) result.magnitude += magnitude.col(k);
    }
    return result;
  }

  double prepare(PeftAdapter<S> values, Assignments& assignments) const {
    auto adapter = with_factors(layer_.adapter, std::move(values.factors));
    if constexpr (MagnitudeLayer<L>) {
      auto magnitude = layer_.magnitude;
      if constexpr (!decltype(magnitude)::IsVectorAtCompileTime) magnitude.setZero(magnitude.rows(), adapter.components());
      if (values.magnitude.size() > 0) magnitude.col(0) = values.magnitude;
      assignments.add(layer_.magnitude, std::move(magnitude));
    }
    return add_adapter(assignments, layer_.adapter, std::move(adapter));
  }

 private:
  L& layer_;
};

/// A convolution, whose groups are projections with an adapter each. PEFT's A reads the channels of all groups: here, each of its rows
/// reads those of one, and is 0 for the others.
template <class Convolution>
class PeftConvolution {
  using P = std::remove_cvref_t<decltype(std::declval<Convolution&>().groups.front())>;
  using A = std::remove_cvref_t<decltype(std::declval<P&>().adapter)>;

 public:
  using Scalar = typename A::Scalar;
  using S = Scalar;

  explicit PeftConvolution(Convolution& convolution) : convolution_(convolution) {}

  PeftShape shape() const {
    const auto& options = convolution_.unfold.options();
    return {.kind = PeftKind::convolution,
            .channels = convolution_.in_channels(),
            .out = convolution_.out_channels(),
            .kernel_height = options.kernel.height,
            .kernel_width = options.kernel.width,
            .groups = groups()};
  }
  Index max_rank() const { return convolution_.max_rank(); }
  /// The most that any group has.
  Index components() const {
    Index most = 0;
    for (const P& group : convolution_.groups) most = std::max(most, group.adapter.components());
    return most;
  }

  /// Throws std::invalid_argument unless the groups have one rank and one scale, and for dilations, which PEFT's A does not have.
  PeftAdapter<S> values(Index rank) const {
    require_no_dilation();
    std::vector<LowRankFactors<S>> parts;
    for (const P& group : convolution_.groups) parts.push_back(group.adapter.factors(std::min(rank, group.adapter.max_rank())));
    const Index b = parts.front().A.rows(), in = parts.front().A.cols(), out = parts.front().B.rows();
    LowRankFactors<S> whole{RowMatrix<S>::Zero(b * groups(), in * groups()), MatrixX<S>(out * groups(), b), parts.front().scale};
    for (std::size_t g = 0; g < parts.size(); ++g) {
      const auto group = static_cast<Index>(g);
      if (parts[g].A.rows() != b || parts[g].scale != whole.scale)
        throw std::invalid_argument("expected groups of one rank and scale, got group 0 of rank " + std::to_string(b) + " and scale " +
                                    std::to_string(whole.scale) + ", group " + std::to_string(g) + " of rank " +
                                    std::to_string(parts[g].A.rows()) + " and scale " + std::to_string(parts[g].scale));
      whole.A.block(group * b, group * in, b, in) = parts[g].A;
      whole.B.middleRows(group * out, out) = parts[g].B;
    }
    return {{std::move(whole)}};
  }

  double prepare(PeftAdapter<S> values, Assignments& assignments) const {
    require_no_dilation();
    const LowRankFactors<S>& whole = values.factors;
    const Index b = whole.A.rows() / groups(), in = whole.A.cols() / groups(), out = whole.B.rows() / groups();
    double scale = 0;
    for (Index g = 0; g < groups(); ++g) {
      auto& adapter = convolution_.groups[static_cast<std::size_t>(g)].adapter;
      scale = add_adapter(assignments, adapter,
                          with_factors(adapter, {whole.A.block(g * b, g * in, b, in), whole.B.middleRows(g * out, out), whole.scale}));
    }
    return scale;
  }

 private:
  Index groups() const { return static_cast<Index>(convolution_.groups.size()); }

  void require_no_dilation() const {
    const auto kernel = convolution_.unfold.options().kernel, dilation = convolution_.unfold.options().dilation;
    const bool dilated = (kernel.height > 1 && dilation.height > 1) || (kernel.width > 1 && dilation.width > 1);
    if (dilated)
      throw std::invalid_argument("expected a convolution without dilation, which PEFT leaves out of its adapter, got " +
                                  std::to_string(dilation.height) + " × " + std::to_string(dilation.width));
  }

  Convolution& convolution_;
};

/// PEFT as io/adapter_file.hpp has formats.
struct PeftFormat {
  std::string_view caller;
  std::string_view prefix;  // this and the next as in SavePeftOptions
  const std::function<std::string(std::string_view)>& name;

  /// Calls f(place, module) for each module with a PortableAdapter, a PeftLayer or a PeftConvolution. Passes over what has nothing to
  /// train. Throws std::invalid_argument, naming the module, for one that PEFT has no place for.
  template <class T, class F>
  void for_each_module(T& model, F&& f) const {
    const auto path_of = [&](std::string_view module) { return peft_module_path(prefix, name ? name(module) : std::string(module)); };
    const auto place_of = [&](std::string_view module) {
      const std::string path = path_of(module);
      return AdapterPlace{path, path};
    };
    dylora::for_each_module(model, [&]<class M>(std::string_view of, M& module) {
      if constexpr (ConvolutionModule<M>) {
        using P = std::remove_cvref_t<decltype(module.groups.front())>;
        if constexpr (!MagnitudeLayer<P> &&
                      requires(P& group) { requires PortableAdapter<std::remove_cvref_t<decltype(group.adapter)>>; }) {
          f(place_of(of), PeftConvolution<M>(module));
        } else {
          require_nothing_trained(module, caller, path_of, of);
        }
      } else if constexpr (PortableAdapter<std::remove_cvref_t<decltype(module.adapter)>>) {
        f(place_of(of), PeftLayer<M>(module));
      } else {
        require_nothing_trained(module.adapter, caller, path_of, of);
      }
    });
  }
};

}  // namespace dylora::detail

#endif
