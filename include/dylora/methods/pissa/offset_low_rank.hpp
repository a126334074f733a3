#ifndef DYLORA_METHODS_PISSA_OFFSET_LOW_RANK_HPP
#define DYLORA_METHODS_PISSA_OFFSET_LOW_RANK_HPP

#include <algorithm>
#include <concepts>
#include <limits>
#include <string>
#include <string_view>
#include <utility>

#include "dylora/adapters/factored.hpp"
#include "dylora/adapters/factors.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/buffer.hpp"
#include "dylora/linalg/product.hpp"

namespace dylora {

/// Δ_b(x) = s(b) · (B_b A_b − B⁰_b A⁰_b) · x = s(b) · [ (B − B⁰)_b, B⁰_b ] · [ A_b; (A − A⁰)_b ] · x
///
/// A LowRank that starts at factors of your choice, A = A⁰ and B = B⁰, such as those of PiSSA or OLoRA (methods/pissa/init.hpp), and adds
/// what training makes of them: at the start exactly nothing, at every rank, and the frozen weight stays as it is. The published methods
/// subtract B⁰A⁰ from the weight instead, which is right at one rank and one scale only.
///
///     Linear<float, OffsetLowRank<float>> layer(W, pissa_init<float>(W, {.max_rank = 8, .alpha = 8}));
///     Linear<float, OffsetLowRank<float>>::Cache cache;
///     auto gradients = zeros_like(layer);                       // of lora_A and lora_B
///     const MatrixX<float> y = layer.forward(x, 4, cache);       // y = W x, until a step of the optimiser
///
/// Weight decay would pull A and B towards 0 and not towards A⁰ and B⁰, and so Δ towards −s·B⁰·A⁰, away from the frozen weight: leave the
/// factors out of it.
///
///     AdamW optimizer(layer, {.lr = 1e-3, .weight_decay = 0.1, .groups = without_decay({"lora_A", "lora_B"})});
///
/// The second form is the one that is computed: its halves are zero at the start bit for bit, and where A is near A⁰ the difference is
/// exact. It has two columns per component, side by side. Costs twice what a LowRank does, and twice its memory and a copy in each cache.
template <std::floating_point S>
struct OffsetLowRank : Factored<OffsetLowRank<S>, S> {
  static constexpr std::string_view name = "OffsetLowRank";
  using Scalar = S;
  using Options = LowRankOptions;

  struct Gradients {
    typename LowRank<S>::Gradients current;
  };

  struct Workspace {
    Buffer<S> dh;       // s · B_bᵀ · dy
    Buffer<S> d_pairs;  // the same for both columns of each component
  };

  /// Filled by one forward, read by any number of backward.
  struct Cache {
    BatchRanks ranks = RankSlice::none();
    Index samples = 0;
    Buffer<S> left;   // out × 2b: columns (B − B⁰) and B⁰ of each component
    Buffer<S> right;  // in × 2b: rows A and A − A⁰ of each component, as columns
    Buffer<S> h;      // rightᵀ x
  };

  LowRank<S> current;      // A and B, which are trained
  RowMatrix<S> initial_A;  // A⁰, frozen
  MatrixX<S> initial_B;    // B⁰, frozen

  /// From the factors to start at; options.max_rank is taken from them. Throws as LowRank does.
  OffsetLowRank(RowMatrix<S> A, MatrixX<S> B, Options options)
      : current(std::move(A), std::move(B), options), initial_A(current.A), initial_B(current.B) {}

  Index in_features() const { return current.in_features(); }
  Index out_features() const { return current.out_features(); }
  Index max_rank() const { return current.max_rank(); }
  Index components() const { return current.components(); }  ///< max_rank, or fewer once cut (ranks/truncate.hpp)
  S scale(Index rank) const { return current.scale(rank); }

