#ifndef DYLORA_BENCHMARKS_MEASURE_REPORT_HPP
#define DYLORA_BENCHMARKS_MEASURE_REPORT_HPP

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>

#include "measure/turns.hpp"

namespace measure {

/// How far a ratio must go.
struct Goal {
  enum class Side { at_most, at_least } side;
  double value;

  bool met(double ratio) const { return side == Side::at_most ? ratio <= value : ratio >= value; }
};

inline Goal at_most(double value) { return {Goal::Side::at_most, value}; }
inline Goal at_least(double value) { return {Goal::Side::at_least, value}; }

struct Row {
  std::string what;   ///< what is divided by what
  std::string shape;  ///< "1024->4096x512" (in, out, tokens), or what takes its place
  int rank = 0;       ///< 0: none is involved
  int threads = 1;
  Ratio ratio;
  std::optional<Goal> goal;  ///< none: the row informs
};

/// Prints rows as they come, and keeps them for the JSON file.
class Report {
 public:
  void add(const Row& row) {
    if (rows_.empty()) {
      std::printf("%-62s %-16s %4s %7s %8s  %-18s %8s  %s\n", "what", "shape", "rank", "threads", "ratio", "quartiles", "goal", "met");
    }
    const auto& [median, low, high] = row.ratio;
    char rank[16] = "-", quartiles[32], goal[32] = "";
    if (row.rank > 0) std::snprintf(rank, sizeof rank, "%d", row.rank);
    std::snprintf(quartiles, sizeof quartiles, "%.3f to %.3f", low, high);
    if (row.goal) std::snprintf(goal, sizeof goal, "%s %.2f", row.goal->side == Goal::Side::at_most ? "<=" : ">=", row.goal->value);
    const char* met = !row.goal ? "" : row.goal->met(median) ? "yes" : "NO";
    std::printf("%-62s %-16s %4s %7d %8.3f  %-18s %8s  %s\n", row.what.c_str(), row.shape.c_str(), rank, row.threads, median, quartiles,
                goal, met);
    std::fflush(stdout);
    rows_.push_back({{"what", row.what},
                     {"shape", row.shape},
                     {"rank", row.rank},
                     {"threads", row.threads},
                     {"ratio", median},
                     {"low", low},
                     {"high", high},
                     {"goal", nullptr},
                     {"met", nullptr}});
    if (!row.goal) return;
    rows_.back()["goal"] = row.goal->value;
    rows_.back()["met"] = row.goal->met(median);
  }

  /// Goes on with the rows that another program wrote: its table and ours are one.
  void read(const std::string& path) {
    std::ifstream in(path);
    rows_ = nlohmann::json::parse(in, nullptr, false);
    if (!rows_.is_array()) throw std::runtime_error("cannot read " + path);
  }

  /// A list of {what, shape, rank, threads, ratio, low, high, goal, met}; goal and met are null where a row has no goal.
  void write(const std::string& path) const {
    std::ofstream out(path);
    out << rows_.dump(2) << '\n';
    if (!out.flush()) throw std::runtime_error("cannot write " + path);
  }

 private:
  nlohmann::json rows_ = nlohmann::json::array();
};

}  // namespace measure

#endif
