#ifndef DYLORA_TESTS_SUPPORT_VALUES_HPP
#define DYLORA_TESTS_SUPPORT_VALUES_HPP

#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/core/types.hpp"

/// Numbers for the tests: where they come from, and how they are compared.
namespace dylora::test {

template <class S>
inline constexpr S nan = std::numeric_limits<S>::quiet_NaN();

/// What the rounding of some ten operations may amount to, relative to the largest value beside them.
template <class S>
inline constexpr double rounding = 16 * static_cast<double>(std::numeric_limits<S>::epsilon());

template <class S>
MatrixX<S> noise(Index rows, Index cols, std::uint64_t seed) {
  Rng rng(seed);
  return random_uniform<S>(rows, cols, 1, rng);
}

template <class S>
MatrixX<S> all_nan(Index rows, Index cols) {
  return MatrixX<S>::Constant(rows, cols, nan<S>);
}

template <class S>
bool equal_bits(const MatrixX<S>& a, const MatrixX<S>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         (a.size() == 0 || std::memcmp(a.data(), b.data(), sizeof(S) * static_cast<std::size_t>(a.size())) == 0);
}

template <class A, class B>
bool same_bits(const A& a, const B& b) {
  return equal_bits<typename A::Scalar>(a, b);
}

/// The largest difference, relative to the largest value of `expected`; NaN if anything is.
inline double gap(const MatrixX<double>& got, const MatrixX<double>& expected) {
  if (got.rows() != expected.rows() || got.cols() != expected.cols()) return std::numeric_limits<double>::infinity();
  if (got.size() == 0) return 0;
  if (!got.allFinite() || !expected.allFinite()) return nan<double>;
  const double size = expected.cwiseAbs().maxCoeff(), difference = (got - expected).cwiseAbs().maxCoeff();
  return difference == 0 ? 0 : difference / size;
}

template <class S>
MatrixX<double> in_double(const MatrixX<S>& m) {
  return m.template cast<double>();
}

/// All components there are, from `begin` on.
inline constexpr Index last_component = std::numeric_limits<Index>::max();

/// Calls f(component, entry) for every value that T trains, column by column, with component −1 for one of a parameter without a rank axis.
template <class T, class P, class F>
void for_each_entry(P& parameters, F&& f) {
  for_each_parameter<T>(
      [&](Parameter parameter, auto& m) {
        for (Index j = 0; j < m.cols(); ++j) {
          for (Index i = 0; i < m.rows(); ++i) {
            f(parameter.rank_axis == RankAxis::rows ? i : parameter.rank_axis == RankAxis::cols ? j : Index{-1}, m(i, j));
          }
        }
      },
      parameters);
}

/// Calls f(entry) for every value of the components [begin, end).
template <class T, class P, class F>
void for_each_value(P& parameters, Index begin, Index end, F&& f) {
  for_each_entry<T>(parameters, [&](Index component, auto& entry) {
    if (component >= begin && component < end) f(entry);
  });
}

/// The values of those components for which `wanted` holds, one after the other.
template <class T, class P, class Wanted>
VectorX<typename T::Scalar> collected(const P& parameters, Wanted&& wanted) {
  std::vector<typename T::Scalar> result;
  for_each_entry<T>(parameters, [&](Index component, const auto& entry) {
    if (wanted(component)) result.push_back(entry);
  });
  return Eigen::Map<const VectorX<typename T::Scalar>>(result.data(), static_cast<Index>(result.size()));
}

/// Everything that T trains, one value after the other.
template <class T, class P>
VectorX<typename T::Scalar> values(const P& parameters) {
  return collected<T>(parameters, [](Index) { return true; });
}

/// The components [begin, end) of what has a rank axis.
template <class T, class P>
VectorX<typename T::Scalar> component_values(const P& parameters, Index begin, Index end = last_component) {
  return collected<T>(parameters, [&](Index component) { return component >= begin && component < end; });
}

/// What has no rank axis, and so takes part at every rank.
template <class T, class P>
VectorX<typename T::Scalar> shared_values(const P& parameters) {
  return collected<T>(parameters, [](Index component) { return component < 0; });
}

template <class T, class P>
void fill_components(P& parameters, typename T::Scalar value, Index begin = 0, Index end = last_component) {
  for_each_value<T>(parameters, begin, end, [&](auto& entry) { entry = value; });
}

/// Every trained value at random: a trained adapter, as far as a law can tell.
template <class T, class P>
void randomize(P& parameters, std::uint64_t seed) {
  Rng rng(seed);
  for_each_entry<T>(parameters, [&](Index, auto& entry) { entry = static_cast<typename T::Scalar>(2 * rng.uniform() - 1); });
}

/// The first components of `whole` into `part`, which has fewer.
template <class T>
void copy_prefix(const T& whole, T& part) {
  for_each_parameter(
      [](Parameter, const auto& from, auto& to) {
        for (Index i = 0; i < to.rows(); ++i) {
          for (Index j = 0; j < to.cols(); ++j) to(i, j) = from(i, j);
        }
      },
      whole, part);
}

/// Whether there is a component to cut T to.
template <class T>
bool has_components(const T& trained) {
  bool found = false;
  for_each_parameter([&](Parameter parameter, const auto&) { found = found || parameter.rank_axis != RankAxis::none; }, trained);
  return found;
}

/// The names of what T trains, in order.
template <class T>
std::vector<std::string> names(const T& trained) {
  std::vector<std::string> result;
  for_each_parameter([&](Parameter parameter, const auto&) { result.emplace_back(parameter.name); }, trained);
  return result;
}

/// For each gradient of T with a rank axis, a digit per component: 1 if it was trained.
template <class T>
std::vector<std::string> trained_components(const typename T::Gradients& gradients) {
  std::vector<std::string> result;
  for_each_parameter<T>(
      [&](Parameter, const auto& g) {
        result.emplace_back();
        if constexpr (requires { g.components; }) {
          for (Index i = 0; i < g.components.size(); ++i) result.back() += g.components.contains(i) ? '1' : '0';
        }
      },
      gradients);
  return result;
}

}  // namespace dylora::test

#endif
