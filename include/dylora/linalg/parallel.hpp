#ifndef DYLORA_LINALG_PARALLEL_HPP
#define DYLORA_LINALG_PARALLEL_HPP

#include <algorithm>

#include "dylora/core/types.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

/// The library's only OpenMP, open to layers of your own. Two rules keep results independent of the thread count: a task owns whole
/// outputs and never adds into another's, and how one output is computed never depends on how many tasks there are. Process-wide OpenMP
/// state is read, never set. Inside a parallel region of the caller's, everything runs serially on the calling thread.
namespace dylora {

/// Threads that a call made here may use.
inline Index available_threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

/// Multiply-adds below which starting a team of threads costs more than it saves.
inline constexpr double parallel_work = 5e5;

/// Runs body(i) for every i in [0, count). Tasks must be independent, must not throw, and together cost `work` multiply-adds.
template <class Body>
void for_each_task(Index count, double work, const Body& body) {
#ifdef _OPENMP
  if (count > 1 && work >= parallel_work && available_threads() > 1) {
#pragma omp parallel for schedule(dynamic, 1)
    for (Index i = 0; i < count; ++i) body(i);
    return;
  }
#endif
  (void)work;
  for (Index i = 0; i < count; ++i) body(i);
}

/// Runs body(begin, end) on ranges that cover [0, size), one for each thread, their boundaries multiples of `grain`. It must not throw.
template <class Body>
void for_each_range(Index size, Index grain, double work, const Body& body) {
  const Index grains = (size + grain - 1) / grain;
  const Index ranges = work >= parallel_work ? std::min(available_threads(), grains) : 1;
  if (ranges <= 1) return body(Index{0}, size);
  for_each_task(ranges, work, [&](Index i) {
    const auto boundary = [&](Index k) { return std::min(size, grains * k / ranges * grain); };
    body(boundary(i), boundary(i + 1));
  });
}

}  // namespace dylora

#endif
