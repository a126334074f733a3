#ifndef DYLORA_METHODS_CHAIN_FOLD_HPP
#define DYLORA_METHODS_CHAIN_FOLD_HPP

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "dylora/adapters/adapter.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"

/// Adapters that are added to their frozen weights during training, so that many adapters of a low rank make up a change of a higher one.
namespace dylora {

/// A layer whose adapter can be added to its frozen weight for good: the weight owns a matrix W. One that is mapped or quantised does not.
template <class L>
concept FoldableLayer = requires(L& layer) { layer.base.W += layer.adapter.delta(RankSlice::none()); };

/// What becomes of the factors when only a fraction m of their product is folded.
enum class Remainder {
  continuous,   ///< A, B ← √(1 − m) A, √(1 − m) B: the function stays what it was
  as_published  ///< A, B ← (1 − m) A, (1 − m) B: the code of PeriodicLoRA's author, which loses m (1 − m) of the product
};

struct FoldOptions {
  double fraction = 1;                          ///< m in (0, 1]; 1 folds all of it, and the adapter begins afresh
  Remainder remainder = Remainder::continuous;  ///< for m < 1
};

namespace detail {

/// Whether there is anything to fold in a layer of type L, whatever its weight is.
template <class L>
inline constexpr bool has_trained_adapter = !std::is_empty_v<typename std::remove_cvref_t<decltype(L::adapter)>::Gradients>;

/// An adapter with its options, from which a fresh one can be drawn.
template <class A>
concept Redrawable = requires(A& adapter, Rng& rng) { A(adapter.in_features(), adapter.out_features(), adapter.options, rng); };

/// A fresh adapter of as many components in the place of each that the walk meets.
struct Redraw {
  Rng& rng;

  template <class A>
  auto enter(std::string_view /*name*/, A& adapter) const {
    if constexpr (Redrawable<A>) {
      A fresh(adapter.in_features(), adapter.out_features(), adapter.options, rng);
      for_each_parameter(
          [](Parameter parameter, auto& p, const auto& before) {
            if (parameter.rank_axis == RankAxis::none) return;
            p = component_block(parameter.rank_axis, p, 0, component_count(parameter.rank_axis, before)).eval();
          },
          fresh, adapter);
      adapter = std::move(fresh);
      return std::false_type{};
    } else {
      return std::true_type{};
    }
  }
  template <class M>
  void parameter(Parameter /*parameter*/, M& /*value*/) const {
    refuse<M>();
  }
  template <class M>
  void constant(Constant /*constant*/, M& /*value*/) const {
    refuse<M>();
  }

