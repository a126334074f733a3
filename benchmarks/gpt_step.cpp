// One DyLoRA training step of the text model of the examples beside the same step in PyTorch: its time, and the memory that it takes.
//
// A step is forward, loss, backward, clipping and AdamW at a rank drawn as in the paper; both sides draw the same ranks. Before anything is
// timed, both sides train some steps from the same numbers, and must give the same losses.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <dylora/dylora.hpp>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "gpt_step/step.hpp"
#include "measure/peak_memory.hpp"
#include "measure/program.hpp"
#include "measure/report.hpp"
#include "measure/turns.hpp"
#include "peers/torch_peer.hpp"
#include "program.hpp"
#include "text/platform.hpp"

namespace gpt_step {

using measure::ratio;
using Seconds = std::vector<double>;  // of each round

constexpr int goal_threads = 2;
constexpr double tolerance = 1e-4;  // of losses between the two sides

struct Goals {
  std::optional<measure::Goal> speed, memory;
};

struct Case {
  Task task;
  Goals goals;
};

struct Options {
  std::vector<int> threads{1, goal_threads};
  measure::RowOptions rows;
  int steps = 4;
  bool alone = false, quick = false;
  std::vector<Index> memory_of;
};

void declare(CLI::App& app, Options& o) {
  app.add_option("--threads", o.threads, "Numbers of threads")->check(CLI::PositiveNumber);
  measure::declare(app, o.rows);
  app.add_option("--steps", o.steps, "Steps of a turn")->check(CLI::PositiveNumber);
  app.add_flag("--alone", o.alone, "Do not look for PyTorch");
  app.add_flag("--quick", o.quick, "A tiny model, and few and short rounds unless told otherwise: to see that it works");
  app.add_option("--memory-of", o.memory_of, "Width, layers, windows, context, threads: only print the memory of its steps in bytes")
      ->expected(5)
      ->group("");  // hidden: what the program calls itself with
}

/// Our side of `memory` in torch_peer.py. The weights count on both sides.
double memory_of(const Task& task) {
  const auto train = [](const Task& one) { Step(one).train({one.max_rank, one.max_rank, one.max_rank}); };
  Task tiny = task;
  tiny.config.width = 8 * task.config.heads;
  tiny.config.layers = 1;
  tiny.windows = 2;
  train(tiny);
  return measure::peak_growth([&] { train(task); });
}

class Benchmark {
 public:
  explicit Benchmark(const Options& options) : o_(options), report_(measure::begin_report(options.rows)) {
    if (!o_.alone) torch_ = peers::TorchPeer::start();
    if (torch_) {
      std::fprintf(stderr, "PyTorch %s\n", torch_->version().c_str());
    } else {
      std::fprintf(stderr, "PyTorch: skipped%s\n", o_.alone ? "" : ", for want of a python3 that can import torch");
    }
  }

  void run() {
    const std::vector<Case> cases =
        o_.quick ? std::vector<Case>{{{.config = {.context = 16, .width = 32, .layers = 1}, .windows = 16}, {}}}
                 : std::vector<Case>{{{.config = {.width = 128, .layers = 3}}, {measure::at_least(4), measure::at_most(0.5)}},
                                     {{.config = {.width = 256, .layers = 4}}, {measure::at_least(3), measure::at_most(0.5)}}};
    for (const auto& [task, goals] : cases) compare_times(task, goals);
    for (const auto& [task, goals] : cases) compare_memory(task, goals);
    measure::end_report(report_, o_.rows);
  }

 private:
  using Train = std::function<Trained(const std::vector<Index>&)>;

  /// A contender that trains at ranks of its own stream, which is the same for all.
  measure::Contender contender(const Task& task, const std::string& name, Train train) const {
    return {name, [train = std::move(train), steps = o_.steps, draw = UniformRank{1, task.max_rank}, rng = Rng(task.seed)]() mutable {
              std::vector<Index> ranks(static_cast<std::size_t>(steps));
              for (Index& rank : ranks) rank = draw(rng).active;
              return train(ranks).seconds;
            }};
  }

  /// PyTorch's side of a task, once it has shown that it does the same.
  Train torch_side(const Task& task, int threads) {
    const nlohmann::json model = torch_->ask(task.request("gpt", threads));
    Train train = [torch = torch_, id = model.at("id")](const std::vector<Index>& ranks) -> Trained {
      const nlohmann::json reply = torch->ask({{"do", "train"}, {"id", id}, {"ranks", ranks}});
      return {reply.at("seconds"), reply.at("losses")};
    };
    const std::vector<Index> ranks{task.max_rank, 1, 3, task.max_rank};
    const auto theirs = train(ranks).losses, ours = Step(task).train(ranks).losses;
    double difference = 0;
    for (std::size_t i = 0; i < ranks.size(); ++i) difference = std::max(difference, std::abs(ours[i] - theirs[i]));
    std::fprintf(stderr, "%s: PyTorch's losses over the first %zu steps are ours within %.1e; its fastest way with %d threads: %s\n",
                 task.name().c_str(), ranks.size(), difference, threads, model.at("how").get<std::string>().c_str());
    if (!(difference <= tolerance)) throw std::runtime_error("PyTorch's losses are not ours: the work is not the same");
    return train;
  }

