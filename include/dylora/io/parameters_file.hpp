#ifndef DYLORA_IO_PARAMETERS_FILE_HPP
#define DYLORA_IO_PARAMETERS_FILE_HPP

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <limits>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/members.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/adapter_file.hpp"
#include "dylora/io/bytes/mapped_file.hpp"
#include "dylora/io/bytes/tensor.hpp"
#include "dylora/io/checkpoint/values.hpp"
#include "dylora/io/safetensors/safetensors.hpp"
#include "dylora/ranks/truncate.hpp"

/// Whatever is trained, of methods that other programs have no files for too, in one safetensors file. Save then load is the identity, bit
/// for bit, at every rank.
///
///     save_parameters("model.safetensors", model);       // all of it
///     save_parameters("rank_4.safetensors", model, 4);   // the first 4 components of each adapter, or all it has
///     load_parameters("model.safetensors", model);       // into a model that was made with the same options
///
/// A tensor for each parameter under its name in the traversal, "h.0.attn.q_proj.lora_A", in the model's type of numbers; and one for each
/// constant (core/members.hpp) under its name, "h.0.attn.q_proj.initial_A". A matrix is rows × columns, row by row; a vector has one
/// dimension. The metadata:
///
///     dylora                                 "parameters 1", the format and its version
///     setting.h.0.attn.q_proj.max_rank       each setting (core/members.hpp), as JSON
///
/// Frozen weights are in neither: the model brings its own.
namespace dylora {

namespace detail {

inline constexpr std::string_view parameters_format = "parameters 1", setting_prefix = "setting.";

/// The settings of all parts of the model, as a file's metadata has them.
template <class T>
std::map<std::string, std::string> settings_of(const T& model) {
  std::map<std::string, std::string> settings;
  for_each_setting(
      [&](Setting setting, const auto& value) {
        if (setting.only_in_training) return;
        const std::string name(setting.name);
        const bool added = settings.emplace(std::string(setting_prefix) + name, archived_text(name, value)).second;
        if (!added) throw std::invalid_argument("parameters: expected settings whose names differ, got two of " + in_quotes(name));
      },
      model);
  return settings;
}

template <class M>
std::vector<Index> parameter_shape(Index rows, Index cols) {
  if constexpr (M::IsVectorAtCompileTime) return {rows * cols};
  return {rows, cols};
}

/// A file's tensors, which are taken by name, each once.
class ParametersFile {
 public:
  ParametersFile(const SafetensorsContents& contents, const std::string& name) : contents_(contents), name_(name) {}

  /// Throws FormatError for another format, and unless the settings are these.
  void require_settings(const std::map<std::string, std::string>& settings) const {
    const auto format = contents_.metadata.find("dylora");
    if (format == contents_.metadata.end() || format->second != parameters_format)
      fail("__metadata__: dylora: expected " + in_quotes(parameters_format) + ", as save_parameters writes it, got " +
           (format == contents_.metadata.end() ? "none" : in_quotes(format->second)));
    const auto require = [&](const std::string& key, const std::string* expected, const std::string* got) {
      if (expected != nullptr && got != nullptr && *expected == *got) return;
      const auto shown = [](const std::string* value) { return value == nullptr ? "none" : printable(*value); };
      fail("setting " + in_quotes(std::string_view(key).substr(setting_prefix.size())) + ": expected " + shown(expected) +
           ", as the model has it, got " + shown(got));
    };
    for (const auto& [key, value] : settings) {
      const auto found = contents_.metadata.find(key);
      require(key, &value, found == contents_.metadata.end() ? nullptr : &found->second);
    }
    for (const auto& [key, value] : contents_.metadata)
      if (key.starts_with(setting_prefix) && !settings.contains(key)) require(key, nullptr, &value);
  }

  /// The values for `matrix`, which may have fewer components along the axis. Throws FormatError if they do not fit.
  template <class M>
  M take(const std::string& name, const M& matrix, RankAxis axis) {
    using S = typename M::Scalar;
    const TensorView* tensor = contents_.find(name);
    const TensorView own{name, dtype_v<S>, parameter_shape<M>(matrix.rows(), matrix.cols()), {}};
    const auto wrong = [&](const std::string& expected, const std::string& got) {
      fail("tensor " + in_quotes(name) + ": expected " + expected + ", got " + got);
    };
    if (tensor == nullptr || tensor->dtype != own.dtype || tensor->shape.size() != own.shape.size())
      wrong(describe_tensor(&own), describe_tensor(tensor));
    taken_.insert(name);
    for (std::size_t i = 0; i < own.shape.size(); ++i) {
      const bool components = axis != RankAxis::none && i == (axis == RankAxis::cols && !M::IsVectorAtCompileTime ? 1 : 0);
      if (tensor->shape[i] == own.shape[i] || (components && tensor->shape[i] < own.shape[i])) continue;
      wrong(describe_tensor(&own) + (axis == RankAxis::none ? "" : " or fewer components"), describe_tensor(tensor));
    }
    return M(finite_matrix_of<S>(*tensor, name_));
  }

