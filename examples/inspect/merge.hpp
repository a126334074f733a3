#ifndef DYLORA_EXAMPLES_INSPECT_MERGE_HPP
#define DYLORA_EXAMPLES_INSPECT_MERGE_HPP

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/bytes/atomic_file.hpp"
#include "dylora/io/bytes/tensor.hpp"
#include "dylora/io/safetensors/folder.hpp"
#include "dylora/io/safetensors/safetensors.hpp"
#include "dylora/ranks/scale.hpp"
#include "inspect/peft_adapter.hpp"
#include "inspect/spectrum.hpp"

/// An adapter added to the weights of its base model, tensor by tensor.
namespace inspect {

struct MergeOptions {
  std::filesystem::path base, out;
  Index rank = 0;  ///< 0 for all components
  dylora::ScaleRule rule = dylora::alpha_over_max_rank;
  bool fan_in_fan_out = false;  ///< the base has its weights as in × out, even if the config does not say so
};

/// What became of one tensor: W + s · B_b · A_b, rounded once.
struct MergedTensor {
  std::string module, file, name;
  std::string_view type;
  bool transposed;
  Index rank, of;
  double scale;
  double largest_change = 0, largest_rounding = 0;
};

/// A model's weights: one safetensors file, or a folder with one or several.
class BaseModel {
 public:
  explicit BaseModel(const std::filesystem::path& path) : source_(open(path)), name_(path.string()) {}

  const std::string& name() const { return name_; }

  std::span<const dylora::SafetensorsFile> files() const {
    const auto* file = std::get_if<dylora::SafetensorsFile>(&source_);
    return file != nullptr ? std::span(file, 1) : std::span(std::get<dylora::SafetensorsFolder>(source_).files());
  }

  const dylora::TensorView* find(std::string_view tensor) const {
    for (const dylora::SafetensorsFile& file : files()) {
      if (const dylora::TensorView* found = file.find(tensor)) return found;
    }
    return nullptr;
  }

 private:
  using Source = std::variant<dylora::SafetensorsFile, dylora::SafetensorsFolder>;
  static Source open(const std::filesystem::path& path) {
    if (std::filesystem::is_directory(path)) return dylora::SafetensorsFolder(path);
    return dylora::SafetensorsFile(path);
  }

  Source source_;
  std::string name_;
};

/// The weight that the module of a PEFT adapter belongs to: by its path, or by that without the name of the model's own part, which some
/// files leave out. Throws FormatError, naming it, if there is none, or more than one, or if it does not fit.
inline const dylora::TensorView& weight_of(const BaseModel& base, const std::string& module, const PeftAdapter::Shape& shape,
                                           bool transposed) {
  using namespace dylora;
  const auto fail = [&](const std::string& what) { throw FormatError(base.name() + ": module " + in_quotes(module) + ": " + what); };
  const std::string whole = module + ".weight";
  const TensorView* found = base.find(whole);
  for (const std::string_view part : {"transformer.", "model."}) {
    if (!whole.starts_with(part)) continue;
    const TensorView* inner = base.find(std::string_view(whole).substr(part.size()));
    if (inner != nullptr && found != nullptr) fail("expected one weight, got both " + in_quotes(whole) + " and " + in_quotes(inner->name));
    if (inner != nullptr) found = inner;
  }
  if (found == nullptr) fail("expected its weight, " + in_quotes(whole) + ", got none of that name");
  const std::vector<Index> plain{shape.out_features, shape.in_features}, turned{shape.in_features, shape.out_features};
  const std::string tensor = "tensor " + in_quotes(found->name) + ": expected ";
  if (!found->is_floating_point()) fail(tensor + "F16, BF16, F32 or F64, got " + std::string(info(found->dtype).name));
  if (found->shape != (transposed ? turned : plain)) {
    fail(tensor + describe_shape(transposed ? turned : plain) + (transposed ? " (in × out)" : " (out × in)") + ", got " +
         describe_shape(found->shape) + (!transposed && found->shape == turned ? ": is --fan-in-fan-out missing, as for GPT-2?" : ""));
  }
  return *found;
}

/// To float so that a second rounding, to a type of at least two digits less, gives what one from `value` does: where it is not exact, the
/// neighbour with an odd last digit (round to odd; Boldo and Melquiond, 2008).
inline float rounded_to_odd(double value) {
  const auto nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value) return nearest;
  const float shorter = std::abs(static_cast<double>(nearest)) > std::abs(value) ? std::nextafter(nearest, 0.0F) : nearest;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(shorter) | 1);
}

/// The nearest T, of two that are equally near the even one.
template <class T>
T rounded(double value) {
  if constexpr (sizeof(T) == 2) {
    return static_cast<T>(rounded_to_odd(value));
  } else {
    return static_cast<T>(value);
  }
}

