// What the training step of each method costs beside that of a Linear with a LowRank of the same rank, and that NOLA's memory does not grow
// with its bases.
//
// A step is a forward into the caller's memory and a backward. All methods over a shape take turns, at every number of threads.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <dylora/dylora.hpp>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "measure/program.hpp"
#include "measure/report.hpp"
#include "measure/turns.hpp"
#include "method_ratio/methods.hpp"
#include "method_ratio/nola_memory.hpp"
#include "program.hpp"
#include "text/platform.hpp"

namespace method_ratio {

constexpr int goal_threads = 2;
constexpr Index few_bases = 16, many_bases = 1024;

struct Options : measure::ShapeOptions {
  std::vector<std::string> methods;
  std::vector<Index> nola_peak;
};

void declare(CLI::App& app, Options& o) {
  measure::declare(app, o, "3072->768");
  app.add_option("--methods", o.methods, "Only methods with one of these in their name, such as DoRA");
  app.add_option("--nola-peak", o.nola_peak, "In, out, tokens, bases, threads: only print by how much the memory grows, in bytes")
      ->expected(5)
      ->group("");  // hidden: what the program calls itself with
}

bool wanted(const std::vector<std::string>& parts, const std::string& name) {
  const auto named = [&](const std::string& part) { return name.find(part) != std::string::npos; };
  return parts.empty() || std::any_of(parts.begin(), parts.end(), named);
}

class Benchmark {
 public:
  explicit Benchmark(const Options& options) : o_(options), report_(measure::begin_report(options.rows)) {}

  void run() {
    for (const Shape& shape :
         o_.quick ? std::vector<Shape>{{64, 64, 8}, {128, 64, 8}} : std::vector<Shape>{{768, 768, 512}, {3072, 768, 512}}) {
      if (wanted(o_.shapes, shape.name())) compare_steps(shape);
    }
    const Shape large = o_.quick ? Shape{256, 256, 256} : Shape{3072, 768, 512};
    if (wanted(o_.shapes, large.name()) && wanted(o_.methods, "NOLA")) compare_memory(large);
    measure::end_report(report_, o_.rows);
  }

 private:
  void compare_steps(const Shape& shape) {
    Samples samples(shape, Rng(1));
    std::vector<Method> all = methods(samples);
    std::erase_if(all, [&](const Method& method) { return !method.over.empty() && !wanted(o_.methods, method.name); });
    std::vector<measure::Contender> contenders;
    for (const int threads : o_.threads) {
      for (const Method& method : all) {
        contenders.push_back({method.name, [threads, round = measure::timed(method.step, o_.seconds)]() mutable {
                                text::use_threads(threads);
                                return round();
                              }});
      }
    }
    const auto seconds = measure::take_turns(contenders, o_.rows.rounds);
    auto of_threads = seconds.begin();
    for (const int threads : o_.threads) {
      std::map<std::string, const std::vector<double>*> others;
      for (const Method& method : all) {
        const std::vector<double>& own = *of_threads++;
        if (method.over.empty()) {
          others[method.name] = &own;
          std::fprintf(stderr, "%s, %d threads, %s: %.2f ms\n", shape.name().c_str(), threads, method.name.c_str(),
                       1e3 * measure::median(own));
        } else {
          report_.add({method.name + ", over " + method.over, shape.name(), static_cast<int>(method.total_rank), threads,
                       measure::ratio(own, *others.at(method.over)), judged(method.goal, threads)});
        }
      }
    }
  }

  void compare_memory(const Shape& shape) {
    const auto add = [&](const std::string& what, double many, double few, std::optional<measure::Goal> goal = std::nullopt) {
      std::fprintf(stderr, "%s, %s: %.0f bytes of %td bases, %.0f of %td\n", shape.name().c_str(), what.c_str(), many, many_bases, few,
                   few_bases);
      const double over = many / few;
      report_.add({what + ", 1024 bases over 16",
                   shape.name(),
                   static_cast<int>(rank),
                   goal_threads,
                   {over, over, over},
                   judged(goal, goal_threads)});
    };
    text::use_threads(goal_threads);
    const NolaBytes many = nola_bytes(shape, many_bases), few = nola_bytes(shape, few_bases);
    add("NOLA's bytes", many.all(), few.all());
    add("NOLA's bytes but for coefficients", many.buffers, few.buffers, measure::at_most(1));
    add("NOLA's peak memory", nola_peak_elsewhere(shape, many_bases, goal_threads), nola_peak_elsewhere(shape, few_bases, goal_threads),
        measure::at_most(1.05));
  }

  /// Goals are those of the large shapes.
  std::optional<measure::Goal> judged(std::optional<measure::Goal> goal, int threads) const {
    return !o_.quick && threads == goal_threads ? goal : std::nullopt;
  }

  Options o_;
  measure::Report report_;
};

void run(Options o, const CLI::App& app) {
  if (!o.nola_peak.empty()) {
    const auto& of = o.nola_peak;
    text::use_threads(static_cast<int>(of[4]));
    std::printf("%.0f\n", nola_peak({of[0], of[1], of[2]}, of[3]));
    return;
  }
  measure::shorten_if_quick(app, o);
  Benchmark(o).run();
}

}  // namespace method_ratio

int main(int argc, char** argv) {
  return program::run_main(argc, argv, "method_ratio", "Compare the training steps of all methods with that of a Linear",
                           method_ratio::Options{}, method_ratio::declare, method_ratio::run);
}
