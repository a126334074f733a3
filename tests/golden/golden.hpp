#ifndef DYLORA_TESTS_GOLDEN_GOLDEN_HPP
#define DYLORA_TESTS_GOLDEN_GOLDEN_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <dylora/dylora.hpp>
#include <fstream>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/catch.hpp"

/// Numbers from PyTorch, by name, from the text files that generate.py writes, and what it means to agree with them.
namespace golden {

using dylora::Index;
using dylora::MatrixX;

class File {
 public:
  /// A file beside this header. Throws std::runtime_error if it cannot be read.
  explicit File(const std::string& file) : file_(file) {
    std::ifstream stream(std::string(DYLORA_GOLDEN_DIR "/") + file);
    if (!stream) throw std::runtime_error("golden: cannot open " DYLORA_GOLDEN_DIR "/" + file);
    std::string name;
    for (Index rows, cols; stream >> name >> rows >> cols;) {
      MatrixX<double> tensor(rows, cols);
      for (Index i = 0; i < rows; ++i) {
        for (Index j = 0; j < cols; ++j) stream >> tensor(i, j);
      }
      if (!stream) throw std::runtime_error("golden: " + file + ": '" + name + "' ends early");
      tensors_[name] = std::move(tensor);
    }
    if (!stream.eof()) throw std::runtime_error("golden: " + file + ": expected 'name rows cols' after '" + name + "'");
  }

  /// Throws std::runtime_error if there is no such tensor.
  const MatrixX<double>& operator[](const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw std::runtime_error("golden: " + file_ + " has no '" + name + "'");
    return found->second;
  }

  template <class S>
  MatrixX<S> matrix(const std::string& name) const {
    return (*this)[name].cast<S>();
  }

  double number(const std::string& name) const { return (*this)[name].value(); }

  std::vector<Index> integers(const std::string& name) const {
    const auto values = matrix<Index>(name);
    return {values.data(), values.data() + values.size()};
  }

  /// How many tensors have a name that begins with `prefix`.
  Index count(const std::string& prefix) const {
    return std::count_if(tensors_.begin(), tensors_.end(), [&](const auto& tensor) { return tensor.first.starts_with(prefix); });
  }

 private:
  std::string file_;
  std::map<std::string, MatrixX<double>> tensors_;
};

template <std::floating_point S>
inline constexpr double tolerance = std::same_as<S, float> ? 1e-5 : 1e-10;

/// The largest difference between two tensors of one shape, relative to the largest golden element. What is exactly zero in PyTorch, such
/// as the gradient of a component that took no part, must be exactly zero here.
template <class M>
double error(const Eigen::MatrixBase<M>& got, const MatrixX<double>& expected) {
  const MatrixX<double> values = got.template cast<double>();
  if (!values.allFinite() || (expected.array() == 0 && values.array() != 0).any()) return std::numeric_limits<double>::infinity();
  return (values - expected).isZero(0) ? 0 : (values - expected).cwiseAbs().maxCoeff() / expected.cwiseAbs().maxCoeff();
}

template <class M>
void check(const Eigen::MatrixBase<M>& got, const File& file, const std::string& name) {
  INFO(name);
  const MatrixX<double>& expected = file[name];
  REQUIRE(got.rows() == expected.rows());
  REQUIRE(got.cols() == expected.cols());
  CHECK(error(got, expected) <= tolerance<typename M::Scalar>);
}

template <std::floating_point S>
void check_number(double got, const File& file, const std::string& name) {
  INFO(name);
  CHECK(std::abs(got - file.number(name)) <= tolerance<S> * std::abs(file.number(name)));
}

/// Checks every gradient against the tensor named `prefix` + its name; there must be no other tensor with that prefix.
template <class T>
void check_gradients(const T& /*trained*/, const typename T::Gradients& gradients, const File& file, const std::string& prefix) {
  Index checked = 0;
  dylora::for_each_parameter<T>(
      [&](dylora::Parameter parameter, const auto& gradient) {
        check(gradient, file, prefix + std::string(parameter.name));
        ++checked;
      },
      gradients);
  CHECK(checked == file.count(prefix));
}

/// Checks the output and the gradients of a layer at one rank, nested and frozen, against the tensors named `at_rank`/y, `at_rank`/dx
/// (where its backward returns one), `at_rank`/nested/… and `at_rank`/frozen/…. `x` is all that its forward takes before the rank.
template <class L, class M, class... X>
void check_at_rank(const L& layer, Index rank, const File& file, const std::string& at_rank, const M& dy, const X&... x) {
  typename L::Cache cache;
  auto gradients = dylora::zeros_like(layer);
  for (const auto& [mode, slice] :
       {std::pair("/nested/", dylora::RankSlice(rank)), std::pair("/frozen/", dylora::RankSlice(rank, rank - 1))}) {
    dylora::set_zero(layer, gradients);
    check(layer.forward(x..., slice, cache), file, at_rank + "/y");
    if constexpr (std::is_void_v<decltype(layer.backward(dy, cache, gradients))>) {
      layer.backward(dy, cache, gradients);
    } else {
      check(layer.backward(dy, cache, gradients), file, at_rank + "/dx");
    }
    check_gradients(layer, gradients, file, at_rank + mode);
  }
}

/// The same at every rank b, against those named `name`/b/….
template <class L, class M, class... X>
void check_at_every_rank(const L& layer, const File& file, const std::string& name, const M& dy, const X&... x) {
  for (Index rank = 1; rank <= layer.max_rank(); ++rank) check_at_rank(layer, rank, file, name + '/' + std::to_string(rank), dy, x...);
}

/// The scale rules of the golden files, by name.
inline const std::map<std::string, dylora::ScaleRule>& scale_rules() {
  static const std::map<std::string, dylora::ScaleRule> rules{{"alpha_over_rank", dylora::alpha_over_rank},
                                                              {"alpha_over_sqrt_rank", dylora::alpha_over_sqrt_rank},
                                                              {"alpha_over_max_rank", dylora::alpha_over_max_rank}};
  return rules;
}

}  // namespace golden

#endif
