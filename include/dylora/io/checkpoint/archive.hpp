#ifndef DYLORA_IO_CHECKPOINT_ARCHIVE_HPP
#define DYLORA_IO_CHECKPOINT_ARCHIVE_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/members.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/bytes/tensor.hpp"
#include "dylora/io/checkpoint/values.hpp"
#include "dylora/io/safetensors/safetensors.hpp"

namespace dylora {

/// What a state is described to: by the same calls it is written, compared with what was written, and read.
///
///     const auto state = [&](auto& archive) {
///       archive.parameters("model", model);     // of something Trainable; the scales of its adapters must be the same
///       archive("optimizer", optimizer);        // has a member `template <class Archive> void state(Archive& archive)`
///       archive("data_rng", data_rng);
///       archive("best_loss", best_loss);
///       archive.same("batch", options.batch);   // no part of the state: must be what it was
///     };
///
/// A description names the same things, in the order that it likes, each time it is called, and does nothing else. Inside of something that
/// describes itself, names are its own: "optimizer.m.lora_A". What has been named must stay where it is until save or load returns.
class CheckpointArchive {
 public:
  /// One that takes down what is described to it: values(), and tensors() that are views of it.
  CheckpointArchive() = default;
  const std::map<std::string, std::string>& values() const { return values_; }
  const std::vector<TensorView>& tensors() const { return tensors_; }

  /// Gives what `state` describes the values that a file has. Throws FormatError, beginning with the file's `name` and with nothing
  /// changed, that says what differs: what one of them lacks, of another type or shape, refused, or not the same. The first ten
  /// are named, and of the rest how many there are.
  template <class State>
  static void read(const SafetensorsContents& file, const std::string& name, State& state) {
    CheckpointArchive archive(file);
    for (const Pass pass : {Pass::compare, Pass::assign}) {
      archive.pass_ = pass;
      archive.used_.clear();
      state(archive);
      archive.find_unnamed();
      if (archive.differences_ == 0) continue;
      if (archive.differences_ > most_named) archive.named_ += "\n  and " + std::to_string(archive.differences_ - most_named) + " more";
      throw FormatError(name + ": expected a checkpoint of this run, got one that differs:" + archive.named_);
    }
  }

  /// A part of the state: bool, an integer, double, std::string of less than 1 MiB, Rng, a std::vector of float, double or 64-bit integers,
  /// or what has a member state(archive). `check` sees the value that is about to be taken, and throws std::invalid_argument if it cannot
  /// be.
  template <class T, class Check = detail::AnyValue>
  void operator()(std::string_view name, T& value, const Check& check = {}) {
    if constexpr (requires { value.state(*this); }) {
      inside(name, [&] { value.state(*this); });
    } else if constexpr (std::same_as<T, Rng>) {
      std::uint64_t word = value.state();
      (*this)(name, word);
      value = Rng(word);
    } else if constexpr (detail::ArchivedVector<T>) {
      elements(use(name), value, check);
    } else {
      static_assert(detail::ArchivedScalar<T>, "a checkpoint cannot keep this type");
      scalar(use(name), value, check);
    }
  }

  /// Something that the run depends on and that is not part of its state: a difference is refused. Whatever nlohmann::json can hold;
  /// enumerators by name, if a message is to be understood.
  template <class T>
  void same(std::string_view name, const T& value) {
    const std::string path = use(name), key = "same." + path, own = detail::archived_text(path, value);
    if (pass_ == Pass::write) {
      values_[key] = own;
    } else if (const std::string* found = find_value(key); found == nullptr || *found != own) {
      differs(path, detail::printable(own));
    }
  }

  /// The parameters and constants of `model` (core/members.hpp), which must have the same names, shapes and types. The settings must be the
  /// same: max_rank, scale, dropout and others.
  template <Trainable T>
  void parameters(std::string_view name, T& model) {
    inside(name, [&] {
      for_each_parameter([&](Parameter parameter, auto& p) { matrix(use(parameter.name), p); }, model);
      for_each_constant([&](Constant constant, auto& c) { matrix(use(constant.name), c); }, model);
      for_each_setting([&](Setting setting, const auto& value) { same(setting.name, value); }, model);
    });
  }

  /// The values of what has the shape of T's parameters: archive.template parameters<T>("m", m). Which components were trained is not kept;
  /// a checkpoint is made between steps.
  template <Trainable T>
  void parameters(std::string_view name, typename T::Gradients& snapshot) {
    inside(name, [&] { for_each_parameter<T>([&](Parameter parameter, auto& p) { matrix(use(parameter.name), p); }, snapshot); });
  }

 private:
  enum class Pass { write, compare, assign };
  static constexpr std::size_t most_named = 10;

  explicit CheckpointArchive(const SafetensorsContents& file) : pass_(Pass::compare), file_(&file) {}

  template <class F>
  void inside(std::string_view name, F&& f) {
    const std::size_t outside = prefix_.size();
    prefix_ += std::string(name) + '.';
    f();
    prefix_.resize(outside);
  }

  /// The name as the file has it. Throws std::invalid_argument for one that was used before.
  std::string use(std::string_view name) {
    const auto [used, added] = used_.insert(prefix_ + std::string(name));
    if (!added) throw std::invalid_argument("checkpoint: expected names that differ, got two of " + in_quotes(*used));
    return *used;
  }

