#ifndef DYLORA_METHODS_RESLORA_MERGE_HPP
#define DYLORA_METHODS_RESLORA_MERGE_HPP

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <deque>
#include <functional>
#include <iterator>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/adapters/factors.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/product.hpp"
#include "dylora/methods/reslora/link.hpp"
#include "dylora/weights/dense.hpp"
#include "dylora/weights/weight.hpp"

/// A residual chain as plain weights, one for each link (ResLoRA, arXiv 2402.18039, section 3.3). Exact for block shortcuts:
///
///     W_n + s · Σ_q B_q · A_q
///
/// An input or middle shortcut reads other inputs than x_n, which no weight can; they are estimated as x_{n−k} ≈ α · x_n, with α from norms
/// that the caller observes, or from the weights. What is exact all the same: the first link. The links themselves stay as they are.
///
///     InputNorms norms(chain.size());
///     for each batch in training: norms.observe(n, x_n) for each link n
///     const std::vector<DenseWeight<float>> weights = merge_bi(chain, norms, 4);
namespace dylora {

/// f_n: the mean of what was observed in the last batches, for each link; ‖x_n‖ for merge_bi and merge_folded, ‖A_b x_n‖ at the rank that
/// is to be merged for merge_scalar.
class InputNorms {
 public:
  /// Throws std::invalid_argument if links < 0 or window < 1. The released code's window is 100.
  explicit InputNorms(Index links, Index window = 100) : window_(window) {
    require_option(links >= 0, static_cast<double>(links), "InputNorms: links", "0 or more");
    require_option(window >= 1, static_cast<double>(window), "InputNorms: window", "1 or more");
    norms_.resize(static_cast<std::size_t>(links));
  }

  Index links() const { return static_cast<Index>(norms_.size()); }

  /// Adds the Frobenius norm of `input`, one batch, to what is known of a link, and forgets what is older than the window.
  /// Throws std::invalid_argument if there is no such link. Summed in double.
  template <class Derived>
  void observe(Index link, const Eigen::MatrixBase<Derived>& input) {
    require_in_range(link, 0, links() - 1, "InputNorms::observe: link");
    auto& norms = norms_[static_cast<std::size_t>(link)];
    norms.push_back(input.template cast<double>().norm());
    if (static_cast<Index>(norms.size()) > window_) norms.pop_front();
  }

  /// f_n, or 0 if nothing was observed.
  double mean(Index link) const {
    require_in_range(link, 0, links() - 1, "InputNorms::mean: link");
    const auto& norms = norms_[static_cast<std::size_t>(link)];
    double sum = 0;
    for (const double norm : norms) sum += norm;
    return norms.empty() ? 0 : sum / static_cast<double>(norms.size());
  }

  /// f_earlier / f_link, or 1 if one of them is 0.
  double ratio(Index earlier, Index link) const { return ratio_of(mean(earlier), mean(link)); }

  static double ratio_of(double earlier, double later) { return earlier == 0 || later == 0 ? 1 : earlier / later; }