  /// y += Δ_b(x), where b is the rank of each column: both halves of each component and what the right one makes of x, into the cache
  /// (overwritten). Costs 4·b·n·in flops, and the term 4·b·n·out.
  void prepare_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const {
    cache.samples = 0;  // if this call throws, the cache counts as not filled
    check_factors();
    this->check_forward(x, ranks);
    cache.ranks = ranks.at_most(components());
    const Index highest = cache.ranks.highest();
    auto left = cache.left.resize(out_features(), 2 * highest), right = cache.right.resize(in_features(), 2 * highest);
    pair_up(left, right);
    auto h = cache.h.resize(2 * highest, x.cols());
    cache.ranks.for_each_run(x.cols(), [&](Index begin, Index n, RankSlice rank) {
      const Index columns = 2 * rank.active;
      if (columns > 0) set_dot_products(h.block(0, begin, columns, n), right.leftCols(columns).transpose(), x.middleCols(begin, n));
    });
    cache.samples = x.cols();
  }

  LowRankTerm<S> forward_term(const Cache& cache, const RankRun& run) const {
    const Index b = run.rank.active;
    return {cache.left.view().leftCols(2 * b), cache.h.view().block(0, run.begin, 2 * b, run.count), b > 0 ? scale(b) : S(0)};
  }

  /// Throws as Factored's, and ShapeError if the factors disagree or the cache is of other sizes.
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& /*workspace*/) const {
    this->check_call(x, dy, cache, gradients, components());
    check_factors();
    require_equal(cache.left.rows(), out_features(), "OffsetLowRank::add_backward: out_features of the cache");
    require_equal(cache.right.rows(), in_features(), "OffsetLowRank::add_backward: in_features of the cache");
    require_equal(cache.h.rows(), 2 * cache.ranks.highest(), "OffsetLowRank::add_backward: rank of the cached h");
  }

