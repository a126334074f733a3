#ifndef DYLORA_EXAMPLES_TEXT_PLATFORM_HPP
#define DYLORA_EXAMPLES_TEXT_PLATFORM_HPP

#include <cstdio>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__unix__) || defined(__APPLE__)
#include <sys/resource.h>
#include <unistd.h>
#endif

/// The one place for what depends on the platform, each with a fallback.
namespace text {

/// Limits the threads of the whole program, which only a program may do; 0 leaves them as they are.
inline void use_threads(int threads) {
#ifdef _OPENMP
  if (threads > 0) omp_set_num_threads(threads);
#else
  (void)threads;
#endif
}

/// Whether standard output is a terminal, where a line may be redrawn; elsewhere false.
inline bool output_is_terminal() {
#if defined(__unix__) || defined(__APPLE__)
  return isatty(fileno(stdout)) != 0;
#else
  return false;
#endif
}

/// The largest resident memory of this process so far in MiB; 0 where it is not known.
inline double peak_rss_mb() {
#if defined(__APPLE__)
  rusage usage{};
  return getrusage(RUSAGE_SELF, &usage) == 0 ? static_cast<double>(usage.ru_maxrss) / (1 << 20) : 0;
#elif defined(__unix__)
  rusage usage{};
  return getrusage(RUSAGE_SELF, &usage) == 0 ? static_cast<double>(usage.ru_maxrss) / (1 << 10) : 0;
#else
  return 0;
#endif
}

}  // namespace text

#endif
