#ifndef DYLORA_BENCHMARKS_MEASURE_PROGRAM_HPP
#define DYLORA_BENCHMARKS_MEASURE_PROGRAM_HPP

#include <CLI/CLI.hpp>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "measure/report.hpp"

/// What a benchmark has around what it measures: its options, where its rows go.
namespace measure {

/// How long to measure, and where the rows go.
struct RowOptions {
  int rounds = 15;
  std::string json = {};
  bool append = false;
};

inline void declare(CLI::App& app, RowOptions& o) {
  app.add_option("--rounds", o.rounds, "Rounds in which all contenders take a turn")->check(CLI::PositiveNumber);
  app.add_option("--json", o.json, "Write the rows to this file");
  app.add_flag("--append", o.append, "Keep the rows that this file has")->needs("--json");
}

/// A report that goes to where the options say. Throws std::runtime_error, before the work, if the file cannot be read or written.
inline Report begin_report(const RowOptions& o) {
  Report report;
  if (o.append) report.read(o.json);
  if (!o.json.empty()) report.write(o.json);
  return report;
}

inline void end_report(const Report& report, const RowOptions& o) {
  if (!o.json.empty()) report.write(o.json);
}

/// value = other, unless the command line says what it is.
template <class T>
void unless_told(const CLI::App& app, const std::string& option, T& value, const std::type_identity_t<T>& other) {
  if (app.get_option(option)->count() == 0) value = other;
}

/// What a program that compares layers of several shapes is told.
struct ShapeOptions {
  std::vector<int> threads{1, 2};
  std::vector<std::string> shapes = {};
  RowOptions rows = {};
  double seconds = 0.02;
  bool quick = false;
};

/// `shape` is an example of a shape's name.
inline void declare(CLI::App& app, ShapeOptions& o, const std::string& shape) {
  app.add_option("--threads", o.threads, "Numbers of threads")->check(CLI::PositiveNumber);
  app.add_option("--shapes", o.shapes, "Only shapes with one of these in their name, such as " + shape);
  declare(app, o.rows);
  app.add_option("--seconds", o.seconds, "Length of a turn")->check(CLI::PositiveNumber);
  app.add_flag("--quick", o.quick, "Tiny shapes, and few and short rounds unless told otherwise: to see that it works");
}

/// Few and short rounds, if --quick asks for them.
inline void shorten_if_quick(const CLI::App& app, ShapeOptions& o) {
  if (!o.quick) return;
  unless_told(app, "--rounds", o.rows.rounds, 2);
  unless_told(app, "--seconds", o.seconds, 1e-3);
}

/// The number that this program prints in a process of its own, called with `option` and these values: memory is measured in a process that
/// has done nothing else. Throws std::runtime_error if it prints none.
inline double ask_own_process(const std::string& option, std::initializer_list<std::ptrdiff_t> values) {
  std::string command = '\'' + std::filesystem::read_symlink("/proc/self/exe").string() + "' " + option;
  for (const std::ptrdiff_t value : values) command += ' ' + std::to_string(value);
  const std::unique_ptr<FILE, int (*)(FILE*)> output(popen(command.c_str(), "r"), pclose);
  double answer = 0;
  if (!output || std::fscanf(output.get(), "%lf", &answer) != 1) throw std::runtime_error("no answer from " + command);
  return answer;
}

}  // namespace measure

#endif