 private:
  std::vector<std::deque<double>> norms_;
  Index window_;
};

namespace detail {

template <class Links, class Member>
using LinkType = std::remove_cvref_t<std::invoke_result_t<Member&, decltype(std::declval<const Links&>()[0])>>;

/// Whether the chain takes this shortcut.
template <class Links, class Member, Shortcut shortcut>
concept ChainOf = std::remove_cvref_t<decltype(std::declval<LinkType<Links, Member>>().adapter)>::kind == shortcut &&
                  MergeableWeight<std::remove_cvref_t<decltype(std::declval<LinkType<Links, Member>>().base)>>;

/// For each link its base's weight with what update(n, reached, factors, merged, W) adds to it, and its bias. There factors[q] are s, B and
/// A of link q at `rank`, and merged[q] the weights of those before n.
template <class Links, class Member, class Update>
auto merge_chain(const Links& links, RankSlice rank, Member member, Update&& update) {
  using L = LinkType<Links, Member>;
  using S = typename L::Scalar;
  require_chain(links, member);
  std::vector<LowRankFactors<S>> factors;
  for (const auto& element : links) {
    const L& link = std::invoke(member, element);
    require_ranks(rank, link.in_features(), link.max_rank(), "ResidualLowRank: merge");
    factors.push_back(link.adapter.inner.factors(std::min(rank.active, link.max_rank())));
  }
  std::vector<DenseWeight<S>> merged;
  for (std::size_t n = 0; n < factors.size(); ++n) {
    const L& link = std::invoke(member, links[n]);
    MatrixX<S> W = link.base.dense();
    update(n, static_cast<std::size_t>(link.adapter.within_reach(static_cast<Index>(n))), std::as_const(factors), std::as_const(merged), W);
    merged.emplace_back(std::move(W), link.base.dense_bias());
  }
  return merged;
}

/// W += scale · B · A.
template <class S>
void add_factors(MatrixX<S>& W, const LowRankFactors<S>& factors, double scale) {
  add_product(W, factors.B, factors.A, static_cast<S>(scale));
}

/// W_n + s · (1 + α(n, reached, merged)) · B_n · A_n.
template <class Links, class Member, class Alpha>
auto merge_by_alpha(const Links& links, RankSlice rank, Member member, Alpha&& alpha) {
  return merge_chain(links, rank, member, [&](std::size_t n, std::size_t reached, const auto& factors, const auto& merged, auto& W) {
    add_factors(W, factors[n], factors[n].scale * (1 + alpha(n, reached, merged)));
  });
}

inline void require_norms(const InputNorms& norms, std::size_t links) {
  require_equal(norms.links(), static_cast<Index>(links), "ResidualLowRank: merge: links of the norms");
}

}  // namespace detail

/// W_n + s · Σ_q B_q · A_q of a chain with block shortcuts: exact. `member` as for link_chain; here and below throws std::invalid_argument for
/// the rank, and ShapeError as require_chain or if there are not as many norms as links.
template <class Links, class Member = std::identity>
  requires detail::ChainOf<Links, Member, Shortcut::block>
auto merge_blocks(const Links& links, RankSlice rank, Member member = {}) {
  return detail::merge_chain(links, rank, member, [](std::size_t n, std::size_t reached, const auto& factors, const auto&, auto& W) {
    for (std::size_t k = 0; k <= reached; ++k) detail::add_factors(W, factors[n - k], factors[n].scale);
  });
}

/// W_n + s · (1 + α) · B_n · A_n of a chain with input shortcuts, α = f_{n−1} / f_n with f = ‖x‖, as observed ("based on inputs"). The
/// first link is exact, with α = 1; so is any whose x_{n−1} is α · x_n.
template <class Links, class Member = std::identity>
  requires detail::ChainOf<Links, Member, Shortcut::input>
auto merge_bi(const Links& links, const InputNorms& norms, RankSlice rank, Member member = {}) {
  detail::require_norms(norms, std::size(links));
  return detail::merge_by_alpha(links, rank, member, [&](std::size_t n, std::size_t, const auto&) {
    return n == 0 ? 1 : norms.ratio(static_cast<Index>(n) - 1, static_cast<Index>(n));
  });
}

/// The same with α = ‖W*_{n−2}‖ / ‖W*_{n−1}‖, where W* are the merged weights, which have made x_{n−1} and x_n ("based on weights"); 1 for
/// the first two links, which have no such weights before them. Needs no data.
template <class Links, class Member = std::identity>
  requires detail::ChainOf<Links, Member, Shortcut::input>
auto merge_bw(const Links& links, RankSlice rank, Member member = {}) {
  return detail::merge_by_alpha(links, rank, member, [](std::size_t n, std::size_t, const auto& merged) {
    const auto norm = [&](std::size_t q) { return merged[q].W.template cast<double>().norm(); };
    return n < 2 ? 1 : InputNorms::ratio_of(norm(n - 2), norm(n - 1));
  });
}

/// W_n + s · (1 + α) · B_n · A_n of a chain with middle shortcuts, α = Σ_k f_{n−k} / f_n with f = ‖A_b x‖, as observed at the rank that is
/// merged. The first link is exact, with α = 0: it has no earlier one to add (the released code would take 1 there).
template <class Links, class Member = std::identity>
  requires detail::ChainOf<Links, Member, Shortcut::middle>
auto merge_scalar(const Links& links, const InputNorms& norms, RankSlice rank, Member member = {}) {
  detail::require_norms(norms, std::size(links));
  return detail::merge_by_alpha(links, rank, member, [&](std::size_t n, std::size_t reached, const auto&) {
    double alpha = 0;
    for (std::size_t k = 1; k <= reached; ++k) alpha += norms.ratio(static_cast<Index>(n - k), static_cast<Index>(n));
    return alpha;
  });
}

/// W_n + s · B_n · (A_n + Σ_k α_k · A_{n−k}) of a chain with middle shortcuts, α_k = f_{n−k} / f_n with f = ‖x‖, as observed. The first
/// link is exact; so is any whose x_{n−k} are α_k · x_n.
template <class Links, class Member = std::identity>
  requires detail::ChainOf<Links, Member, Shortcut::middle>
auto merge_folded(const Links& links, const InputNorms& norms, RankSlice rank, Member member = {}) {
  detail::require_norms(norms, std::size(links));
  return detail::merge_chain(links, rank, member, [&](std::size_t n, std::size_t reached, const auto& factors, const auto&, auto& W) {
    auto folded = factors[n];
    using S = typename std::remove_cvref_t<decltype(W)>::Scalar;
    for (std::size_t k = 1; k <= reached; ++k)
      folded.A += static_cast<S>(norms.ratio(static_cast<Index>(n - k), static_cast<Index>(n))) * factors[n - k].A;
    detail::add_factors(W, folded, folded.scale);
  });
}

}  // namespace dylora

#endif
