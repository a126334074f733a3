#ifndef DYLORA_METHODS_MULTILORA_HPP
#define DYLORA_METHODS_MULTILORA_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
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
#include "dylora/ranks/scale.hpp"

namespace dylora {

/// The learnable gain of a module: a number for each output, or one number. Which of them the paper has is unconfirmed.
enum class GainShape { per_output, scalar };

struct MultiLoraOptions {
  Index max_rank = 8;                      ///< R, of each module, at most min(in, out); 0 means no adapter
  Index modules = 3;                       ///< how many low-rank modules run in parallel
  double alpha = 16;                       ///< α > 0, the numerator of the scale
  ScaleRule scale = alpha_over_rank;       ///< s(b), b being the rank of one module
  GainShape gain = GainShape::per_output;  ///< c_j
};

/// Δ_b(x) = s(b) · Σ_j diag(c_j) · B_j[:, :b] · A_j[:b, :] · x, over j = 1 … modules
///
/// MultiLoRA (Wang et al., arXiv 2311.11501): parallel modules, all of them started at random, with learnable gains c_j that carry the zero
/// start, so that no few singular directions dominate the change. Here every module is cut to the same rank b.
///
///     Linear<float, MultiLora<float>> layer(W, {.max_rank = 8, .modules = 3}, rng);  // A and B uniform, c = 0, so Δ = 0
///     auto gradients = zeros_like(layer);
///     y = layer.forward(x, 4, cache);                                                // every module at rank 4
///     dx = layer.backward(dy, cache, gradients);
///
/// Component i is that of every module: row i of A is [A_1[i, :], A_2[i, :], …], column i of B is B_1[:, i] on top of B_2[:, i] and so on.
/// So module j is a block of columns of A and of rows of B; and in memory the first b components are one product of rank b · modules, which
/// is how they are computed. The gains take part at every rank, and learn also where few components do. With c = B = 0 nothing ever learns.
template <std::floating_point S>
struct MultiLora : Factored<MultiLora<S>, S> {
  static constexpr std::string_view name = "MultiLora";
  using Scalar = S;
  using Options = MultiLoraOptions;

  struct Gradients {
    Gradient<RowMatrix<S>> A;
    Gradient<MatrixX<S>> B;
    Gradient<MatrixX<S>> gain;
  };

  struct Workspace {
    Buffer<S> dh;  // s · (C∘B)ᵀ · dy, from prepare_backward to backward_term
    Buffer<S> M;   // s · dy · hᵀ
  };

  /// Filled by one add_forward, read by any number of add_backward.
  struct Cache {
    BatchRanks ranks = RankSlice::none();
    Index samples = 0;
    Buffer<S> h;         // A_b x, highest rank · modules × n
    Buffer<S> scaled_B;  // C∘B: column j of component i times c_j, out × highest rank · modules
  };

  RowMatrix<S> A;   // components × modules · in
  MatrixX<S> B;     // modules · out × components
  MatrixX<S> gain;  // out × modules, or 1 × modules; column j is c_j. No columns where max_rank is 0
  Options options;

  /// Fresh: A_j and B_j Kaiming-uniform with a = √5, which is U(−1/√in, 1/√in) and U(−1/√R, 1/√R), drawn for each module; c = 0.
  /// Throws std::invalid_argument if max_rank is outside [0, min(in, out)], modules < 1 or alpha is not a finite number above 0.
  MultiLora(Index in_features, Index out_features, Options options_, Rng& rng) : options(options_) {
    require_in_range(options.max_rank, 0, std::min(in_features, out_features), "MultiLora: max_rank");
    require_options();
    const double bound_of_A = 1 / std::sqrt(static_cast<double>(in_features)), bound_of_B = 1 / std::sqrt(static_cast<double>(max_rank()));
    A = random_uniform<S, RowMatrix<S>>(options.max_rank, options.modules * in_features, bound_of_A, rng);
    B = random_uniform<S>(options.modules * out_features, options.max_rank, bound_of_B, rng);
    gain = constant_gain(0);
  }

  /// From trained factors; max_rank, modules and the shape of the gain are taken from them. Throws ShapeError if they do not fit together.
  MultiLora(RowMatrix<S> A_, MatrixX<S> B_, MatrixX<S> gain_, Options options_)
      : A(std::move(A_)), B(std::move(B_)), gain(std::move(gain_)), options(options_) {
    options.max_rank = A.rows();
    if (options.max_rank > 0) {
      options.modules = gain.cols();
      options.gain = gain.rows() == 1 ? GainShape::scalar : GainShape::per_output;
    }
    require_options();
    check_parameters();
  }

