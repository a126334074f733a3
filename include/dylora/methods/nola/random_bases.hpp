#ifndef DYLORA_METHODS_NOLA_RANDOM_BASES_HPP
#define DYLORA_METHODS_NOLA_RANDOM_BASES_HPP

#include <algorithm>
#include <concepts>

#include "dylora/core/types.hpp"
#include "dylora/linalg/parallel.hpp"
#include "dylora/methods/nola/counter_noise.hpp"

namespace dylora {

/// Random matrices ℬ_0, ℬ_1, … with entries uniform in (−1, 1), which are never kept: wherever one is needed, a tile of it is generated,
/// used and forgotten. An entry is a function of the noise, the basis, its row and its column, so that the first columns of a basis are
/// what they are however many there are.
template <std::floating_point S>
class RandomBases {
 public:
  explicit RandomBases(CounterNoise noise) : noise_(noise) {}

  /// Entry (row, column) of ℬ_basis.
  S entry(Index basis, Index row, Index column) const { return noise_.stream(basis).stream(column).at<S>(row); }

  /// sum += Σ_i factor · coefficients[i] · ℬ_i over all coefficients, each of the shape of `sum`. Every element is summed in the order of
  /// the bases, on any number of threads. Costs a generated number and 2 flops for each element of each basis.
  void add_combination(MatrixRef<S> sum, const Eigen::Ref<const VectorX<S>>& coefficients, S factor) const {
    const Index tiles = tile_count(sum.rows());
    for_each_task(sum.cols() * tiles, work(sum, coefficients.size()), [&](Index task) {
      const Index column = task / tiles, begin = task % tiles * tile, size = std::min(tile, sum.rows() - begin);
      auto target = sum.col(column).segment(begin, size).array();
      Tile total, numbers;
      total.setZero();
      total.head(size) = target;
      for (Index i = 0; i < coefficients.size(); ++i) {
        noise_.stream(i).stream(column).read(begin, numbers);
        total += factor * coefficients[i] * numbers;
      }
      target = total.head(size);
    });
  }

  /// sums[i] += factor · ⟨ℬ_{first + i}, matrix⟩ for each of `sums`: the derivative of add_combination with respect to its coefficients. A
  /// sum is that of each tile position in the order of the tiles, then of the positions, on any number of threads. Costs as
  /// add_combination.
  void add_contractions(Eigen::Ref<VectorX<S>> sums, Index first, ConstMatrixRef<S> matrix, S factor) const {
    const Index tiles = tile_count(matrix.rows());
    for_each_range(sums.size(), 1, work(matrix, sums.size()), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        Tile total, numbers, values;
        total.setZero();
        for (Index column = 0; column < matrix.cols(); ++column) {
          const CounterNoise noise = noise_.stream(first + i).stream(column);
          for (Index t = 0; t < tiles; ++t) {
            const Index size = std::min(tile, matrix.rows() - t * tile);
            if (size < tile) values.setZero();
            values.head(size) = matrix.col(column).segment(t * tile, size).array();
            noise.read(t * tile, numbers);
            total += numbers * values;
          }
        }
        sums[i] += factor * total.sum();
      }
    });
  }

 private:
  using Tile = CounterNoise::Tile<S>;
  static constexpr Index tile = CounterNoise::tile_size;

  static Index tile_count(Index rows) { return (rows + tile - 1) / tile; }

  template <class M>
  static double work(const M& matrix, Index bases) {
    return static_cast<double>(matrix.size()) * static_cast<double>(bases);
  }

  CounterNoise noise_;
};

}  // namespace dylora

#endif
