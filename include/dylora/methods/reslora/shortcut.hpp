#ifndef DYLORA_METHODS_RESLORA_SHORTCUT_HPP
#define DYLORA_METHODS_RESLORA_SHORTCUT_HPP

#include <concepts>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/buffer.hpp"
#include "dylora/linalg/product.hpp"

namespace dylora {

/// What a link takes from those before it: the input of the last of them, their low-rank products, or the inner halves of those.
enum class Shortcut { input, block, middle };

struct ResidualOptions {
  LowRankOptions adapter = {};
  Index reach = -1;    ///< how many earlier links a block or middle shortcut takes in, −1 for all; an input shortcut takes in one
  Index position = 0;  ///< how many links come before this one in its chain
};

}  // namespace dylora

/// What the links of a residual chain leave for each other (methods/reslora/residual_low_rank.hpp says what for): in their caches on the
/// way forward, in their workspaces on the way back.
namespace dylora::detail {

/// The rows i · links + j of a matrix of several links, which are those of link j.
template <class Codes>
auto rows_of_link(Codes codes, Index j, Index links) {
  using Stride = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;
  constexpr bool is_const = std::is_const_v<std::remove_pointer_t<decltype(codes.data())>>;
  using Values = std::conditional_t<is_const, const MatrixX<typename Codes::Scalar>, MatrixX<typename Codes::Scalar>>;
  auto* first = codes.size() > 0 ? codes.data() + j : codes.data();  // without elements, a null pointer
  return Eigen::Map<Values, Eigen::Unaligned, Stride>(first, codes.rows() / links, codes.cols(), Stride(codes.rows(), links));
}

// Several links contribute to one gradient, which is to be the sum of what the runs of ranks give, one after the other, to the bit; but
// each link contributes for all runs at once. So the sums over links are made for each run by itself, in a buffer with a column for each
// trained component of each run, and added to the gradient when the last link has contributed.

/// Calls f(begin, n, rank, column) for each run that trains something, where its sums begin at `column`; returns how many columns there
/// are.
template <class F>
Index for_each_trained_run(const BatchRanks& ranks, Index samples, F&& f) {
  Index column = 0;
  ranks.for_each_run(samples, [&](Index begin, Index n, RankSlice rank) {
    if (rank.trainable() == 0) return;
    f(begin, n, rank, column);
    column += rank.trainable();
  });
  return column;
}

/// sums_of(j) += scale(b) · left · (rows of link j of right)ᵀ, of the trained components of each run. The product is one for all links.
template <class S, class Scale, class SumsOf>
void add_to_sums(const BatchRanks& ranks, ConstMatrixRef<S> left, typename Buffer<S>::ConstView right, Index links, Buffer<S>& workspace,
                 Scale&& scale, SumsOf&& sums_of) {
  for_each_trained_run(ranks, left.cols(), [&](Index begin, Index n, RankSlice rank, Index column) {
    const Index t = rank.trainable_from, trained = rank.trainable();
    auto product = workspace.resize(left.rows(), links * trained);
    set_product(product, left.middleCols(begin, n), right.block(links * t, begin, links * trained, n).transpose(), scale(rank.active));
    for (Index j = 0; j < links; ++j) {
      auto sums = sums_of(j).view();
      for (Index i = 0; i < trained; ++i) sums.col(column + i) += product.col(i * links + j);
    }
  });
}

template <std::floating_point S, class Adapter>
struct ResidualCache {
  // Set by link_chain, and read by forward alone.
  const ResidualCache* linked_at = nullptr;
  const Adapter* owner = nullptr;
  const Adapter* next = nullptr;
  const ResidualCache* previous = nullptr;
  Index earlier = 0, later = 0;  // links before and after this one

  Index pass = 0;  // counts the forwards of a linked chain
  BatchRanks ranks = RankSlice::none();
  Index samples = 0;
  Buffer<S> A, B;  // the factors of several links, where they take part: column i · links + j is component i of link j. A is transposed
  Buffer<S> a;     // A x, rows in that order
  Buffer<S> h;     // what B meets, where it is not a

  /// Throws unless this is the cache that was linked for the adapter, and neither a copy of it nor moved.
  void require_linked(const Adapter& adapter) const {
    require_equal(earlier, adapter.position, "ResidualLowRank::add_forward: earlier links of the cache (was it linked?)");
    if (earlier + later == 0 || (owner == &adapter && linked_at == this)) return;
    throw std::invalid_argument("ResidualLowRank::add_forward: cache: expected one that was linked for this adapter, got " +
                                std::string(owner != &adapter ? "another's" : "a copy of one or one that has moved since"));
  }

