#ifndef DYLORA_BENCHMARKS_MEASURE_PEAK_MEMORY_HPP
#define DYLORA_BENCHMARKS_MEASURE_PEAK_MEMORY_HPP

#include <fstream>
#include <stdexcept>
#include <string>

namespace measure {

/// Resident bytes of this process, from /proc: "VmRSS:" those now, "VmHWM:" the most since forget_peak.
/// (getrusage also counts what the process was before it became this program.)
inline double resident_bytes(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    double kibibytes = 0;
    if (word == key && status >> kibibytes) return 1024 * kibibytes;
  }
  throw std::runtime_error("no " + key + " in /proc/self/status");
}

inline void forget_peak() { std::ofstream("/proc/self/clear_refs") << 5; }

/// By how much the peak rises above what is resident now while `work` is done.
template <class Work>
double peak_growth(const Work& work) {
  forget_peak();
  const double before = resident_bytes("VmRSS:");
  work();
  return resident_bytes("VmHWM:") - before;
}

}  // namespace measure

#endif
