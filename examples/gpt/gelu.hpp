#ifndef DYLORA_EXAMPLES_GPT_GELU_HPP
#define DYLORA_EXAMPLES_GPT_GELU_HPP

#include <dylora/dylora.hpp>

#include "gpt/columns.hpp"

/// GELU with the tanh approximation, as GPT-2 has it: ½ u (1 + tanh t(u)), t(u) = √(2/π) (u + 0.044715 u³) (arXiv 1606.08415).
namespace gpt {

inline constexpr double gelu_slope = 0.7978845608028654, gelu_cube = 0.044715;

/// a = gelu(u), in place or not.
template <class S>
void gelu(dylora::ConstMatrixRef<S> u, dylora::MatrixRef<S> a) {
  for_each_column(u.rows(), u.cols(), [&](Index i) {
    const auto x = u.col(i).array();
    a.col(i) = S(0.5) * x * (1 + (S(gelu_slope) * x * (1 + S(gelu_cube) * x.square())).tanh());
  });
}

/// a = gelu(u) once more, and slope = gelu'(u), in one pass.
template <class S>
void gelu_and_slope(dylora::ConstMatrixRef<S> u, dylora::MatrixRef<S> a, dylora::MatrixRef<S> slope) {
  for_each_column(u.rows(), u.cols(), [&](Index i) {
    const auto x = u.col(i).array();
    auto t = slope.col(i).array();
    t = (S(gelu_slope) * x * (1 + S(gelu_cube) * x.square())).tanh();
    a.col(i) = S(0.5) * x * (1 + t);
    t = S(0.5) * (1 + t + x * (1 - t.square()) * S(gelu_slope) * (1 + 3 * S(gelu_cube) * x.square()));
  });
}

}  // namespace gpt

#endif
