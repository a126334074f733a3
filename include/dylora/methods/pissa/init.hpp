#ifndef DYLORA_METHODS_PISSA_INIT_HPP
#define DYLORA_METHODS_PISSA_INIT_HPP

#include <Eigen/QR>
#include <Eigen/SVD>
#include <algorithm>
#include <cmath>
#include <concepts>
#include <string>
#include <utility>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/random_normal.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"
#include "dylora/linalg/svd.hpp"
#include "dylora/methods/pissa/offset_low_rank.hpp"

/// Where an adapter starts. LowRank's own constructor is the default of the field: A Kaiming-uniform, B = 0. Others take more from the
/// frozen weight W (out × in), whose leading directions they train first:
///
///     pissa_init<float>(W, {.max_rank = 8, .alpha = 8})         singular directions, zero at the start at every rank; W stays as it is
///     olora_init<float>(W, {.max_rank = 8, .alpha = 8})         the first columns of its QR decomposition, likewise
///     pissa_split<float>(W, options)                         as published: a smaller weight, and the adapter that makes it W again
///     gaussian_init<float>(in, out, options, rng)               A normal, B = 0
///
/// Include this file only where it is used: the decompositions take long to compile. They are done in double, each sign chosen so that the
/// same W gives the same factors, bit for bit with any number of threads.
namespace dylora {

/// W = weight + Δ_max_rank, the published form of PiSSA and OLoRA: `weight` is frozen in the place of W. At a lower rank the adapter lacks
/// components that were taken out of the weight, and unless its scale is constant (alpha_over_max_rank) it has them at another size: train
/// and use it at max_rank, or use the forms that are zero at every rank.
///
///     auto [weight, adapter] = pissa_split<float>(W, {.max_rank = 8, .alpha = 8});
///     Linear<float> layer(weight, adapter);
template <std::floating_point S>
struct SplitWeight {
  MatrixX<S> weight;
  LowRank<S> adapter;
};

namespace detail {

using Exact = MatrixX<double>;

template <class S>
Exact decomposable(ConstMatrixRef<S> W, Index max_rank, const std::string& what) {
  require_in_range(max_rank, 0, std::min(W.rows(), W.cols()), what + ": max_rank");
  if (!W.allFinite()) throw NonFiniteError(what + ": W: expected finite values, got a NaN or an infinity");
  return W.template cast<double>();
}

/// B A = U Σ Vᵀ / s in its first max_rank components: B = U √(Σ/s) and A = √(Σ/s) Vᵀ, with s = s(max_rank).
template <class S>
LowRank<S> pissa_factors(ConstMatrixRef<S> W, const LowRankOptions& options, const std::string& what) {
  const Index r = options.max_rank;
  const Exact exact = decomposable<S>(W, r, what);
  if (r == 0) return {RowMatrix<S>(0, W.cols()), MatrixX<S>(W.rows(), 0), options};
  Exact U, V;
  VectorX<double> sigma;
  for_each_decomposition(1, [&](Index) {
    const Eigen::BDCSVD<Exact> svd(exact, Eigen::ComputeThinU | Eigen::ComputeThinV);
    U = svd.matrixU().leftCols(r);
    V = svd.matrixV().leftCols(r);
    sigma = svd.singularValues().head(r);
  });
  const VectorX<double> root = (sigma / options.scale(options.alpha, r, r)).cwiseSqrt();
  VectorX<double> signed_root = root;
  for (Index c = 0; c < r; ++c) {  // the largest element of each column of B is positive
    Index largest;
    U.col(c).cwiseAbs().maxCoeff(&largest);
    if (U(largest, c) < 0) signed_root[c] = -root[c];
  }
  return {RowMatrix<S>((V * signed_root.asDiagonal()).transpose().template cast<S>()),
          MatrixX<S>((U * signed_root.asDiagonal()).template cast<S>()), options};
}

/// B A = Q_r R_r: the first max_rank columns of Q and rows of R, where W = Q R; each diagonal element of R is ≥ 0. Q_r depends on as many
/// columns of W alone, and R_r = Q_rᵀ W.
template <class S>
LowRank<S> olora_factors(ConstMatrixRef<S> W, const LowRankOptions& options, const std::string& what) {
  const Index r = options.max_rank;
  const Exact exact = decomposable<S>(W, r, what);
  if (r == 0) return {RowMatrix<S>(0, W.cols()), MatrixX<S>(W.rows(), 0), options};
  Exact Q = Exact::Identity(W.rows(), r), R(r, W.cols());
  for_each_decomposition(1, [&](Index) { Q.applyOnTheLeft(Eigen::HouseholderQR<Exact>(exact.leftCols(r)).householderQ()); });
  set_product(R, Q.transpose(), exact);
  for (Index c = 0; c < r; ++c) {
    R.row(c).head(c).setZero();  // but for rounding
    if (R(c, c) >= 0) continue;
    Q.col(c) *= -1;
    R.row(c) *= -1;
  }
  return {RowMatrix<S>(R.template cast<S>()), MatrixX<S>(Q.template cast<S>()), options};
}

/// W − s B A, from the factors as the adapter has them, so that together they are W again up to one rounding.
template <class S>
SplitWeight<S> split_of(ConstMatrixRef<S> W, LowRank<S> adapter) {
  const Index r = adapter.max_rank();
  Exact weight = W.template cast<double>();
  if (r > 0) {
    add_product(weight, Exact(adapter.B.template cast<double>()), Exact(adapter.A.template cast<double>()),
                -static_cast<double>(adapter.scale(r)));
  }
  return {weight.template cast<S>(), std::move(adapter)};
}

template <class S>
OffsetLowRank<S> from_start(LowRank<S> start) {
  return {std::move(start.A), std::move(start.B), start.options};
}

}  // namespace detail

/// PiSSA (Meng et al., arXiv 2404.02948) for every rank: starts at the leading singular directions of W, W = U Σ Vᵀ,
///
///     B = U_r √(Σ_r / s)      A = √(Σ_r / s) V_rᵀ      with s = s(max_rank), so that s · B · A is the best approximation of W of that rank
///
/// and adds what training makes of them (OffsetLowRank), so that at the start Δ_b = 0 at every b and W stays as it is. The best
/// approximation of every lower rank, too, is a prefix; where the scale depends on the rank, times a factor.
///
/// Throws std::invalid_argument unless 0 ≤ max_rank ≤ min(in, out) and for an alpha as LowRank does, NonFiniteError if W is not finite.
/// Costs a singular value decomposition of W, O(in · out · min(in, out)).
template <std::floating_point S>
OffsetLowRank<S> pissa_init(ConstMatrixRef<S> W, const LowRankOptions& options) {
  return detail::from_start(detail::pissa_factors<S>(W, options, "pissa_init"));
}

/// PiSSA as published: the weight W − s · B · A, with what is left of the spectrum of W, and an adapter at A and B that is trained at
/// max_rank. Throws as pissa_init.
template <std::floating_point S>
SplitWeight<S> pissa_split(ConstMatrixRef<S> W, const LowRankOptions& options) {
  return detail::split_of<S>(W, detail::pissa_factors<S>(W, options, "pissa_split"));
}

/// OLoRA (Büyükakyüz, arXiv 2406.01775) for every rank: starts at B = Q_r, whose columns are orthonormal, and A = R_r, where W = Q R,
/// and adds what training makes of them (OffsetLowRank), so that at the start Δ_b = 0 at every b and W stays as it is. Q_b R_b is a prefix.
///
/// Throws as pissa_init. Costs O(max_rank · in · out).
template <std::floating_point S>
OffsetLowRank<S> olora_init(ConstMatrixRef<S> W, const LowRankOptions& options) {
  return detail::from_start(detail::olora_factors<S>(W, options, "olora_init"));
}

/// OLoRA as PEFT has it: the weight W − s · B · A, and an adapter at A and B that is trained at max_rank. The scale stays outside of the
/// factors: only at s = 1 are the first max_rank columns of the weight 0. Throws as pissa_init.
template <std::floating_point S>
SplitWeight<S> olora_split(ConstMatrixRef<S> W, const LowRankOptions& options) {
  return detail::split_of<S>(W, detail::olora_factors<S>(W, options, "olora_split"));
}

/// A normal with this standard deviation, B = 0: LoRA (arXiv 2106.09685, section 4.1), which leaves the deviation open.
/// Throws as LowRank and random_normal do.
template <std::floating_point S>
LowRank<S> gaussian_init(Index in_features, Index out_features, const LowRankOptions& options, double deviation, Rng& rng) {
  require_in_range(options.max_rank, 0, std::min(in_features, out_features), "gaussian_init: max_rank");
  return {random_normal<S, RowMatrix<S>>(options.max_rank, in_features, deviation, rng), MatrixX<S>::Zero(out_features, options.max_rank),
          options};
}

/// The same with a deviation of 1 / max_rank, as PEFT's init_lora_weights = "gaussian".
template <std::floating_point S>
LowRank<S> gaussian_init(Index in_features, Index out_features, const LowRankOptions& options, Rng& rng) {
  return gaussian_init<S>(in_features, out_features, options, 1 / static_cast<double>(std::max<Index>(1, options.max_rank)), rng);
}

}  // namespace dylora

#endif
