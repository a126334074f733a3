#ifndef DYLORA_METHODS_DORA_MAGNITUDE_HPP
#define DYLORA_METHODS_DORA_MAGNITUDE_HPP

#include <concepts>
#include <string>
#include <string_view>
#include <type_traits>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"

namespace dylora {

/// How the trained lengths of a weight's rows depend on the rank.
///
/// shared: they do not. One number for each row, a compromise between the ranks; PEFT's lora_magnitude_vector.
/// nested: m_b = Σ_{k<b} of the columns of an out × components matrix. Column k is what rank k + 1 adds to the length at the rank below,
/// and so part of component k, as row k of A is: it takes part at the ranks above k, learns in the slices that train k, and is cut with it.
enum class Magnitude { shared, nested };

/// The magnitude of each row as a parameter: what it starts from, what it is at each rank, and how it learns.
template <std::floating_point S, Magnitude kind>
struct RowMagnitude {
  static constexpr bool nested = kind == Magnitude::nested;
  static constexpr RankAxis axis = nested ? RankAxis::cols : RankAxis::none;
  using Values = std::conditional_t<nested, MatrixX<S>, VectorX<S>>;

  /// These lengths at every rank.
  static Values make(const VectorX<S>& lengths, Index components) {
    Values values = Values::Zero(lengths.size(), nested ? components : 1);
    if (values.cols() > 0) values.col(0) = lengths;
    return values;
  }

  /// Throws ShapeError unless `values` is what make gives.
  static void require(const Values& values, Index rows, Index components, std::string_view what) {
    require_equal(values.rows(), rows, std::string(what) + ": rows of magnitude");
    if constexpr (nested) require_equal(values.cols(), components, std::string(what) + ": columns of magnitude, against the components");
  }

  /// m_b in column b − 1, for as many ranks as `lengths` has columns; overwritten.
  static void set_lengths(const Values& values, MatrixRef<S> lengths) {
    for (Index k = 0; k < lengths.cols(); ++k) {
      lengths.col(k) = values.col(nested ? k : 0);
      if (nested && k > 0) lengths.col(k) += lengths.col(k - 1);
    }
  }

  /// Adds the gradient dm of the lengths at a rank. Shared ones learn at every rank, also where the slice trains no component.
  static void add_gradient(RankSlice rank, const Eigen::Ref<const VectorX<S>>& dm, Gradient<Values>& gradient) {
    if constexpr (nested) {
      gradient.middleCols(rank.trainable_from, rank.trainable()).colwise() += dm;
      gradient.components.insert(rank);
    } else {
      gradient += dm;
    }
  }
};

}  // namespace dylora

#endif
