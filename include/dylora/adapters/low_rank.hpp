#ifndef DYLORA_ADAPTERS_LOW_RANK_HPP
#define DYLORA_ADAPTERS_LOW_RANK_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <string_view>
#include <utility>

#include "dylora/adapters/factored.hpp"
#include "dylora/adapters/factors.hpp"
#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/buffer.hpp"
#include "dylora/linalg/product.hpp"
#include "dylora/ranks/scale.hpp"

namespace dylora {

struct LowRankOptions {
  Index max_rank = 8;                 ///< R, at most min(in, out); 0 means no adapter, as in loralib
  double alpha = 16;                  ///< α > 0, the numerator of the scale
  ScaleRule scale = alpha_over_rank;  ///< s(b)
};

/// Δ_b(x) = s(b) · B[:, :b] · A[:b, :] · x
///
/// DyLoRA (Valipour et al., arXiv 2210.07558, eqs. 5–8): one adapter that works at every rank b in 1..R, because training draws b anew at
/// each step and computes with the first b components only. At b = R always, it is LoRA (arXiv 2106.09685).
///
///     LowRank<float> adapter(in, out, {.max_rank = 8, .alpha = 16}, rng);   // A uniform in ±1/√in, B = 0, so Δ = 0
///     LowRank<float>::Cache cache;
///     auto gradients = zeros_like(adapter);
///     adapter.add_forward(x, 4, cache, y);                                  // y += Δ_4(x)
///     adapter.add_backward(x, dy, cache, gradients, dx);
///
/// Component i is row i of A and column i of B, each contiguous: a rank-b adapter is a prefix of both buffers. Components outside the
/// active ones are neither read nor written. An adapter cut to its first b components still accepts every rank up to max_rank, and computes
/// at those above b what it did at b.
template <std::floating_point S>
struct LowRank : Factored<LowRank<S>, S> {
  static constexpr std::string_view name = "LowRank";
  using Scalar = S;
  using Options = LowRankOptions;

  struct Gradients {
    Gradient<RowMatrix<S>> A;
    Gradient<MatrixX<S>> B;
  };

  struct Workspace {
    Buffer<S> dh;  // s · B_bᵀ · dy, from prepare_backward to backward_term
  };

  /// Filled by one add_forward, read by any number of add_backward.
  struct Cache {
    BatchRanks ranks = RankSlice::none();
    Index samples = 0;
    Buffer<S> h;  // A_b x, highest rank × n
  };

  RowMatrix<S> A;  // components × in
  MatrixX<S> B;    // out × components
  Options options;

  /// Fresh: A Kaiming-uniform with a = √5, which is U(−1/√in, 1/√in); B = 0.
  /// Throws std::invalid_argument if max_rank is outside [0, min(in, out)] or alpha is not a finite number above 0.
  LowRank(Index in_features, Index out_features, Options options_, Rng& rng) : options(options_) {
    require_in_range(options.max_rank, 0, std::min(in_features, out_features), "LowRank: max_rank");
    require_alpha();
    A = random_uniform<S, RowMatrix<S>>(options.max_rank, in_features, 1 / std::sqrt(static_cast<double>(in_features)), rng);
    B = MatrixX<S>::Zero(out_features, options.max_rank);
  }

  /// From trained factors; options.max_rank is taken from them. Throws ShapeError if A and B disagree about the rank.
  LowRank(RowMatrix<S> A_, MatrixX<S> B_, Options options_) : A(std::move(A_)), B(std::move(B_)), options(options_) {
    require_equal(B.cols(), A.rows(), "LowRank: columns of B (rank) against rows of A");
    options.max_rank = A.rows();
    require_alpha();
  }

  Index in_features() const { return A.cols(); }
  Index out_features() const { return B.rows(); }
  Index max_rank() const { return options.max_rank; }
  Index components() const { return A.rows(); }  ///< max_rank, or fewer once cut (ranks/truncate.hpp)
  S scale(Index rank) const { return static_cast<S>(exact_scale(rank)); }
  double exact_scale(Index rank) const { return options.scale(options.alpha, rank, options.max_rank); }

  /// y += s(b) · B_b · h, where b is the rank of each column: h = A_b x, into the cache (overwritten). Costs 2·b·n·in flops, and the term
  /// 2·b·n·out; but for a list of ranks, allocates only when the cache grows.
  void prepare_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const {
    check_factors();
    this->check_forward(x, ranks);
    cache.ranks = ranks.at_most(components());
    cache.samples = x.cols();
    auto h = cache.h.resize(cache.ranks.highest(), x.cols());
    cache.ranks.for_each_run(x.cols(), [&](Index begin, Index n, RankSlice rank) {
      const Index b = rank.active;
      if (b > 0) set_dot_products(h.block(0, begin, b, n), A.topRows(b), x.middleCols(begin, n));
    });
  }