 private:
  template <class M>
  static void refuse() {
    static_assert(std::is_void_v<M>,
                  "fold: an adapter begins afresh by A(in_features, out_features, adapter.options, rng), or is made of such");
  }
};

/// Throws unless Δ is bilinear in what is trained: one product whose factors A and B are all of them.
template <class A>
void require_bilinear(const A& adapter, const std::string& what) {
  Index components = 0, parameters = 0;
  for_each_parameter(
      [&](Parameter parameter, const auto& p) {
        if (parameter.factor == Factor::A) components += p.rows();
        if (parameter.factor != Factor::none) parameters += p.size();
      },
      adapter);
  bool bilinear = parameters == parameter_count(adapter);
  if constexpr (PortableAdapter<A>) {
    bilinear = bilinear && adapter.factors(adapter.max_rank()).A.rows() == components;
  } else {
    bilinear = false;
  }
  if (bilinear) return;
  throw std::invalid_argument(what +
                              ": a fraction of it: expected an adapter that is the product of its lora_B and lora_A, got another kind");
}

/// Whether a layer trains nothing beside its adapter: what else it trains, such as a magnitude, may rest on W as it is.
template <class L>
bool trains_adapter_alone(const L& layer) {
  return parameter_count(layer) == parameter_count(layer.adapter);
}

/// m · Δ_b, of all the components that there are if there are fewer.
template <class L>
auto increment(const L& layer, RankSlice rank, double m) {
  auto delta = layer.adapter.delta(rank.at_most(layer.adapter.max_rank()));
  delta *= static_cast<typename decltype(delta)::Scalar>(m);
  return delta;
}

/// Throws for a layer that cannot be folded, or whose factors would spoil the weight.
template <class L>
void require_foldable(const L& layer, const std::string& what, double fraction) {
  if (!trains_adapter_alone(layer)) {
    throw std::invalid_argument(what + ": expected a layer that trains its adapter alone, got one with further parameters");
  }
  if (fraction < 1) require_bilinear(layer.adapter, what);
  for_each_parameter(
      [&](Parameter parameter, const auto& p) {
        if (p.allFinite()) return;
        throw NonFiniteError(what + ": " + std::string(parameter.name) + ": expected finite numbers, got a NaN or an infinity");
      },
      layer.adapter);
}

}  // namespace detail

/// W ← W + m · Δ_b, for every layer inside `model` that is a frozen weight and its adapter. Then, with m = 1, the adapter begins afresh
/// (A drawn anew, B = 0); with m < 1, its factors are what FoldOptions says.
///
/// The plain form is how PeriodicLoRA (arXiv 2402.16141) unloads and how Chain of LoRA (arXiv 2401.04151) ties a knot; the forms with m < 1
/// are PeriodicLoRA's momentum. Its paper could not be compared: `as_published` is the code that its first author made public.
///
///     fold(model, model.max_rank(), rng);                  // between two steps
///     optimizer = AdamW(model, optimizer.options());       // stale moments would make a large first step
///
/// Between steps only: in the midst of accumulation it would mix gradients of two parametrisations. The function at rank b stays what it
/// was, up to rounding, but for `as_published`. At every other rank it jumps, since all ranks share W; so fold at the largest rank, and
/// know that the change can no longer be cut to a lower one. Where it must, keep the links apart: methods/chain/chain.hpp. Components past
/// b are not folded, and begin afresh or shrink with the rest. W must have the precision to hold the increments.
///
/// A layer whose adapter has fewer components folds all it has. One that trains and whose weight cannot be added to (FoldableLayer) does
/// not compile. With nothing changed, throws std::invalid_argument for the rank, for m, for a layer that trains more than its adapter, or
/// with m < 1 for an adapter that is not the product of what it trains (a Chain); NonFiniteError, naming the layer, for a parameter that is
/// not finite, or where the new W would not be. Costs 4·b·in·out flops, since every Δ is computed twice: before anything is changed, to see
/// that all sums are finite, and to be added. An out × in matrix for one layer at a time.
template <class T>
void fold(T& model, RankSlice rank, Rng& rng, FoldOptions options = {}) {
  const double m = options.fraction;
  require_option(m > 0 && m <= 1, m, "fold: fraction", "a number in (0, 1]");
  const auto for_each_adapted = [&](auto&& f) {
    for_each_layer(model, [&](std::string_view name, auto& layer) {
      if constexpr (detail::has_trained_adapter<std::remove_reference_t<decltype(layer)>>) f(name, layer);
    });
  };
  Index most = 0;
  for_each_adapted([&](std::string_view name, auto& layer) {
    detail::require_foldable(layer, "fold: layer " + std::string(name), m);
    if (m == 1) {  // a trial, so that what an adapter refuses is refused before anything is folded
      auto copy = layer.adapter;
      Rng draws = rng;
      visit_members(detail::Redraw{draws}, copy);
    }
    most = std::max(most, layer.adapter.max_rank());
  });
  if (most > 0) require_in_range(rank.active, 1, most, "fold: rank");
  for_each_adapted([&](std::string_view name, auto& layer) {
    if constexpr (FoldableLayer<std::remove_reference_t<decltype(layer)>>) {
      if ((layer.base.W + detail::increment(layer, rank, m)).allFinite()) return;
      throw NonFiniteError("fold: layer " + std::string(name) + ": W: expected a finite sum, got a NaN or an infinity");
    }
  });

  const double kept = options.remainder == Remainder::continuous ? std::sqrt(1 - m) : 1 - m;
  for_each_adapted([&](std::string_view, auto& layer) {
    using L = std::remove_reference_t<decltype(layer)>;
    using A = std::remove_cvref_t<decltype(layer.adapter)>;
    using S = typename A::Scalar;
    static_assert(
        FoldableLayer<L>,
        "fold: the layer needs a frozen weight that owns its matrix W (DenseWeight) and an adapter with a delta (MergeableAdapter); "
        "a mapped or quantised weight cannot take an adapter in");
    if constexpr (FoldableLayer<L>) layer.base.W += detail::increment(layer, rank, m);
    if (m == 1) {
      visit_members(detail::Redraw{rng}, layer.adapter);
    } else {
      for_each_parameter([&](Parameter, auto& p) { p *= static_cast<S>(kept); }, layer.adapter);
    }
  });
}

/// The frozen weights of a model that fold can add to, for the checkpoints of a run that folds (io/checkpoint/checkpoint.hpp); without
/// folding they never change. Those of layers that train more than their adapter are left out, as fold refuses them.
///
///     FoldedWeights weights{model};
///     archive.parameters("model", model);
///     archive.parameters("folded", weights);      // all the matrices W, as "folded.h.0.attn.q_proj.weight"
template <class T>
struct FoldedWeights {
  struct Gradients {};

  T& model;

  static void members(const auto& f, auto& self, auto&... /*beside*/) {
    for_each_layer(self.model, [&](std::string_view name, auto& layer) {
      using L = std::remove_reference_t<decltype(layer)>;
      if constexpr (FoldableLayer<L> && detail::has_trained_adapter<L>) {
        if (!detail::trains_adapter_alone(layer)) return;
        const std::string weight = std::string(name) + (name.empty() ? "weight" : ".weight");
        f(Parameter{weight}, layer.base.W);
      }
    });
  }
};

template <class T>
FoldedWeights(T&) -> FoldedWeights<T>;

}  // namespace dylora

#endif
