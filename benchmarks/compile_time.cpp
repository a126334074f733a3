// What a user waits for the compiler: a program that trains a layer beside one that multiplies two matrices with Eigen.

#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "measure/program.hpp"
#include "measure/report.hpp"
#include "measure/turns.hpp"
#include "program.hpp"

namespace compile_time {

/// The seconds that the compiler takes for a program of the folder compile_time. Throws std::runtime_error if it fails.
double compile(const std::string& program) {
  const std::string command = DYLORA_COMPILE " -c -o /dev/null '" DYLORA_COMPILE_TIME_DIR "/" + program + ".cpp'";
  const auto begin = std::chrono::steady_clock::now();
  if (std::system(command.c_str()) != 0) throw std::runtime_error("failed: " + command);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void run(const measure::RowOptions& o) {
  measure::Report report = measure::begin_report(o);
  const auto seconds = measure::take_turns(
      {{"train_linear", [] { return compile("train_linear"); }}, {"eigen_product", [] { return compile("eigen_product"); }}}, o.rounds);
  report.add({.what = "compiling the training of a layer over one Eigen product",
              .shape = "-O3",
              .ratio = measure::ratio(seconds[0], seconds[1]),
              .goal = measure::at_most(2.5)});
  measure::end_report(report, o);
}

}  // namespace compile_time

int main(int argc, char** argv) {
  return program::run_main(argc, argv, "compile_time", "Compare how long a program that trains a layer compiles with one Eigen product",
                           measure::RowOptions{.rounds = 7}, measure::declare,
                           [](const measure::RowOptions& options, const CLI::App&) { compile_time::run(options); });
}