/// Writes base + left · right in the type T of the base, some rows at a time, and completes the report.
template <class T>
void write_sum(const dylora::TensorView& base, const dylora::MatrixX<double>& left, const dylora::RowMatrix<double>& right,
               dylora::AtomicFile& out, MergedTensor& report) {
  using namespace dylora;
  constexpr Index most_elements = Index{1} << 20;
  const Index rows = left.rows(), cols = right.cols(), step = std::max<Index>(1, most_elements / std::max<Index>(cols, 1));
  RowMatrix<double> W, change;
  std::vector<T> sum;
  for (Index begin = 0; begin < rows; begin += step) {
    const Index n = std::min(step, rows - begin);
    const auto row_bytes = static_cast<std::size_t>(cols) * sizeof(T);
    const auto bytes = base.bytes.subspan(static_cast<std::size_t>(begin) * row_bytes, static_cast<std::size_t>(n) * row_bytes);
    W.resize(n, cols);
    copy_elements(TensorView{base.name, base.dtype, {n, cols}, bytes}, W.data(), report.file);
    change.noalias() = left.middleRows(begin, n) * right;
    sum.resize(static_cast<std::size_t>(W.size()));
    for (Index i = 0; i < W.size(); ++i) {
      const double exact = W.data()[i] + change.data()[i];
      const T value = sum[static_cast<std::size_t>(i)] = rounded<T>(exact);
      const double rounding = std::abs(static_cast<double>(value) - exact);
      if (!std::isfinite(rounding)) {
        throw NonFiniteError(report.file + ": tensor " + in_quotes(base.name) + ": expected a sum that is finite as " +
                             std::string(report.type) + ", got another");
      }
      report.largest_change = std::max(report.largest_change, std::abs(change.data()[i]));
      report.largest_rounding = std::max(report.largest_rounding, rounding);
    }
    out.write(std::as_bytes(std::span(sum)));
  }
}

inline void write_merged(const dylora::TensorView& base, PeftAdapter& adapter, dylora::AtomicFile& out, MergedTensor& report) {
  using namespace dylora;
  const LowRankFactors<double> factors = adapter.take(report.module).factors;
  const MatrixX<double> B = report.scale * factors.B.leftCols(report.rank);
  const RowMatrix<double> A = factors.A.topRows(report.rank);
  const MatrixX<double> left = report.transposed ? MatrixX<double>(A.transpose()) : B;
  const RowMatrix<double> right = report.transposed ? RowMatrix<double>(B.transpose()) : A;
  switch (base.dtype) {
    case DType::F16: return write_sum<Eigen::half>(base, left, right, out, report);
    case DType::BF16: return write_sum<Eigen::bfloat16>(base, left, right, out, report);
    case DType::F32: return write_sum<float>(base, left, right, out, report);
    default: return write_sum<double>(base, left, right, out, report);
  }
}

/// Writes the whole model, each weight that has a module as W + s(b) · B_b · A_b in the type that it has, all others as they are. One
/// module's factors and some rows of its weight are in memory at a time. Throws with no file changed.
inline std::vector<MergedTensor> merge(PeftAdapter& adapter, const MergeOptions& options) {
  using namespace dylora;
  const BaseModel base(options.base);
  const bool transposed = options.fan_in_fan_out || adapter.config().fan_in_fan_out;
  Index largest = 1;
  for (const auto& [name, shape] : adapter.modules()) largest = std::max(largest, shape.rank);
  if (options.rank != 0) require_in_range(options.rank, 1, largest, "--rank");

  std::map<std::string, MergedTensor> merged;  // by tensor
  for (const auto& [module, shape] : adapter.modules()) {
    const double scale = adapter.take(module).factors.scale;
    const TensorView& weight = weight_of(base, module, shape, transposed);
    const Index rank = options.rank == 0 ? shape.rank : std::min(options.rank, shape.rank);
    const auto [place, added] =
        merged.try_emplace(weight.name, MergedTensor{module, base.name(), weight.name, info(weight.dtype).name, transposed, rank,
                                                     shape.rank, scale_at(options.rule, scale, rank, shape.rank)});
    if (!added) {
      throw FormatError(base.name() + ": tensor " + in_quotes(weight.name) + ": expected one module for it, got " +
                        in_quotes(place->second.module) + " and " + in_quotes(module));
    }
  }
  if (merged.empty()) throw FormatError(adapter.weights().name() + ": expected factors to merge, got none");

  std::vector<TensorView> tensors;
  std::map<std::string, std::string> metadata;
  for (const SafetensorsFile& file : base.files()) {
    tensors.insert(tensors.end(), file.tensors().begin(), file.tensors().end());
    metadata.insert(file.metadata().begin(), file.metadata().end());
  }
  std::sort(tensors.begin(), tensors.end(),
            [](const TensorView& a, const TensorView& b) { return std::tie(b.dtype, a.name) < std::tie(a.dtype, b.name); });
  metadata.insert({"format", "pt"});

  AtomicFile out(options.out);
  out.write(safetensors_beginning(tensors, metadata));
  for (const TensorView& tensor : tensors) {
    const auto found = merged.find(tensor.name);
    if (found == merged.end()) {
      out.write(tensor.bytes);
    } else {
      write_merged(tensor, adapter, out, found->second);
    }
  }
  out.commit();
  std::vector<MergedTensor> report;
  for (auto& [name, tensor] : merged) report.push_back(std::move(tensor));
  return report;
}

}  // namespace inspect

#endif
