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
/// Wherever a Linear may be, also inside an Attention; its Cache and Workspace must be linked before each call.
template <std::floating_point S, Shortcut shortcut, FrozenWeight W = DenseWeight<S>>
using ResidualLink = Linear<S, ResidualLowRank<S, shortcut>, W>;

namespace detail {

/// The adapter of a layer, or what belongs to it in the layer's cache, gradients or workspace.
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

/// Throws ShapeError unless the links can share what their shortcuts ask for and are at positions 0, 1, 2... Arguments as for link_chain.
template <class Links, class Member = std::identity>
void require_chain(const Links& links, Member member = {}) {
  for (std::size_t n = 0; n < std::size(links); ++n) {
    const auto& adapter = detail::link_at(links, n, member);
    require_equal(adapter.position, static_cast<Index>(n), "link: position of a link, against its place in the chain");
    require_equal(adapter.reach, detail::link_at(links, 0, member).reach, "link: reach of a link, against that of the first");
    if (adapter.within_reach(adapter.position) > 0) adapter.require_alike(detail::link_at(links, n - 1, member));
  }
}

namespace detail {

template <class Links, class Caches, class Member>
void link_caches(const Links& links, Caches& caches, Member& member) {
  const std::size_t count = std::size(links);
  require_equal(static_cast<Index>(std::size(caches)), static_cast<Index>(count), "link: number of caches, against the links");
  require_chain(links, member);
  for (std::size_t n = 0; n < count; ++n) {
    auto& cache = link_at(caches, n, member);
    cache.linked_at = &cache;
    cache.owner = &link_at(links, n, member);
    cache.next = n + 1 < count ? &link_at(links, n + 1, member) : nullptr;
    cache.previous = n > 0 ? &link_at(caches, n - 1, member) : nullptr;
    cache.earlier = static_cast<Index>(n);
    cache.later = static_cast<Index>(count - 1 - n);
    cache.pass = cache.samples = 0;
  }
}

template <class Gradients, class Workspaces, class Member>
void link_workspaces(Gradients& gradients, Workspaces& workspaces, Member& member) {
  const std::size_t count = std::size(gradients);
  require_equal(static_cast<Index>(std::size(workspaces)), static_cast<Index>(count), "link: number of workspaces, against the gradients");
  for (std::size_t n = 0; n < count; ++n) {
    auto& workspace = link_at(workspaces, n, member);
    workspace.linked_at = &workspace;
    workspace.gradients = &link_at(gradients, n, member);
    workspace.previous = n > 0 ? &link_at(workspaces, n - 1, member) : nullptr;
    workspace.earlier = static_cast<Index>(n);
    workspace.returned = 0;
  }
}

}  // namespace detail

/// Makes a chain of links and their caches, in order, before a forward: link_chain(links, caches). What the caches held counts as not
/// filled. And a chain of the links' gradients and their workspaces before a backward: link_chain(gradients, workspaces). What an
/// unfinished backward has left there is dropped.
///
/// `member` finds the link, and what belongs to it, in an element of either: where both are in blocks of a model,
///
///     link_chain(blocks, cache.blocks, [](auto& block) -> auto& { return block.attention.q; });
///
/// The caches refer to each other and to the links, so none of them may move before the chain's last forward; the workspaces refer to each
/// other and to the gradients, and none of these before the end of the backward. What has moved, or is a copy, is refused. The backward
/// follows no reference of a cache. A call for every forward and backward makes copies safe. Does nothing for layers without shortcuts.
/// Throws ShapeError as require_chain, or if there are not as many caches as links, or workspaces as gradients.
template <class Chain, class Parts, class Member = std::identity>
  requires requires(const Chain& chain, Parts& parts) { std::size(chain), std::size(parts); }
void link_chain(Chain&& chain, Parts& parts, Member member = {}) {
  if constexpr (requires { detail::link_at(parts, 0, member).owner; }) detail::link_caches(chain, parts, member);
  if constexpr (requires { detail::link_at(parts, 0, member).returned; }) detail::link_workspaces(chain, parts, member);
}

}  // namespace dylora

#endif
