#ifndef DYLORA_WEIGHTS_VIEW_HPP
#define DYLORA_WEIGHTS_VIEW_HPP

#include <concepts>
#include <limits>
#include <new>
#include <string>
#include <string_view>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/weights/matrix_weight.hpp"

namespace dylora {

/// A frozen weight over memory that somebody else owns: a base shared by many layers, or a mapped file. Nothing is copied.
///
///     WeightView<float, RowMatrix<float>> view(tensor.data(), out, in, bias.data());   // PyTorch's layout
///     Linear<float, LowRank<float>, WeightView<float, RowMatrix<float>>> layer(view, {.max_rank = 8}, rng);
///
/// `Storage` is the order in which the memory holds the out × in matrix: MatrixX<S> (column by column; also a row-major in × out, as
/// GPT-2's Conv1D keeps it) or RowMatrix<S>. The memory must outlive every copy of the view and must not change under it.
template <std::floating_point S, class Storage = MatrixX<S>>
class WeightView : public MatrixWeight<WeightView<S, Storage>, S> {
 public:
  using Scalar = S;
  static constexpr std::string_view name = "WeightView";
  using Values = Eigen::Map<const Storage, Eigen::Unaligned, Eigen::OuterStride<>>;
  using Bias = Eigen::Map<const VectorX<S>>;

  /// `values` holds out × in elements; `stride` is the distance between its columns (rows, if row-major), 0 for the tightest.
  /// `bias` holds out elements, or is null for none. Throws ShapeError if the matrix is empty or null, std::invalid_argument if the
  /// stride is less than a column.
  WeightView(const S* values, Index out, Index in, const S* bias = nullptr, Index stride = 0)
      : WeightView(mapped(values, out, in, stride), bias) {}

  /// Of a matrix, or of a block of one, that lives elsewhere: WeightView<float>(qkv.middleCols(64, 64)).
  template <class Derived>
    requires std::same_as<typename Derived::Scalar, S> && (bool(Derived::IsRowMajor) == bool(Storage::IsRowMajor))
  explicit WeightView(const Eigen::MatrixBase<Derived>& values)
      : WeightView(mapped(values.derived().data(), values.rows(), values.cols(), values.derived().outerStride()), nullptr) {
    require_equal(values.derived().innerStride(), 1, "WeightView: inner stride of the block");
  }

  /// The same with a bias of out elements, or of none.
  template <class Derived>
  WeightView(const Eigen::MatrixBase<Derived>& values, const VectorX<S>& bias) : WeightView(values) {
    if (bias.size() == 0) return;
    require_equal(bias.size(), rows(), "WeightView: size of bias");
    new (&bias_) Bias(bias.data(), bias.size());  // how Eigen points a map elsewhere
  }

  // What would be gone when the view is used.
  explicit WeightView(Storage&&) = delete;
  WeightView(Storage&&, const VectorX<S>&) = delete;
  template <class Derived>
  WeightView(const Eigen::MatrixBase<Derived>&, VectorX<S>&&) = delete;

  Index rows() const { return values_.rows(); }
  Index cols() const { return values_.cols(); }
  const Values& values() const { return values_; }
  const Bias& bias() const { return bias_; }
  const Bias& offsets() const { return bias_; }

 private:
  WeightView(Values values, const S* bias) : values_(values), bias_(bias, bias != nullptr ? values.rows() : 0) {
    require_size(rows(), cols());
  }

  static Values mapped(const S* values, Index out, Index in, Index stride) {
    require_size(out, in);  // before Eigen sees it
    const Index tightest = inner_size(out, in);
    if (stride != 0) require_in_range(stride, tightest, std::numeric_limits<Index>::max(), "WeightView: stride");
    if (values == nullptr)
      throw ShapeError("WeightView: values: expected a pointer to " + std::to_string(out * in) + " elements, got null");
    return Values(values, out, in, Eigen::OuterStride<>(stride != 0 ? stride : tightest));
  }

  static void require_size(Index out, Index in) {
    if (out < 1 || in < 1) {
      throw ShapeError("weight: expected at least 1 × 1, got " + std::to_string(out) + " × " + std::to_string(in));
    }
  }

  static Index inner_size(Index out, Index in) { return Storage::IsRowMajor ? in : out; }

  Values values_;
  Bias bias_;
};

}  // namespace dylora

#endif