  void compare_times(const Task& task, const Goals& goals) {
    std::map<int, Step> steps;
    std::map<int, std::array<Seconds, parts.size()>> part_seconds;
    std::vector<measure::Contender> contenders;
    for (const int threads : o_.threads) {
      Step& step = steps.try_emplace(threads, task).first->second;
      contenders.push_back(contender(task, "ours", [&step, &laps = part_seconds[threads], threads](const std::vector<Index>& ranks) {
        text::use_threads(threads);
        step.part_seconds = {};
        Trained trained = step.train(ranks);
        for (std::size_t i = 0; i < parts.size(); ++i) laps[i].push_back(step.part_seconds[i] / static_cast<double>(ranks.size()));
        return trained;
      }));
    }
    for (std::size_t i = 0; torch_ && i < o_.threads.size(); ++i) {
      contenders.push_back(contender(task, "PyTorch", torch_side(task, o_.threads[i])));
    }

    const auto seconds = measure::take_turns(contenders, o_.rows.rounds);
    for (std::size_t i = 0; i < o_.threads.size(); ++i) {
      const int threads = o_.threads[i];
      const auto add = [&](const std::string& what, const measure::Ratio& of, const std::optional<measure::Goal>& goal = std::nullopt) {
        report_.add({what, task.name(), 0, threads, of, threads == goal_threads ? goal : std::nullopt});
      };
      tell_speed(task, "ours", threads, seconds[i]);
      if (torch_) {
        const Seconds& theirs = seconds[o_.threads.size() + i];
        tell_speed(task, "PyTorch", threads, theirs);
        add("PyTorch's GPT step over ours", ratio(theirs, seconds[i]), goals.speed);
      }
      if (threads > 1 && o_.threads.front() == 1) add("our GPT step on one thread over this many", ratio(seconds.front(), seconds[i]));
      for (std::size_t part = 0; threads == o_.threads.back() && part < parts.size(); ++part) {
        Seconds& laps = part_seconds[threads][part];
        laps.erase(laps.begin());  // of the round that warms up
        add("share of our GPT step: " + std::string(parts[part]), ratio(laps, seconds[i]));
      }
    }
  }

  void tell_speed(const Task& task, const char* name, int threads, const Seconds& seconds) const {
    const double median = measure::median(seconds);
    std::fprintf(stderr, "%s, %d threads, %s: %.2f ms, %.0f tokens/s\n", task.name().c_str(), threads, name, 1e3 * median,
                 static_cast<double>(task.tokens()) / median);
  }

  /// Each side in a process of its own.
  void compare_memory(const Task& task, const Goals& goals) {
    const double ours = own_memory(task);
    std::fprintf(stderr, "%s: peak memory of a step, weights included: ours %.1f MB", task.name().c_str(), ours / 1e6);
    if (const auto torch = o_.alone ? nullptr : peers::TorchPeer::start()) {
      const double theirs = torch->ask(task.request("memory", goal_threads)).at("bytes");
      std::fprintf(stderr, ", PyTorch %.1f MB\n", theirs / 1e6);
      const double over = ours / theirs;
      report_.add({"peak memory of our GPT step over PyTorch's", task.name(), 0, goal_threads, {over, over, over}, goals.memory});
    } else {
      std::fprintf(stderr, "\n");
    }
  }

  static double own_memory(const Task& task) {
    return measure::ask_own_process("--memory-of",
                                    {task.config.width, task.config.layers, task.windows, task.config.context, goal_threads});
  }

  Options o_;
  std::shared_ptr<peers::TorchPeer> torch_;
  measure::Report report_;
};

void run(Options o, const CLI::App& app) {
  if (!o.memory_of.empty()) {
    const auto& of = o.memory_of;
    text::use_threads(static_cast<int>(of[4]));
    std::printf("%.0f\n", memory_of({.config = {.context = of[3], .width = of[0], .layers = of[1]}, .windows = of[2]}));
    return;
  }
  if (o.quick) {
    measure::unless_told(app, "--rounds", o.rows.rounds, 2);
    measure::unless_told(app, "--steps", o.steps, 2);
  }
  Benchmark(o).run();
}

}  // namespace gpt_step

int main(int argc, char** argv) {
  return program::run_main(argc, argv, "gpt_step", "Compare a training step of a small GPT with the same step in PyTorch",
                           gpt_step::Options{}, gpt_step::declare, gpt_step::run);
}
