#ifndef DYLORA_METHODS_NOLA_NOLA_HPP
#define DYLORA_METHODS_NOLA_NOLA_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
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
#include "dylora/methods/nola/factors.hpp"
#include "dylora/ranks/scale.hpp"

namespace dylora {

/// What the rank b of a call cuts: the components of the factors, or the bases that they are made of.
enum class NolaNesting { rank, bases };

struct NolaOptions {
  Index max_rank = 8;                 ///< r, the rank of the factors, at most min(in, out); 0 means no adapter
  Index bases = 512;                  ///< k, of each factor, and so its coefficients; 0 means no adapter
  double alpha = 16;                  ///< > 0, the numerator of the scale; not α_i
  ScaleRule scale = alpha_over_rank;  ///< s(b)
  NolaVariant variant = NolaVariant::language;
};

/// Δ(x) = s · B · A · x  with  A = A_0 + Σ_i α_i 𝒜_i  and  B = Σ_i β_i ℬ_i,  i < k
///
/// NOLA (Koohpayegani et al., arXiv 2310.02556): the factors are combinations of random matrices that a seed makes again at every call, so
/// that an adapter is its 2 k coefficients and a seed, whatever its features and rank. A_0 comes from the seed too.
///
///     Linear<float, Nola<float>> layer(W, {.max_rank = 8, .bases = 512}, rng);       // rank b: the first b rows of A and columns of B
///     Linear<float, NolaBases<float>> other(W, {.max_rank = 8, .bases = 512}, rng);  // rank b: the first b bases of each
///     auto gradients = zeros_like(layer);
///     y = layer.forward(x, 4, cache);
///     dx = layer.backward(dy, cache, gradients);
///
/// Nola nests ranks: Δ_b has A_b = A[:b, :], B_b = B[:, :b] and s(b). Every coefficient takes part at every rank, so there is nothing to
/// truncate, and any slice with a rank trains all coefficients, also one that is frozen up to its rank. NolaBases nests bases (ours): it
/// has the factors whole, of the first b bases with entries U(−1, 1) / √b (language), and s(max_rank); truncation shortens α and β, and
/// frozen prefixes work.
///
/// Memory is that of one A and one B, and of as much again in a backward, whatever k. Generating a basis costs about as much as multiplying
/// by it. Zero coefficients without A_0 (vision) are a point where all gradients are zero, forever.
template <std::floating_point S, NolaNesting nesting = NolaNesting::rank>
struct Nola : Factored<Nola<S, nesting>, S> {
  static constexpr std::string_view name = "Nola";
  using Scalar = S;
  using Options = NolaOptions;

  struct Gradients {
    Gradient<VectorX<S>> alpha;
    Gradient<VectorX<S>> beta;
  };

  struct Workspace {
    Buffer<S> dh;      // s · Bᵀ · dy, from prepare_backward to backward_term
    Buffer<S> dA, dB;  // of a run, as the factors in the cache
  };

  /// Filled by one add_forward, read by any number of add_backward.
  struct Cache {
    BatchRanks ranks = RankSlice::none();
    Index samples = 0;
    Buffer<S> h;  // A x, highest rank × n
    Buffer<S> A;  // in × columns: Aᵀ, one for all runs where ranks are nested, one for each where bases are
    Buffer<S> B;  // out × columns
  };

  VectorX<S> alpha;  // coefficients of A: one for each basis, or fewer once cut
  VectorX<S> beta;   // of B
  Options options;
  std::uint64_t seed;  // of the bases and of A_0

  /// Fresh, with a seed drawn from `rng`: adapters made one after the other have bases of their own.
  /// Throws std::invalid_argument if max_rank is outside [0, min(in, out)], bases < 0 or alpha is not a finite number above 0.
  Nola(Index in_features, Index out_features, Options options_, Rng& rng)
      : options(options_), seed(rng.next()), in_(in_features), out_(out_features) {
    require_options();
    const bool zero = options.variant == NolaVariant::language;
    alpha = beta = VectorX<S>::Constant(max_rank() > 0 ? options.bases : 0, zero ? S(0) : S(1) / static_cast<S>(options.bases));
  }

  /// From trained coefficients, whose number becomes options.bases, and the seed of the adapter that they were trained in.
  /// Throws ShapeError if there are not as many of A as of B.
  Nola(Index in_features, Index out_features, Options options_, std::uint64_t seed_, VectorX<S> alpha_, VectorX<S> beta_)
      : alpha(std::move(alpha_)), beta(std::move(beta_)), options(options_), seed(seed_), in_(in_features), out_(out_features) {
    options.bases = alpha.size();
    require_options();
    check_parameters();
  }

