#ifndef DYLORA_TESTS_SUPPORT_THREADS_HPP
#define DYLORA_TESTS_SUPPORT_THREADS_HPP

#include <string>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dylora::test {

#ifdef _OPENMP

/// Runs f() with teams of `threads`, and leaves the setting as it was.
template <class F>
auto with_threads(int threads, F&& f) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(threads);
  auto result = f();
  omp_set_num_threads(before);
  return result;
}

/// What each member of a team of the caller's own gets from f().
template <class F>
auto inside_team(int threads, F&& f) {
  std::vector<decltype(f())> results(static_cast<std::size_t>(threads));
#pragma omp parallel num_threads(threads)
  results[static_cast<std::size_t>(omp_get_thread_num())] = f();
  return results;
}

#endif

/// Calls check(f(), where) for f called under every way in which a program may use threads. f may run on several threads at once.
template <class F, class Check>
void for_each_threading(F&& f, Check&& check) {
#ifdef _OPENMP
  for (const int threads : {1, 2, 3, 8}) check(with_threads(threads, f), std::to_string(threads) + " threads");
  for (const int team : {1, 2}) {
    const auto results = with_threads(2, [&] { return inside_team(team, f); });
    for (const auto& result : results) check(result, "inside a team of " + std::to_string(team));
  }
#endif
  decltype(f()) result;
  std::thread([&] { result = f(); }).join();
  check(result, "on a std::thread");
}

}  // namespace dylora::test

#endif
