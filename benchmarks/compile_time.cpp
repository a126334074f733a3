// What a user waits for the compiler: a program that trains a layer beside one that multiplies two matrices with Eigen.

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>

#include "measure/report.hpp"
#include "measure/turns.hpp"

namespace compile_time {

/// The seconds that the compiler takes for a program of the folder compile_time. Throws std::runtime_error if it fails.
double compile(const std::string& program) {
  const std::string command = DYLORA_COMPILE " -c -o /dev/null '" DYLORA_COMPILE_TIME_DIR "/" + program + ".cpp'";
  const auto begin = std::chrono::steady_clock::now();
  if (std::system(command.c_str()) != 0) throw std::runtime_error("failed: " + command);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace compile_time

int main(int argc, char** argv) {
  int rounds = 7;
  std::string json;
  bool append = false;
  CLI::App app("Compare how long a program that trains a layer compiles with one Eigen product");
  app.option_defaults()->always_capture_default();
  app.add_option("--rounds", rounds, "Rounds in which both are compiled")->check(CLI::PositiveNumber);
  app.add_option("--json", json, "Write the row to this file");
  app.add_flag("--append", append, "Keep the rows that this file has")->needs("--json");
  CLI11_PARSE(app, argc, argv);
  try {
    const auto seconds = measure::take_turns({{"train_linear", [] { return compile_time::compile("train_linear"); }},
                                              {"eigen_product", [] { return compile_time::compile("eigen_product"); }}},
                                             rounds);
    measure::Report report;
    if (append) report.read(json);
    report.add({.what = "compiling the training of a layer over one Eigen product",
                .shape = "-O3",
                .ratio = measure::ratio(seconds[0], seconds[1]),
                .goal = measure::at_most(2.5)});
    if (!json.empty()) report.write(json);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "compile_time: %s\n", error.what());
    return 1;
  }
}