  LowRankTerm<S> forward_term(const Cache& cache, const RankRun& run) const {
    const Index b = run.rank.active;
    return {B.leftCols(b), cache.h.view().block(0, run.begin, b, run.count), b > 0 ? scale(b) : S(0)};
  }

  /// Throws as Factored's, and ShapeError if A and B disagree about the rank or the cache is of another.
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& /*workspace*/) const {
    this->check_call(x, dy, cache, gradients, components());
    check_factors();
    require_equal(cache.h.rows(), cache.ranks.highest(), "LowRank::add_backward: rank of the cached h");
  }

  /// With s = s(b), h = A_b x and the slice [t, b) trained:
  ///
  ///     y = s B_b h         dB[:, t:b] += s · dy · h[t:b]ᵀ      dh = s · B_bᵀ · dy
  ///     h = A_b x           dA[t:b, :] += dh[t:b] · xᵀ          dx += A_bᵀ · dh
  ///
  /// dh is left in the workspace. The frozen prefix [0, t) still passes gradient to x. Costs 2·b·n·(in + 2·out) flops at t = 0, and the
  /// term 2·b·n·in. Allocates only when the workspace grows.
  void prepare_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    check_backward(x, dy, cache, gradients, workspace);
    const BatchRanks& ranks = cache.ranks;
    const auto h = cache.h.view();
    auto dh = workspace.dh.resize(ranks.highest(), dy.cols());
    ranks.for_each_run(dy.cols(), [&](Index begin, Index n, RankSlice rank) {
      const Index b = rank.active, t = rank.trainable_from, trained = rank.trainable();
      if (b == 0) return;
      const auto x_b = x.middleCols(begin, n), dy_b = dy.middleCols(begin, n);
      auto dh_b = dh.block(0, begin, b, n);
      set_dot_products(dh_b, B.leftCols(b).transpose(), dy_b, scale(b));
      if (trained > 0) {
        add_product(gradients.B.middleCols(t, trained), dy_b, h.block(t, begin, trained, n).transpose(), scale(b));
        add_product(gradients.A.middleRows(t, trained), dh_b.middleRows(t, trained), x_b.transpose());
      }
      gradients.A.components.insert(rank);
      gradients.B.components.insert(rank);
    });
  }

  LowRankTerm<S> backward_term(const Cache& /*cache*/, const Workspace& workspace, const RankRun& run) const {
    const Index b = run.rank.active;
    return {A.topRows(b).transpose(), workspace.dh.view().block(0, run.begin, b, run.count)};
  }

  /// Δ_b as a matrix: s(b) · B_b · A_b, out × in.
  MatrixX<S> delta(RankSlice rank) const {
    check_factors();
    require_ranks(rank, in_features(), max_rank(), "LowRank::delta");
    const Index b = rank.at_most(components()).active;
    MatrixX<S> result(out_features(), in_features());
    set_product(result, B.leftCols(b), A.topRows(b), b > 0 ? scale(b) : S(0));
    return result;
  }

  /// s(b), B_b and A_b: a copy of the first b components, or of all there are if b is more.
  LowRankFactors<S> factors(Index rank) const {
    check_factors();
    require_in_range(rank, 0, max_rank(), "LowRank::factors: rank");
    const Index b = std::min(rank, components());
    return {A.topRows(b), B.leftCols(b), b > 0 ? exact_scale(b) : 1};
  }

  /// Becomes the adapter of these factors: max_rank is their rank, and alpha what makes the scale rule give their scale there. The rule
  /// stays, so that it says what the scale is at the lower ranks. Throws, with nothing changed, ShapeError if they do not fit and
  /// std::invalid_argument if the rule has no finite alpha > 0 for their scale.
  void set_factors(LowRankFactors<S> factors) {
    require_equal(factors.A.cols(), in_features(), "LowRank::set_factors: columns of A (in_features)");
    require_equal(factors.B.rows(), out_features(), "LowRank::set_factors: rows of B (out_features)");
    Options chosen = options;
    const Index rank = factors.A.rows();
    if (rank > 0) chosen.alpha = alpha_giving(options.scale, factors.scale, rank, rank);
    *this = LowRank(std::move(factors.A), std::move(factors.B), chosen);
  }

  static void members(const auto& f, auto&... t) {
    f(Parameter{"lora_A", RankAxis::rows, Factor::A}, t.A...);
    f(Parameter{"lora_B", RankAxis::cols, Factor::B}, t.B...);
    scale_settings<LowRank>(f);
  }

 private:
  /// A and B are public.
  void check_factors() const {
    require_equal(B.cols(), A.rows(), "LowRank: columns of B (rank) against rows of A");
    require_in_range(A.rows(), 0, options.max_rank, "LowRank: components, against options.max_rank");
  }

  void require_alpha() const {
    require_option(options.alpha > 0 && std::isfinite(options.alpha), options.alpha, "LowRank: alpha", "a finite number > 0");
  }
};

}  // namespace dylora

#endif