  Index in_features() const { return in_; }
  Index out_features() const { return out_; }
  /// The largest b: options.max_rank, or options.bases where bases are nested.
  Index max_rank() const {
    return options.bases == 0 || options.max_rank == 0 ? 0 : nesting == NolaNesting::rank ? options.max_rank : options.bases;
  }
  /// What is there of max_rank: fewer bases once cut (ranks/truncate.hpp).
  Index components() const { return nesting == NolaNesting::rank ? max_rank() : alpha.size(); }
  S scale(Index rank) const { return static_cast<S>(exact_scale(rank)); }  ///< s(b), or s(max_rank) where bases are nested
  double exact_scale(Index rank) const { return options.scale(options.alpha, factor_rank(rank), options.max_rank); }

  /// y += s · B · h, where b is the rank of each column: the factors and h = A x, into the cache (overwritten). Makes the factors once,
  /// which costs r·k·(in + out) random numbers and as many multiply-adds, with nested bases for each run of equal ranks; then as LowRank.
  void prepare_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const {
    check_parameters();
    this->check_forward(x, ranks);
    cache.ranks = ranks.at_most(components());
    cache.samples = x.cols();
    const Index columns = factor_columns(cache.ranks, x.cols());
    auto A = cache.A.resize(in_features(), columns), B = cache.B.resize(out_features(), columns);
    auto h = cache.h.resize(factor_rank(cache.ranks.highest()), x.cols());
    if (nesting == NolaNesting::rank && columns > 0) make_factors(columns, A, B);
    for_each_run(cache.ranks, x.cols(), [&](Index begin, Index n, RankSlice rank, Index first, Index r) {
      if (r == 0) return;
      if (nesting == NolaNesting::bases) make_factors(rank.active, A.middleCols(first, r), B.middleCols(first, r));
      set_dot_products(h.block(0, begin, r, n), A.middleCols(first, r).transpose(), x.middleCols(begin, n));
    });
  }

  LowRankTerm<S> forward_term(const Cache& cache, const RankRun& run) const {
    const Index first = first_column(cache, run), r = factor_rank(run.rank.active);
    return {cache.B.view().middleCols(first, r), cache.h.view().block(0, run.begin, r, run.count), r > 0 ? scale(run.rank.active) : S(0)};
  }

  /// Throws as Factored's, and ShapeError if the coefficients disagree with the options or the cache is of other sizes.
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& /*workspace*/) const {
    check_parameters();
    this->check_call(x, dy, cache, gradients, components());
    require_equal(cache.A.rows(), in_features(), "Nola::add_backward: in_features of the cached A");
    require_equal(cache.B.rows(), out_features(), "Nola::add_backward: out_features of the cached B");
    require_equal(cache.B.cols(), factor_columns(cache.ranks, dy.cols()), "Nola::add_backward: rank of the cached factors");
  }

