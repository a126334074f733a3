#ifndef DYLORA_METHODS_RESLORA_LINK_HPP
#define DYLORA_METHODS_RESLORA_LINK_HPP

#include <concepts>
#include <cstddef>
#include <functional>
#include <iterator>
#include <string>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/methods/reslora/residual_low_rank.hpp"
#include "dylora/weights/dense.hpp"
#include "dylora/weights/weight.hpp"

namespace dylora {

/// y = W x + bias + Δ_b(x), where Δ takes a shortcut from the links before this one in its chain: a frozen weight and one link of ResLoRA
/// (arXiv 2402.18039). The links of a chain are the projections of one kind in consecutive blocks: all q, all v, and so on.
///
///     ResidualLink<float, Shortcut::block> q(Wq, {.adapter = {.max_rank = 8}, .position = block}, rng);
///
/// Wherever a Linear may be, also inside an Attention; its Cache and Gradients must be linked before each call.
template <std::floating_point S, Shortcut shortcut, FrozenWeight W = DenseWeight<S>>
using ResidualLink = Linear<S, ResidualLowRank<S, shortcut>, W>;

namespace detail {

/// The adapter of a layer, or what belongs to it in the layer's cache or gradients.
template <class T>
auto& adapter_of(T& whole) {
  if constexpr (requires { whole.adapter; }) {
    return whole.adapter;
  } else {
    return whole;
  }
}

template <class Range, class Member>
auto& link_at(Range& chain, std::size_t n, Member& member) {
  return adapter_of(std::invoke(member, chain[n]));
}

}  // namespace detail

/// Throws ShapeError unless the links can share what their shortcuts ask for and are at positions 0, 1, 2... Arguments as for link.
template <class Links, class Member = std::identity>
void require_chain(const Links& links, Member member = {}) {
  for (std::size_t n = 0; n < std::size(links); ++n) {
    const auto& adapter = detail::link_at(links, n, member);
    require_equal(adapter.position, static_cast<Index>(n), "link: position of a link, against its place in the chain");
    require_equal(adapter.reach, detail::link_at(links, 0, member).reach, "link: reach of a link, against that of the first");
    if (adapter.within_reach(adapter.position) > 0) adapter.require_alike(detail::link_at(links, n - 1, member));
  }
}

/// Makes a chain of links and their caches, in order, before a forward. What the caches held counts as not filled.
///
/// `member` finds the link, and its cache, in an element of either: where both are in blocks of a model,
///
///     link(blocks, cache.blocks, [](auto& block) -> auto& { return block.attention.q; });
///
/// The caches refer to each other and to the links, so none of them may move before the chain's last
/// forward; a cache that has moved, or is a copy, is refused. The backward follows no reference. A call for every forward makes copies safe. Does nothing for layers without shortcuts. Throws ShapeError as require_chain, or if there
/// are not as many caches as links.
template <class Links, class Caches, class Member = std::identity>
  requires requires(const Links& links, Caches& caches) { std::size(links), std::size(caches); }
void link(const Links& links, Caches& caches, Member member = {}) {
  if constexpr (requires { detail::link_at(caches, 0, member).owner; }) {
    const std::size_t count = std::size(links);
    require_equal(static_cast<Index>(std::size(caches)), static_cast<Index>(count), "link: number of caches, against the links");
    require_chain(links, member);
    for (std::size_t n = 0; n < count; ++n) {
      auto& cache = detail::link_at(caches, n, member);
      cache.linked_at = &cache;
      cache.owner = &detail::link_at(links, n, member);
      cache.next = n + 1 < count ? &detail::link_at(links, n + 1, member) : nullptr;
      cache.previous = n > 0 ? &detail::link_at(caches, n - 1, member) : nullptr;
      cache.earlier = static_cast<Index>(n);
      cache.later = static_cast<Index>(count - 1 - n);
      cache.pass = cache.samples = 0;
    }
  }
}

/// Makes a chain of the links' gradients, in order, before a backward; what an unfinished backward has left there is dropped. They refer to
/// each other and may not move before the end of it; those that have, or are copies, are refused. `member` as above.
template <class Gradients, class Member = std::identity>
  requires requires(Gradients& gradients, Member member) { std::invoke(member, gradients[std::size(gradients)]); }
void link(Gradients& gradients, Member member = {}) {
  if constexpr (requires { detail::link_at(gradients, 0, member).returned; }) {
    for (std::size_t n = 0; n < std::size(gradients); ++n) {
      auto& one = detail::link_at(gradients, n, member);
      one.linked_at = &one;
      one.previous = n > 0 ? &detail::link_at(gradients, n - 1, member) : nullptr;
      one.earlier = static_cast<Index>(n);
      one.returned = 0;
    }
  }
}

}  // namespace dylora

#endif