  /// Throws unless the `reached` links before this one have been called since it was, with as many samples at the same ranks.
  void require_earlier(Index reached, Index samples_here) const {
    const ResidualCache* from = previous;
    for (Index k = 0; k < reached; ++k, from = from->previous) {
      if (from->samples == 0 || from->pass == pass || from->pass != previous->pass) {
        throw ShapeError("ResidualLowRank::add_forward: cache of the earlier link: expected its forward on this batch, got " +
                         std::string(from->samples == 0 ? "none" : "that of another batch"));
      }
      require_equal(samples_here, from->samples, "ResidualLowRank::add_forward: samples in x, against the cache of the earlier link");
      if (from->ranks == ranks) continue;
      throw std::invalid_argument("ResidualLowRank::add_forward: ranks: expected those of the earlier link (highest " +
                                  std::to_string(from->ranks.highest()) + "), got others (highest " + std::to_string(ranks.highest()) +
                                  ')');
    }
  }
};

template <std::floating_point S>
struct ResidualGradients {
  typename LowRank<S>::Gradients inner;
};

template <std::floating_point S>
struct ResidualWorkspace {
  // Set by link_chain.
  const ResidualWorkspace* linked_at = nullptr;
  ResidualGradients<S>* gradients = nullptr;  // of this link
  ResidualWorkspace* previous = nullptr;
  Index earlier = 0;   // links before this one
  Index returned = 0;  // later links that have left something here since the backward of this one

  ResidualWorkspace* sender = nullptr;  // the last link that did
  BatchRanks ranks = RankSlice::none();
  Index samples = 0;
  Buffer<S> dh;                // s · Bᵀ · dy, for all links whose B writes this one's y
  Buffer<S> received;          // Σ dh of the later links, where they meet A x of this one
  Buffer<S> da;                // for all that read x, where it is not dh
  Buffer<S> dA_sums, dB_sums;  // of add_to_sums; dA is transposed
  Buffer<S> product;

  /// That of the link k before this one.
  ResidualWorkspace& back(Index k) { return k == 0 ? *this : previous->back(k - 1); }
  const ResidualWorkspace& back(Index k) const { return k == 0 ? *this : previous->back(k - 1); }

  /// Notes that this link leaves something for the link k before it, of so large a batch. Returns whether it is the first to do so.
  bool leave(Index k, const BatchRanks& ranks_here, Index samples_here) {
    ResidualWorkspace& to = back(k);
    to.sender = this;
    to.ranks = ranks_here;
    to.samples = samples_here;
    return to.returned++ == 0;
  }

  /// The sums = 0.
  void clear_sums(const BatchRanks& ranks_here, Index samples_here, Index in, Index out) {
    const Index columns = for_each_trained_run(ranks_here, samples_here, [](Index, Index, RankSlice, Index) {});
    dA_sums.resize(in, columns).setZero();
    dB_sums.resize(out, columns).setZero();
  }

  /// The gradient of this link += the sums, run after run.
  void add_dA(const BatchRanks& ranks_here, Index samples_here, ResidualGradients<S>& to) const {
    for_each_trained_run(ranks_here, samples_here, [&](Index, Index, RankSlice rank, Index column) {
      to.inner.A.middleRows(rank.trainable_from, rank.trainable()) += dA_sums.view().middleCols(column, rank.trainable()).transpose();
    });
  }
  void add_dB(const BatchRanks& ranks_here, Index samples_here, ResidualGradients<S>& to) const {
    for_each_trained_run(ranks_here, samples_here, [&](Index, Index, RankSlice rank, Index column) {
      to.inner.B.middleCols(rank.trainable_from, rank.trainable()) += dB_sums.view().middleCols(column, rank.trainable());
    });
  }

  /// Throws unless this is the workspace that was linked at this position for these gradients, and neither is a copy or has moved.
  void require_linked(Index position, const ResidualGradients<S>& given) const {
    require_equal(earlier, position, "ResidualLowRank::add_backward: earlier links of the workspace (was it linked?)");
    if (previous == nullptr && returned == 0) return;
    if (linked_at != this) {
      throw std::invalid_argument(
          "ResidualLowRank::add_backward: workspace: expected one that was linked, got a copy of one or one that has moved since");
    }
    if (gradients != &given) {
      throw std::invalid_argument(
          "ResidualLowRank::add_backward: gradients: expected those that were linked, got a copy of them or some that have moved since");
    }
  }

  /// Throws ShapeError if what was left here is of another batch.
  void require_batch(const BatchRanks& ranks_here, Index samples_here) const {
    if (returned == 0 || (ranks == ranks_here && samples == samples_here)) return;
    throw ShapeError("ResidualLowRank::add_backward: cache: expected that of the batch that the later links were called with, " +
                     std::to_string(samples) + " samples at ranks up to " + std::to_string(ranks.highest()) + ", got " +
                     std::to_string(samples_here) + " samples at ranks up to " + std::to_string(ranks_here.highest()));
  }
};

}  // namespace dylora::detail

#endif
