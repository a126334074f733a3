#ifndef DYLORA_METHODS_NOLA_FACTORS_HPP
#define DYLORA_METHODS_NOLA_FACTORS_HPP

#include <cmath>
#include <concepts>
#include <cstdint>

#include "dylora/core/types.hpp"
#include "dylora/methods/nola/counter_noise.hpp"
#include "dylora/methods/nola/random_bases.hpp"

namespace dylora {

/// Where NOLA starts, and what it adds its bases to.
enum class NolaVariant {
  language,  ///< as its GPT-2 and LLaMA code: A_0 at random, α = β = 0, so Δ = 0; entries of both bases U(−1, 1) / √k
  vision  ///< as its ViT code: A_0 = 0, α = β = 1 / k, so Δ ≠ 0 at once; entries U(−1, 1) / √in of 𝒜 and U(−1, 1) / √r of ℬ
};

/// A = A_0 + Σ_i α_i 𝒜_i  and  B = Σ_i β_i ℬ_i  over k bases that a seed makes again wherever they are needed.
///
/// A is in × rank, transposed, so that component r of each factor is a column. It is what it is however many components there are.
template <std::floating_point S>
struct NolaFactors {
  using Coefficients = Eigen::Ref<const VectorX<S>>;

  std::uint64_t seed;
  Index in_features, out_features;
  Index max_rank;  // r: the entries of ℬ depend on it in the vision variant
  NolaVariant variant;

  /// A and B from k coefficients each; overwritten. Costs k random numbers and multiply-adds for each element.
  void make(const Coefficients& alpha, const Coefficients& beta, MatrixRef<S> A, MatrixRef<S> B) const {
    A.setZero();
    B.setZero();
    if (variant == NolaVariant::language) bases_of(fixed_A).add_combination(A, VectorX<S>::Ones(1), one_over_root(in_features));
    bases_of(of_A).add_combination(A, alpha, bound_of_A(alpha.size()));
    bases_of(of_B).add_combination(B, beta, bound_of_B(beta.size()));
  }

  /// dα_i += ⟨dA, 𝒜_i⟩ and dβ_i += ⟨dB, ℬ_i⟩ for the coefficients from `first` on, where the factors were made of k bases. Costs as `make`.
  void add_gradients(ConstMatrixRef<S> dA, ConstMatrixRef<S> dB, Index k, Index first, Eigen::Ref<VectorX<S>> dalpha,
                     Eigen::Ref<VectorX<S>> dbeta) const {
    bases_of(of_A).add_contractions(dalpha, first, dA, bound_of_A(k));
    bases_of(of_B).add_contractions(dbeta, first, dB, bound_of_B(k));
  }

 private:
  enum Which { fixed_A, of_A, of_B };
  RandomBases<S> bases_of(Which which) const { return RandomBases<S>(CounterNoise(seed).stream(which)); }

  /// The entries of a basis are uniform in ± these.
  S bound_of_A(Index k) const { return one_over_root(variant == NolaVariant::language ? k : in_features); }
  S bound_of_B(Index k) const { return one_over_root(variant == NolaVariant::language ? k : max_rank); }
  static S one_over_root(Index count) { return static_cast<S>(1 / std::sqrt(static_cast<double>(count))); }
};

}  // namespace dylora

#endif