  /// With h = A x and s at b:
  ///
  ///     y = s B h           dB = s · dy · hᵀ      dβ_i += ⟨dB, ℬ_i⟩      dh = s · Bᵀ · dy
  ///     h = A x             dA = dh · xᵀ          dα_i += ⟨dA, 𝒜_i⟩      dx += Aᵀ · dh
  ///
  /// over the coefficients in [t, b) where bases are nested, else over all. dh is left in the workspace. Costs what LowRank does and, for
  /// each run of equal ranks, as many random numbers as a forward.
  void prepare_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    check_backward(x, dy, cache, gradients, workspace);
    const auto B = cache.B.view(), h = cache.h.view();
    auto dh = workspace.dh.resize(h.rows(), dy.cols());
    auto dA = workspace.dA.resize(in_features(), h.rows()), dB = workspace.dB.resize(out_features(), h.rows());
    for_each_run(cache.ranks, dy.cols(), [&](Index begin, Index n, RankSlice rank, Index first, Index r) {
      if (r == 0) return;
      const auto dy_b = dy.middleCols(begin, n);
      auto dh_b = dh.block(0, begin, r, n);
      set_dot_products(dh_b, B.middleCols(first, r).transpose(), dy_b, scale(rank.active));
      const bool all = nesting == NolaNesting::rank;  // coefficients take part
      const Index t = all ? 0 : rank.trainable_from, trained = all ? alpha.size() : rank.trainable();
      if (trained > 0) {
        set_product(dB.leftCols(r), dy_b, h.block(0, begin, r, n).transpose(), scale(rank.active));
        set_product(dA.leftCols(r), x.middleCols(begin, n), dh_b.transpose());
        source().add_gradients(dA.leftCols(r), dB.leftCols(r), active_bases(rank.active), t, gradients.alpha.segment(t, trained),
                               gradients.beta.segment(t, trained));
      }
      if (!all) {
        gradients.alpha.components.insert(rank);
        gradients.beta.components.insert(rank);
      }
    });
  }

  LowRankTerm<S> backward_term(const Cache& cache, const Workspace& workspace, const RankRun& run) const {
    const Index first = first_column(cache, run), r = factor_rank(run.rank.active);
    return {cache.A.view().middleCols(first, r), workspace.dh.view().block(0, run.begin, r, run.count)};
  }

  /// s, B and A, as other programs keep them. No factors can be taken back: they are hardly ever a combination of the bases.
  LowRankFactors<S> factors(Index rank) const {
    check_parameters();
    require_in_range(rank, 0, max_rank(), "Nola::factors: rank");
    const Index b = std::min(rank, components()), r = factor_rank(b);
    MatrixX<S> A(in_features(), r), B(out_features(), r);
    if (b > 0) make_factors(b, A, B);
    return {A.transpose(), std::move(B), b > 0 ? exact_scale(b) : 1};
  }

  static void members(const auto& f, auto&... t) {
    constexpr RankAxis axis = nesting == NolaNesting::rank ? RankAxis::none : RankAxis::rows;
    f(Parameter{"nola_alpha", axis}, t.alpha...);
    f(Parameter{"nola_beta", axis}, t.beta...);
    f(Setting{"seed"}, &Nola::seed);
    f(Setting{"rank of the factors"}, [](const Nola& self) { return self.options.max_rank; });
    f(Setting{"variant"}, [](const Nola& self) { return self.options.variant == NolaVariant::language ? "language" : "vision"; });
    f(Setting{"nesting"}, [](const Nola&) { return nesting == NolaNesting::rank ? "rank" : "bases"; });
    scale_settings<Nola>(f);
  }

 private:
  NolaFactors<S> source() const { return {seed, in_, out_, options.max_rank, options.variant}; }
  Index active_bases(Index b) const { return nesting == NolaNesting::rank ? alpha.size() : b; }
  Index factor_rank(Index b) const { return nesting == NolaNesting::rank || b == 0 ? b : options.max_rank; }

  /// A (in × r, transposed) and B (out × r) at rank b, or of as many columns as are asked for where ranks are nested.
  void make_factors(Index b, MatrixRef<S> A, MatrixRef<S> B) const {
    const Index bases = active_bases(b);
    source().make(alpha.head(bases), beta.head(bases), A, B);
  }

  /// Of the factors of a run, in those of the cache: all runs have the same where ranks are nested, each its own where bases are.
  Index first_column(const Cache& cache, const RankRun& run) const {
    Index first = 0;
    if (nesting == NolaNesting::rank) return first;
    for (const RankRun& before : cache.ranks.runs(cache.samples)) {
      if (before.begin == run.begin) break;
      first += factor_rank(before.rank.active);
    }
    return first;
  }

  /// Calls f(begin, n, rank, first, r) for each run, whose factors are the r columns from `first` on of those in the cache; returns how
  /// many columns these are in all.
  template <class F>
  Index for_each_run(const BatchRanks& ranks, Index samples, F&& f) const {
    Index first = 0, columns = 0;
    ranks.for_each_run(samples, [&](Index begin, Index n, RankSlice rank) {
      const Index r = factor_rank(rank.active);
      f(begin, n, rank, first, r);
      columns = std::max(columns, first + r);
      if (nesting == NolaNesting::bases) first += r;
    });
    return columns;
  }
  Index factor_columns(const BatchRanks& ranks, Index samples) const {
    return for_each_run(ranks, samples, [](Index, Index, RankSlice, Index, Index) {});
  }

  /// The coefficients are public.
  void check_parameters() const {
    require_equal(beta.size(), alpha.size(), "Nola: coefficients of B, against those of A");
    if (nesting == NolaNesting::rank) {
      require_equal(alpha.size(), max_rank() > 0 ? options.bases : 0, "Nola: coefficients of A, against options.bases");
    } else {
      require_in_range(alpha.size(), 0, max_rank(), "Nola: coefficients of A, against options.bases");
    }
  }

  void require_options() const {
    require_in_range(options.max_rank, 0, std::min(in_, out_), "Nola: max_rank");
    require_in_range(options.bases, 0, std::numeric_limits<Index>::max(), "Nola: bases");
    require_option(options.alpha > 0 && std::isfinite(options.alpha), options.alpha, "Nola: alpha", "a finite number > 0");
  }

  Index in_, out_;
};

/// NOLA whose rank argument is the number of bases: the first b of each factor.
template <std::floating_point S>
using NolaBases = Nola<S, NolaNesting::bases>;

}  // namespace dylora

#endif