  /// That of a LowRank for A and B, with h = A_b x and the slice [t, b) trained, and both products for x:
  ///
  ///     dB[:, t:b] += s · dy · h[t:b]ᵀ     dA[t:b, :] += (s B_bᵀ dy)[t:b] · xᵀ     dx += A_bᵀ (s (B − B⁰)_bᵀ dy) + (A − A⁰)_bᵀ (s B⁰_bᵀ dy)
  ///
  /// Costs 2·b·n·(in + 3·out) flops at t = 0, and the term 4·b·n·in.
  void prepare_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    check_backward(x, dy, cache, gradients, workspace);
    const auto left = cache.left.view();
    const Index highest = cache.ranks.highest();
    auto d_pairs = workspace.d_pairs.resize(2 * highest, dy.cols()), dh = workspace.dh.resize(highest, dy.cols());
    cache.ranks.for_each_run(dy.cols(), [&](Index begin, Index n, RankSlice rank) {
      const Index b = rank.active, t = rank.trainable_from, trained = rank.trainable();
      if (b == 0) return;
      const auto dy_b = dy.middleCols(begin, n);
      set_dot_products(d_pairs.block(0, begin, 2 * b, n), left.leftCols(2 * b).transpose(), dy_b, scale(b));
      if (trained > 0) {
        auto trained_dh = dh.block(t, begin, trained, n);
        trained_dh = of_pairs(workspace.d_pairs, 0, t, begin, trained, n) + of_pairs(workspace.d_pairs, 1, t, begin, trained, n);
        add_product(gradients.current.B.middleCols(t, trained), dy_b, of_pairs(cache.h, 0, t, begin, trained, n).transpose(), scale(b));
        add_product(gradients.current.A.middleRows(t, trained), trained_dh, x.middleCols(begin, n).transpose());
      }
      gradients.current.A.components.insert(rank);
      gradients.current.B.components.insert(rank);
    });
  }

  LowRankTerm<S> backward_term(const Cache& cache, const Workspace& workspace, const RankRun& run) const {
    const Index pairs = 2 * run.rank.active;
    return {cache.right.view().leftCols(pairs), workspace.d_pairs.view().block(0, run.begin, pairs, run.count)};
  }

  /// Δ_b as a matrix, out × in.
  MatrixX<S> delta(RankSlice rank) const {
    check_factors();
    require_ranks(rank, in_features(), max_rank(), "OffsetLowRank::delta");
    const Index b = rank.at_most(components()).active;
    const auto [left, right] = pairs(b);
    MatrixX<S> result(out_features(), in_features());
    set_product(result, left, right.transpose(), b > 0 ? scale(b) : S(0));
    return result;
  }

  /// Δ_b for programs that know no initial factors: a pair of rank 2b, (B − B⁰) with A and B⁰ with A − A⁰, component after component. Under
  /// the scale α/b its prefix of 2c is Δ_c. Where the initial factors are 0, it is A_b and B_b alone.
  LowRankFactors<S> factors(Index rank) const {
    check_factors();
    LowRankFactors<S> result = current.factors(rank);
    if (initial_A.isZero(0) && initial_B.isZero(0)) return result;
    auto [left, right] = pairs(result.A.rows());
    return {right.transpose(), std::move(left), result.scale};
  }

  /// Becomes the adapter of these factors, as LowRank::set_factors: they count as trained from 0, so that the initial factors become 0.
  void set_factors(LowRankFactors<S> factors) {
    current.set_factors(std::move(factors));
    initial_A.setZero(components(), in_features());
    initial_B.setZero(out_features(), components());
  }

  static void members(const auto& f, auto&... t) {
    f(Child<LowRank<S>>{}, t.current...);
    f(Constant{"initial_A"}, &OffsetLowRank::initial_A);
    f(Constant{"initial_B"}, &OffsetLowRank::initial_B);
  }

 private:
  /// Row `first`, first + 2, … of what `pairs` holds for the components [t, t + count), in n columns.
  template <class B>
  static auto of_pairs(const B& pairs, Index first, Index t, Index begin, Index count, Index n) {
    const auto view = pairs.view();
    using Strides = Eigen::Stride<Eigen::Dynamic, 2>;
    return Eigen::Map<const MatrixX<S>, Eigen::Unaligned, Strides>(view.data() + 2 * t + first + begin * view.outerStride(), count, n,
                                                                   Strides(view.outerStride(), 2));
  }

  /// As many components as there are columns for, in × 2b and out × 2b.
  template <class Left, class Right>
  void pair_up(Left& left, Right& right) const {
    for (Index c = 0; 2 * c < left.cols(); ++c) {
      left.col(2 * c) = current.B.col(c) - initial_B.col(c);
      left.col(2 * c + 1) = initial_B.col(c);
      right.col(2 * c) = current.A.row(c).transpose();
      right.col(2 * c + 1) = (current.A.row(c) - initial_A.row(c)).transpose();
    }
  }
  std::pair<MatrixX<S>, MatrixX<S>> pairs(Index b) const {
    std::pair<MatrixX<S>, MatrixX<S>> result{MatrixX<S>(out_features(), 2 * b), MatrixX<S>(in_features(), 2 * b)};
    pair_up(result.first, result.second);
    return result;
  }

  /// All are public.
  void check_factors() const {
    require_equal(current.B.cols(), current.A.rows(), "OffsetLowRank: columns of B (rank) against rows of A");
    require_in_range(components(), 0, max_rank(), "OffsetLowRank: components, against options.max_rank");
    require_equal(initial_A.cols(), in_features(), "OffsetLowRank: columns of initial_A (in_features)");
    require_equal(initial_B.rows(), out_features(), "OffsetLowRank: rows of initial_B (out_features)");
    const Index most = std::numeric_limits<Index>::max();  // cut, an adapter keeps all it started at
    require_in_range(initial_A.rows(), components(), most, "OffsetLowRank: rows of initial_A (rank)");
    require_in_range(initial_B.cols(), components(), most, "OffsetLowRank: columns of initial_B (rank)");
  }
};

}  // namespace dylora

#endif
