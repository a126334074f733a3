#ifndef DYLORA_EXAMPLES_GPT_COLUMNS_HPP
#define DYLORA_EXAMPLES_GPT_COLUMNS_HPP

#include <algorithm>
#include <dylora/dylora.hpp>

namespace gpt {

using dylora::Index;

/// Tokens of a task when a pass over the columns is shared between threads.
inline constexpr Index columns_per_task = 64;

/// Runs body(column) for each of `count` columns of `rows` features each.
template <class Body>
void for_each_column(Index rows, Index count, const Body& body) {
  const double work = 8.0 * static_cast<double>(rows) * static_cast<double>(count);
  dylora::for_each_task((count + columns_per_task - 1) / columns_per_task, work, [&](Index task) {
    for (Index i = task * columns_per_task; i < std::min(count, (task + 1) * columns_per_task); ++i) body(i);
  });
}

/// x += y
template <class S>
void add_columns(dylora::MatrixRef<S> x, dylora::ConstMatrixRef<S> y) {
  for_each_column(x.rows(), x.cols(), [&](Index i) { x.col(i) += y.col(i); });
}

}  // namespace gpt

#endif