  const std::string* find_value(const std::string& key) const {
    const auto found = file_->metadata.find(key);
    return found == file_->metadata.end() ? nullptr : &found->second;
  }

  void differs(const std::string& path, const std::string& ours) {
    if (++differences_ > most_named) return;
    const std::string* text = find_value("state." + path);
    if (text == nullptr) text = find_value("same." + path);
    const std::string theirs = text != nullptr ? detail::printable(*text) : describe_tensor(file_->find(path));
    named_ += "\n  " + detail::printable(path) + ": the checkpoint has " + theirs + ", this run " + ours;
  }

  /// Calls assign() where values are assigned, if `check` has nothing against this one.
  template <class T, class Check, class Assign>
  void accept(const std::string& path, const T& read, const Check& check, Assign&& assign) {
    if (pass_ == Pass::assign) return assign();
    try {
      check(read);
    } catch (const std::invalid_argument& refusal) {
      differs(path, std::string("refuses it: ") + refusal.what());
    }
  }

  template <class T, class Check>
  void scalar(const std::string& path, T& value, const Check& check) {
    const std::string key = "state." + path;
    if (pass_ == Pass::write) {
      detail::require_finite(path, value);
      values_[key] = detail::archived_text(path, value);
      return detail::require_readable(path, values_[key]);
    }
    const std::string* found = find_value(key);
    std::optional<T> read = found == nullptr ? std::nullopt : detail::archived_value<T>(*found);
    if (!read) return differs(path, detail::kind_of<T>());
    accept(path, *read, check, [&] { value = std::move(*read); });
  }

  template <class E, class Check>
  void elements(const std::string& path, std::vector<E>& values, const Check& check) {
    const TensorView own{path, detail::element_dtype<E>, {static_cast<Index>(values.size())}, std::as_bytes(std::span(values))};
    if (pass_ == Pass::write) return put(own);
    const TensorView* found = file_->find(path);
    const bool fits = found != nullptr && found->dtype == own.dtype && found->shape.size() == 1;
    if (!fits) return differs(path, "a vector of " + std::string(info(own.dtype).name));
    if (!all_finite(*found)) return differs(path, "refuses it: it has a NaN or an infinity");
    std::vector<E> read(static_cast<std::size_t>(found->size()));
    if (!read.empty()) std::memcpy(read.data(), found->bytes.data(), found->bytes.size());
    accept(path, read, check, [&] { values = std::move(read); });
  }

  template <class M>
  void matrix(const std::string& path, M& values) {
    using S = typename M::Scalar;
    std::vector<Index> shape{values.rows(), values.cols()};
    if constexpr (M::IsVectorAtCompileTime) shape = {values.size()};
    TensorView own{path, dtype_v<S>, std::move(shape), {}};
    if (pass_ == Pass::write) {
      const S* data = values.data();
      if constexpr (!M::IsRowMajor && !M::IsVectorAtCompileTime) {  // files are row-major
        std::vector<std::byte>& copy = copies_.emplace_back(static_cast<std::size_t>(values.size()) * sizeof(S));
        data = reinterpret_cast<const S*>(copy.data());
        Eigen::Map<RowMatrix<S>>(reinterpret_cast<S*>(copy.data()), values.rows(), values.cols()) = values;
      }
      own.bytes = std::as_bytes(std::span(data, static_cast<std::size_t>(values.size())));
      return put(own);
    }
    const TensorView* found = file_->find(path);
    if (found == nullptr || found->dtype != own.dtype || found->shape != own.shape) {
      return differs(path, describe_tensor(&own));
    }
    if (!all_finite(*found)) return differs(path, "refuses it: it has a NaN or an infinity");
    if (pass_ != Pass::assign) return;
    const std::byte* from = found->bytes.data();
    for (Index i = 0; i < values.rows(); ++i) {
      for (Index j = 0; j < values.cols(); ++j, from += sizeof(S)) std::memcpy(&values.coeffRef(i, j), from, sizeof(S));
    }
  }

  void put(const TensorView& tensor) {
    if (!all_finite(tensor)) {
      throw NonFiniteError("checkpoint: " + detail::printable(tensor.name) + ": expected finite numbers, got a NaN or an infinity");
    }
    tensors_.push_back(tensor);
  }

  /// What the file has and the description does not name.
  void find_unnamed() {
    std::set<std::string> unclaimed = used_;
    const auto claim = [&](const std::string& path) {
      if (unclaimed.erase(path) == 0) differs(path, "none");
    };
    for (const auto& [key, text] : file_->metadata) {
      for (const std::string_view kind : {"state.", "same."}) {
        if (key.starts_with(kind)) claim(key.substr(kind.size()));
      }
    }
    for (const TensorView& tensor : file_->tensors) claim(tensor.name);
  }

  Pass pass_ = Pass::write;
  std::string prefix_;
  std::set<std::string> used_;

  std::map<std::string, std::string> values_;  // to write
  std::vector<TensorView> tensors_;
  std::deque<std::vector<std::byte>> copies_;  // what some of them are views of

  const SafetensorsContents* file_ = nullptr;  // to read
  std::size_t differences_ = 0;
  std::string named_;  // the first of them, a line each
};

}  // namespace dylora

#endif
