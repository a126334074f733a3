#ifndef DYLORA_CORE_RANK_SLICE_HPP
#define DYLORA_CORE_RANK_SLICE_HPP

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"

/// Which components of an adapter take part in a call (RankSlice), and which have received gradient since it was cleared (ComponentSet).
namespace dylora {

/// Components [0, active) take part in a call; those in [trainable_from, active) receive gradient.
///
///     layer.forward(x, 4)                  rank 4, nested: components 0..3 learn
///     layer.forward(x, {4, 3})             rank 4, frozen mode: only component 3 learns
///     layer.forward(x, {4, 4})             rank 4, no component learns, but gradient passes through
///     layer.forward(x, RankSlice::none())  the frozen base alone
///
/// DyLoRA, arXiv 2210.07558, section 4: b = active; nested and "frozen" update rules. Blocks of u components are {(k+1)u, ku}.
struct RankSlice {
  Index active;
  Index trainable_from = 0;

  /// Throws std::invalid_argument unless 1 ≤ active and 0 ≤ trainable_from ≤ active; the adapter checks active ≤ max_rank.
  constexpr RankSlice(Index active_, Index trainable_from_ = 0) : active(active_), trainable_from(trainable_from_) {
    if (active < 1) {
      throw std::invalid_argument("rank: expected at least 1 (RankSlice::none() runs without the adapter), got " + std::to_string(active));
    }
    if (trainable_from < 0 || trainable_from > active) {
      throw std::invalid_argument("trainable_from: expected a value in [0, " + std::to_string(active) + "], got " +
                                  std::to_string(trainable_from));
    }
  }

  /// No component: the adapter adds nothing and learns nothing. Its own name, so that a rank of 0 is never an accident.
  static constexpr RankSlice none() { return RankSlice(); }

  constexpr Index trainable() const { return active - trainable_from; }

  /// The same among the first max_rank components: what an adapter makes of a rank that it does not reach.
  constexpr RankSlice at_most(Index max_rank) const {
    if (active <= max_rank) return *this;
    return max_rank == 0 ? none() : RankSlice(max_rank, std::min(trainable_from, max_rank));
  }

  constexpr bool operator==(const RankSlice&) const = default;

 private:
  constexpr RankSlice() : active(0) {}
};

/// A set of components, kept beside a gradient: an optimiser must tell a component that did not take part from one whose gradient
/// happens to be zero.
class ComponentSet {
 public:
  explicit ComponentSet(Index size = 0) : member_(static_cast<std::size_t>(size), 0) {}

  Index size() const { return static_cast<Index>(member_.size()); }
  bool contains(Index component) const { return member_[static_cast<std::size_t>(component)] != 0; }
  bool empty() const { return std::find(member_.begin(), member_.end(), 1) == member_.end(); }

  void clear() { std::fill(member_.begin(), member_.end(), 0); }
  /// Throws ShapeError unless 0 ≤ begin ≤ end ≤ size(): a set that zeros_like did not make, or a rank above its size.
  void insert(Index begin, Index end) {
    if (begin < 0 || begin > end || end > size()) {
      throw ShapeError("ComponentSet: expected components within [0, " + std::to_string(size()) + "), got [" + std::to_string(begin) +
                       ", " + std::to_string(end) + ')');
    }
    std::fill(member_.begin() + begin, member_.begin() + end, 1);
  }
  void insert(RankSlice rank) { insert(rank.trainable_from, rank.active); }
  void insert(const ComponentSet& other) {
    require_equal(other.size(), size(), "ComponentSet: size of the other set");
    for (std::size_t i = 0; i < member_.size(); ++i) member_[i] |= other.member_[i];
  }

  /// Calls f(begin, end) for each maximal run of members, in order.
  template <class F>
  void for_each_range(F&& f) const {
    for (Index begin = 0; begin < size(); ++begin) {
      if (!contains(begin)) continue;
      Index end = begin + 1;
      while (end < size() && contains(end)) ++end;
      f(begin, end);
      begin = end;
    }
  }

 private:
  std::vector<char> member_;
};

}  // namespace dylora

#endif