  Index in_features() const { return A.cols() / options.modules; }
  Index out_features() const { return B.rows() / options.modules; }
  Index max_rank() const { return options.max_rank; }
  Index components() const { return A.rows(); }  ///< of each module: max_rank, or fewer once cut (ranks/truncate.hpp)
  S scale(Index rank) const { return static_cast<S>(exact_scale(rank)); }
  double exact_scale(Index rank) const { return options.scale(options.alpha, rank, options.max_rank); }

  /// y += s(b) · (C∘B)_b · h, where b is the rank of each column: h = A_b x and C∘B, into the cache (overwritten). Costs 2·b·modules·n·in
  /// flops, and the term as many for out.
  void prepare_forward(ConstMatrixRef<S> x, const BatchRanks& ranks, Cache& cache) const {
    check_parameters();
    this->check_forward(x, ranks);
    cache.ranks = ranks.at_most(components());
    cache.samples = x.cols();
    const auto used_B = B_of(cache.ranks.highest());
    multiply_by_gain(used_B, cache.scaled_B.resize(out_features(), used_B.cols()));
    auto h = cache.h.resize(used_B.cols(), x.cols());
    cache.ranks.for_each_run(x.cols(), [&](Index begin, Index n, RankSlice rank) {
      const auto A_b = A_of(rank.active);
      if (A_b.rows() > 0) set_dot_products(h.block(0, begin, A_b.rows(), n), A_b, x.middleCols(begin, n));
    });
  }

  LowRankTerm<S> forward_term(const Cache& cache, const RankRun& run) const {
    const Index b = run.rank.active, count = columns(b);
    return {cache.scaled_B.view().leftCols(count), cache.h.view().block(0, run.begin, count, run.count), b > 0 ? scale(b) : S(0)};
  }

  /// Throws as Factored's, and ShapeError if the factors and the gain disagree or the cache is of other sizes.
  void check_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, const Gradients& gradients,
                      const Workspace& /*workspace*/) const {
    check_parameters();
    this->check_call(x, dy, cache, gradients, components());
    require_equal(cache.h.rows(), columns(cache.ranks.highest()), "MultiLora::add_backward: rank of the cached h");
    require_equal(cache.scaled_B.rows(), out_features(), "MultiLora::add_backward: out_features of the cached B");
  }

  /// With s = s(b), M = s · dy · hᵀ and the slice [t, b) trained:
  ///
  ///     y = s (C∘B) h       dB[:, t:b] += (C∘M)[:, t:b]       dc_j += Σ_i B_j[:, i] ∘ M_j[:, i], i < b       dh = s · (C∘B)ᵀ · dy
  ///     h = A_b x           dA[t:b, :] += dh[t:b] · xᵀ        dx += A_bᵀ · dh
  ///
  /// where C∘B is B with module j times c_j, and a scalar c_j gets the sum of that. dh is left in the workspace. Costs
  /// 2·b·modules·n·(in + 2·out) flops at t = 0, and the term 2·b·modules·n·in.
  void prepare_backward(ConstMatrixRef<S> x, ConstMatrixRef<S> dy, const Cache& cache, Gradients& gradients, Workspace& workspace) const {
    check_backward(x, dy, cache, gradients, workspace);
    const auto h = cache.h.view(), scaled_B = cache.scaled_B.view();
    auto dh = workspace.dh.resize(h.rows(), dy.cols()), M = workspace.M.resize(out_features(), h.rows());
    cache.ranks.for_each_run(dy.cols(), [&](Index begin, Index n, RankSlice rank) {
      const Index b = rank.active, t = rank.trainable_from;
      if (b == 0) return;
      const auto dy_b = dy.middleCols(begin, n);
      auto dh_b = dh.block(0, begin, columns(b), n);
      set_dot_products(dh_b, scaled_B.leftCols(columns(b)).transpose(), dy_b, scale(b));
      set_product(M.leftCols(columns(b)), dy_b, h.block(0, begin, columns(b), n).transpose(), scale(b));
      add_gain_gradient(M.leftCols(columns(b)), gradients.gain);
      if (t < b) {
        const Index first = columns(t), count = columns(b - t);
        multiply_by_gain(M.middleCols(first, count), M.middleCols(first, count));
        Eigen::Map<MatrixX<S>>(gradients.B.col(t).data(), out_features(), count) += M.middleCols(first, count);
        add_product(Eigen::Map<RowMatrix<S>>(gradients.A.row(t).data(), count, in_features()), dh_b.middleRows(first, count),
                    x.middleCols(begin, n).transpose());
      }
      gradients.A.components.insert(rank);
      gradients.B.components.insert(rank);
    });
  }

  LowRankTerm<S> backward_term(const Cache& /*cache*/, const Workspace& workspace, const RankRun& run) const {
    const Index b = run.rank.active;
    return {A_of(b).transpose(), workspace.dh.view().block(0, run.begin, columns(b), run.count)};
  }