  /// Throws FormatError if there is a tensor that nobody has taken.
  void require_all_taken() const {
    for (const TensorView& tensor : contents_.tensors)
      if (!taken_.contains(tensor.name))
        fail("tensor " + in_quotes(tensor.name) + ": expected the parameters and constants of the model alone, got " +
             describe_tensor(&tensor));
  }

  [[noreturn]] void fail(const std::string& what) const { throw FormatError(name_ + ": " + what); }

 private:
  const SafetensorsContents& contents_;
  const std::string& name_;
  std::set<std::string> taken_;
};

}  // namespace detail

/// Writes the parameters, cut to the first `rank` components of each adapter that has more, as ranks/truncate.hpp cuts them; constants
/// are written whole. The file appears whole or not at all. Throws std::invalid_argument if rank < 0 or nothing is left to write,
/// NonFiniteError, naming the tensor, for a NaN or an infinity, and FileError.
template <Trainable T>
void save_parameters(const std::filesystem::path& path, const T& model, Index rank = std::numeric_limits<Index>::max()) {
  require_in_range(rank, 0, std::numeric_limits<Index>::max(), "save_parameters: rank");
  std::map<std::string, std::string> metadata = detail::settings_of(model);
  metadata["dylora"] = detail::parameters_format;
  std::vector<OwnedTensor> owned;
  const auto add = [&]<class M>(const std::string& name, const M& matrix, Index rows, Index cols) {
    owned.push_back({name, detail::parameter_shape<M>(rows, cols), RowMatrix<typename M::Scalar>(matrix.topLeftCorner(rows, cols))});
  };
  for_each_parameter(
      [&]<class M>(Parameter parameter, const M& matrix) {
        add(std::string(parameter.name), matrix, parameter.rank_axis == RankAxis::rows ? std::min(rank, matrix.rows()) : matrix.rows(),
            parameter.rank_axis == RankAxis::cols ? std::min(rank, matrix.cols()) : matrix.cols());
      },
      model);
  for_each_constant([&](Constant constant, const auto& matrix) { add(std::string(constant.name), matrix, matrix.rows(), matrix.cols()); },
                    model);
  std::vector<TensorView> tensors;
  for (const OwnedTensor& tensor : owned) tensors.push_back(tensor.view());
  save_safetensors(path, std::move(tensors), std::move(metadata));
}

/// The parameters and constants of the model become those of a file that save_parameters has written, or of its bytes, which `name` says
/// where they are from. An adapter of which the file has fewer components is cut to these, and still takes the ranks that it took before.
/// Gradients and optimisers made before then no longer fit.
///
/// Throws, with nothing changed, FileError for what cannot be read, and FormatError, naming the tensor or the setting, what was expected
/// and what the file has: for one of another model, type of numbers or setting, for values that are not finite, and for what is no such
/// file.
template <Trainable T>
void load_parameters(const SafetensorsContents& contents, const std::string& name, T& model) {
  detail::ParametersFile file(contents, name);
  file.require_settings(detail::settings_of(std::as_const(model)));
  detail::Assignments assignments;
  std::map<std::string, Index> components;  // of the adapters, by name
  const auto take = [&]<class M>(const std::string& of, M& matrix, RankAxis axis) {
    M values = file.take(of, std::as_const(matrix), axis);
    if (axis != RankAxis::none) {
      const Index got = detail::component_count(axis, values);
      const std::size_t dot = of.rfind('.');
      const Index expected = components.try_emplace(of.substr(0, dot == of.npos ? 0 : dot), got).first->second;
      if (got != expected)
        file.fail("tensor " + in_quotes(of) + ": expected " + std::to_string(expected) + " components, as the rest of its adapter, got " +
                  std::to_string(got));
    }
    assignments.add(matrix, std::move(values));
  };
  for_each_parameter([&](Parameter parameter, auto& matrix) { take(std::string(parameter.name), matrix, parameter.rank_axis); }, model);
  for_each_constant([&](Constant constant, auto& matrix) { take(std::string(constant.name), matrix, RankAxis::none); }, model);
  file.require_all_taken();
  assignments.assign();
}

template <Trainable T>
void load_parameters(const std::filesystem::path& path, T& model) {
  const MappedFile file(path);
  load_parameters(parse_safetensors(file.bytes(), file.name()), file.name(), model);
}

}  // namespace dylora

#endif
