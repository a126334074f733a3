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
#include "dylora/io/peft/kinds.hpp"
#include "dylora/io/portable_adapters.hpp"

/// The modules of a model as PEFT has them: what each gives a file, and takes from one.
namespace dylora::detail {

/// A load that is ready: nothing has been changed yet.
struct PeftAssignment {
  double scale = 0;  // of the adapter with all its components
  std::function<void()> assign;
};

template <PortableAdapter A>
double whole_scale(const A& adapter) {
  return adapter.components() > 0 ? adapter.factors(adapter.max_rank()).scale : 0;
}

/// A frozen weight and its adapter: a linear layer, with a magnitude or without, or an embedding.
template <class L>
class PeftLayer {
  using A = std::remove_cvref_t<decltype(std::declval<L&>().adapter)>;

 public:
  using Scalar = typename A::Scalar;
  using S = Scalar;

  explicit PeftLayer(L& layer) : layer_(layer) {}

  PeftShape shape() const {
    return {.kind = EmbeddingLayer<L> ? PeftKind::embedding : PeftKind::linear,
            .channels = layer_.adapter.in_features(),
            .out = layer_.adapter.out_features(),
            .dora = MagnitudeLayer<L>};
  }
  Index max_rank() const { return layer_.adapter.max_rank(); }
  Index components() const { return layer_.adapter.components(); }

  PeftAdapter<S> values(Index rank) const {
    PeftAdapter<S> result{layer_.adapter.factors(rank)};
    if constexpr (MagnitudeLayer<L>) {
      if (rank == 0) return result;
      const auto& magnitude = layer_.magnitude;
      result.magnitude = magnitude.col(0);
      for (Index k = 1; k < std::min(rank, magnitude.cols()); ++k) result.magnitude += magnitude.col(k);
    }
    return result;
  }

  PeftAssignment prepare(PeftAdapter<S> values) const {
    A adapter = layer_.adapter;
    adapter.set_factors(std::move(values.factors));
    const double scale = whole_scale(adapter);
    if constexpr (MagnitudeLayer<L>) {
      auto magnitude = layer_.magnitude;
      if constexpr (!decltype(magnitude)::IsVectorAtCompileTime) magnitude.setZero(magnitude.rows(), adapter.components());
      if (values.magnitude.size() > 0) magnitude.col(0) = values.magnitude;
      return {scale, [&layer = layer_, adapter = std::move(adapter), magnitude = std::move(magnitude)]() mutable {
                layer.adapter = std::move(adapter);
                layer.magnitude = std::move(magnitude);
              }};
    } else {
      return {scale, [&layer = layer_, adapter = std::move(adapter)]() mutable { layer.adapter = std::move(adapter); }};
    }
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
    LowRankFactors<S> whole{RowMatrix<S>::Zero(b * groups(), in * groups()), Matrix<S>(out * groups(), b), parts.front().scale};
    for (std::size_t g = 0; g < parts.size(); ++g) {
      const auto group = static_cast<Index>(g);
      if (parts[g].A.rows() != b || parts[g].scale != whole.scale)
        throw std::invalid_argument("expected groups of one rank and scale, got group 0 of rank " + std::to_string(b) + " and scale " +
                                    std::to_string(whole.scale) + ", group " + std::to_string(g) + " of rank " +
                                    std::to_string(parts[g].A.rows()) + " and scale " + std::to_string(parts[g].scale));
      whole.A.block(group * b, group * in, b, in) = parts[g].A;
      whole.B.middleRows(group * out, out) = parts[g].B;
    }
    return {std::move(whole)};
  }

  PeftAssignment prepare(PeftAdapter<S> values) const {
    require_no_dilation();
    const Index b = values.factors.A.rows() / groups(), in = values.factors.A.cols() / groups(), out = values.factors.B.rows() / groups();
    std::vector<A> adapters;
    for (const P& group : convolution_.groups) {
      const auto g = static_cast<Index>(adapters.size());
      adapters.push_back(group.adapter);
      adapters.back().set_factors(
          {values.factors.A.block(g * b, g * in, b, in), values.factors.B.middleRows(g * out, out), values.factors.scale});
    }
    const double scale = whole_scale(adapters.front());
    return {scale, [&convolution = convolution_, adapters = std::move(adapters)]() mutable {
              for (std::size_t g = 0; g < adapters.size(); ++g) convolution.groups[g].adapter = std::move(adapters[g]);
            }};
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

/// Calls f(path_of(name), module) for each module with a PortableAdapter, a PeftLayer or a PeftConvolution. Passes over what has nothing to
/// train. Throws std::invalid_argument, beginning with `what` and naming the module, for one that PEFT has no place for.
template <class T, class PathOf, class F>
void for_each_peft_module(T& model, std::string_view what, PathOf&& path_of, F&& f) {
  for_each_module(model, [&]<class M>(std::string_view name, M& module) {
    if constexpr (ConvolutionModule<M>) {
      using P = std::remove_cvref_t<decltype(module.groups.front())>;
      if constexpr (!MagnitudeLayer<P> && requires(P& group) { requires PortableAdapter<std::remove_cvref_t<decltype(group.adapter)>>; }) {
        f(path_of(name), PeftConvolution<M>(module));
      } else {
        require_nothing_trained(module, what, path_of, name);
      }
    } else if constexpr (PortableAdapter<std::remove_cvref_t<decltype(module.adapter)>>) {
      f(path_of(name), PeftLayer<M>(module));
    } else {
      require_nothing_trained(module.adapter, what, path_of, name);
    }
  });
}

}  // namespace dylora::detail

#endif