  /// One product of rank b · modules, the gains multiplied into its B: of the first b components, or of all there are if b is more.
  LowRankFactors<S> factors(Index rank) const {
    check_parameters();
    require_in_range(rank, 0, max_rank(), "MultiLora::factors: rank");
    const Index b = std::min(rank, components());
    LowRankFactors<S> product{A_of(b), MatrixX<S>(out_features(), columns(b)), b > 0 ? exact_scale(b) : 1};
    multiply_by_gain(B_of(b), product.B);
    return product;
  }

  /// Becomes Δ of these factors with every gain 1, their components dealt out to the modules in turn; max_rank is their rank over modules,
  /// rounded up, and alpha what makes the scale rule give their scale there. What is missing in the last component has a B of 0 and repeats
  /// the first rows of A: it adds nothing and can learn. Throws as LowRank does, with nothing changed.
  void set_factors(LowRankFactors<S> factors) {
    require_equal(factors.A.cols(), in_features(), "MultiLora::set_factors: columns of A (in_features)");
    require_equal(factors.B.rows(), out_features(), "MultiLora::set_factors: rows of B (out_features)");
    require_equal(factors.B.cols(), factors.A.rows(), "MultiLora::set_factors: columns of B (rank) against rows of A");
    MultiLora changed = *this;
    const Index rank = factors.A.rows(), b = (rank + options.modules - 1) / options.modules;
    changed.options.max_rank = b;
    if (b > 0) changed.options.alpha = alpha_giving(options.scale, factors.scale, b, b);
    changed.require_options();
    changed.A.resize(b, A.cols());
    changed.B.setZero(B.rows(), b);
    changed.gain = changed.constant_gain(1);
    Eigen::Map<RowMatrix<S>> rows(changed.A.data(), columns(b), in_features());
    for (Index i = 0; i < columns(b); ++i) rows.row(i) = factors.A.row(i % rank);
    if (b > 0) Eigen::Map<MatrixX<S>>(changed.B.data(), out_features(), rank) = factors.B;
    *this = std::move(changed);
  }

  static void members(const auto& f, auto&... t) {
    f(Parameter{"multilora_A", RankAxis::rows}, t.A...);
    f(Parameter{"multilora_B", RankAxis::cols}, t.B...);
    f(Parameter{"multilora_gain", RankAxis::none}, t.gain...);
    scale_settings<MultiLora>(f);
  }

 private:
  /// b components as they are in memory: so many columns of one B, and rows of one A.
  Index columns(Index b) const { return b * options.modules; }
  Eigen::Map<const RowMatrix<S>> A_of(Index b) const { return {A.data(), columns(b), in_features()}; }
  Eigen::Map<const MatrixX<S>> B_of(Index b) const { return {B.data(), out_features(), columns(b)}; }

  MatrixX<S> constant_gain(S value) const {
    return MatrixX<S>::Constant(options.gain == GainShape::scalar ? 1 : out_features(), options.max_rank > 0 ? options.modules : 0, value);
  }

  /// to = C∘from, column by column, where `from` begins with the first module; they may be the same.
  void multiply_by_gain(ConstMatrixRef<S> from, MatrixRef<S> to) const {
    for (Index i = 0; i < to.cols(); ++i) {
      const auto c = gain.col(i % options.modules);
      options.gain == GainShape::scalar ? void(to.col(i) = c[0] * from.col(i)) : void(to.col(i) = c.cwiseProduct(from.col(i)));
    }
  }

  void add_gain_gradient(ConstMatrixRef<S> M, MatrixX<S>& gradient) const {
    const auto columns_of_B = B_of(components());
    for (Index i = 0; i < M.cols(); ++i) {
      auto dc = gradient.col(i % options.modules);
      const auto product = columns_of_B.col(i).cwiseProduct(M.col(i));
      options.gain == GainShape::scalar ? void(dc[0] += product.sum()) : void(dc += product);
    }
  }

  /// A, B and the gain are public.
  void check_parameters() const {
    const Index n = options.modules;
    require_equal(B.cols(), A.rows(), "MultiLora: columns of B (rank) against rows of A");
    require_in_range(A.rows(), 0, options.max_rank, "MultiLora: components, against options.max_rank");
    require_equal(A.cols(), n * in_features(), "MultiLora: columns of A, in_features for each module");
    require_equal(B.rows(), n * out_features(), "MultiLora: rows of B, out_features for each module");
    require_equal(gain.cols(), options.max_rank > 0 ? n : 0, "MultiLora: columns of the gain (modules)");
    require_equal(gain.rows(), options.gain == GainShape::scalar ? 1 : out_features(), "MultiLora: rows of the gain");
  }

  void require_options() const {
    require_in_range(options.modules, 1, std::numeric_limits<Index>::max(), "MultiLora: modules");
    require_option(options.alpha > 0 && std::isfinite(options.alpha), options.alpha, "MultiLora: alpha", "a finite number > 0");
  }
};

}  // namespace dylora

#endif
