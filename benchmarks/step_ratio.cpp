// What an adapted linear layer costs beside its frozen weight alone, and that weight's products beside those of other libraries.
//
// A step is a forward and a backward of one Linear<float>; a frozen pair is its weight's part of it, y = W x and dx = Wᵀ dy. All contenders
// over a shape take turns, at every number of threads.

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
#include <utility>
#include <vector>

#include "measure/program.hpp"
#include "measure/report.hpp"
#include "measure/turns.hpp"
#include "peers/sgemm.hpp"
#include "peers/torch_peer.hpp"
#include "program.hpp"
#include "step_ratio/layer.hpp"
#include "step_ratio/read.hpp"
#include "text/platform.hpp"

namespace step_ratio {

using measure::at_least;
using measure::at_most;
using measure::Ratio;
using measure::ratio;
using Goal = std::optional<measure::Goal>;
using Seconds = std::vector<double>;  // of each round

constexpr Index ranks[] = {1, 8, 64}, max_rank = 64;
constexpr int goal_threads = 2;

/// How the ratios of a step are to be on two threads.
struct StepGoals {
  Goal over_best = std::nullopt;    ///< rank 8 over the best library's frozen pair
  Goal over_own = std::nullopt;     ///< rank 1 over our own frozen pair
  Goal growth = std::nullopt;       ///< rank 64 over rank 8, over the same ratio of flops: at most 1 if no rank costs more than its share
  Goal speedup = at_least(1.8);     ///< rank 8 on one thread over two
  Goal torch = at_least(2);         ///< PyTorch's rank 8 over ours
  Goal over_eigen = at_most(1.03);  ///< our own frozen pair over Eigen's: the price of the same bits on any number of threads
};

struct Step {
  Shape shape;
  StepGoals goals;
};

const std::vector<Step> steps{
    {{64, 64, 64}, {.over_best = at_most(1.5), .speedup = std::nullopt, .torch = at_least(4)}},
    {{256, 256, 64}, {.over_best = at_most(1.25), .torch = at_least(4)}},
    {{768, 768, 512}, {.over_best = at_most(1.1)}},
    {{1024, 1024, 512}, {.over_best = at_most(1.1), .over_own = at_most(1.02), .growth = at_most(1)}},
    {{1024, 4096, 512}, {.over_best = at_most(1.1)}},
    {{4096, 4096, 512}, {.over_best = at_most(1.1)}},
};
const std::vector<Shape> forwards{{1024, 1024, 1}, {1024, 1024, 8}, {4096, 4096, 1}, {4096, 4096, 8}};
const Shape largest_token{4096, 4096, 1};
const Goal reading = at_least(0.85);

struct Options : measure::ShapeOptions {
  std::string openblas_core;
  bool alone = false;
};

void declare(CLI::App& app, Options& o) {
  measure::declare(app, o, "1024x512");
  app.add_flag("--alone", o.alone, "Look for no library but Eigen, which is always there");
  app.add_option("--openblas-core", o.openblas_core,
                 "The processor whose kernels OpenBLAS uses (default: the widest that this one can run)");
}

bool faster(const Seconds& a, const Seconds& b) { return measure::median(a) < measure::median(b); }

/// What each contender took at one number of threads.
struct Times {
  std::vector<Seconds> libraries;
  Seconds own, torch;
  std::map<Index, Seconds> adapted;  ///< by rank

  std::size_t best_library() const {
    return static_cast<std::size_t>(std::min_element(libraries.begin(), libraries.end(), faster) - libraries.begin());
  }
};

class Benchmark {
 public:
  explicit Benchmark(const Options& options) : o_(options), report_(measure::begin_report(options.rows)) { find_peers(); }

  void run() {
    for (const auto& [shape, goals] : o_.quick ? std::vector<Step>{{{64, 64, 8}, {}}, {{64, 128, 8}, {}}} : steps) {
      if (wanted(shape)) compare_steps(shape, goals);
    }
    for (const Shape& shape : o_.quick ? std::vector<Shape>{{64, 64, 1}} : forwards) {
      if (wanted(shape)) compare_forwards(shape);
    }
    const Shape token = o_.quick ? Shape{64, 64, 1} : largest_token;
    if (wanted(token)) {
      compare_with_reading<MatrixX<float>>(token, "column-major");
      compare_with_reading<RowMatrix<float>>(token, "row-major");
    }
    measure::end_report(report_, o_.rows);
  }

 private:
  void find_peers() {
    const auto tell = [](const std::string& name, const std::string& of) { std::fprintf(stderr, "%s: %s\n", name.c_str(), of.c_str()); };
    libraries_.push_back(peers::eigen());
    tell("Eigen", libraries_.front().version);
    if (o_.alone) return;
    const std::pair<std::string, std::optional<peers::Library>> others[] = {{"oneDNN", peers::onednn()},
                                                                            {"OpenBLAS", peers::openblas(o_.openblas_core)}};
    for (const auto& [name, library] : others) {
      tell(name, library ? library->version : "skipped, not found");
      if (library) libraries_.push_back(*library);
    }
    torch_ = peers::TorchPeer::start();
    tell("PyTorch", torch_ ? torch_->version() : "skipped, not found");
  }

  bool wanted(const Shape& shape) const {
    const auto named = [&](const std::string& part) { return shape.name().find(part) != std::string::npos; };
    return o_.shapes.empty() || std::any_of(o_.shapes.begin(), o_.shapes.end(), named);
  }

  void add(const std::string& what, const Shape& shape, Index rank, int threads, const Ratio& ratio, const Goal& goal = std::nullopt) {
    report_.add({what, shape.name(), static_cast<int>(rank), threads, ratio, threads == goal_threads ? goal : std::nullopt});
  }

  void compare_steps(const Shape& shape, const StepGoals& goals) {
    Layer layer(shape, max_rank, Rng(1));
    const auto times = take_turns(layer.step(), [&](int threads) { return torch_step(shape, threads); });
    for (const auto& [threads, t] : times) {
      tell_speeds(shape, threads, t);
      compare_adapted({"adapted step over the best library's frozen pair: ", "adapted step over our own frozen pair"}, shape, threads, t,
                      goals.over_best, goals.over_own);
      add("growth of the step from rank 8 to 64 over that of its flops", shape, 64, threads,
          ratio(t.adapted.at(64), t.adapted.at(8)) * (shape.step_flops(8) / shape.step_flops(64)), goals.growth);
      add("our own frozen pair over Eigen's", shape, 0, threads, ratio(t.own, t.libraries.front()), goals.over_eigen);
      if (torch_) add("PyTorch's LoRA step over ours", shape, 8, threads, ratio(t.torch, t.adapted.at(8)), goals.torch);
      if (threads == 1 || !times.contains(1)) continue;
      add("adapted step on one thread over this many", shape, 8, threads, ratio(times.at(1).adapted.at(8), t.adapted.at(8)), goals.speedup);
    }
  }

  void compare_forwards(const Shape& shape) {
    Layer layer(shape, max_rank, Rng(1));
    for (const auto& [threads, t] : take_turns(layer.forward())) {
      compare_adapted({"adapted forward over the best library's frozen one: ", "adapted forward over our own frozen one"}, shape, threads,
                      t);
    }
  }

  struct Names {
    std::string over_best, over_own;
  };

  void compare_adapted(const Names& what, const Shape& shape, int threads, const Times& t, const Goal& over_best = std::nullopt,
                       const Goal& over_own = std::nullopt) {
    const std::size_t best = t.best_library();
    for (const auto& [rank, seconds] : t.adapted) {
      add(what.over_best + libraries_[best].name, shape, rank, threads, ratio(seconds, t.libraries[best]),
          rank == 8 ? over_best : std::nullopt);
    }
    for (const auto& [rank, seconds] : t.adapted) {
      add(what.over_own, shape, rank, threads, ratio(seconds, t.own), rank == 1 ? over_own : std::nullopt);
    }
  }

  /// One token's forward has little to do but read its weight: how near does it come to the pace at which that can be read?
  template <class Storage>
  void compare_with_reading(const Shape& shape, const std::string& order) {
    Rng rng(1);
    const auto layer = adapted<Storage>(shape, 8, rng);
    const MatrixX<float> x = random_uniform<float>(shape.in, shape.tokens, 0.5, rng);
    MatrixX<float> y(shape.out, shape.tokens);
    typename decltype(adapted<Storage>(shape, 8, rng))::Cache cache;
    for (const int threads : o_.threads) {
      text::use_threads(threads);
      std::vector<measure::Contender> contenders{{"forward", measure::timed([&] { layer.apply(x, 8, cache, y); }, o_.seconds)}};
      for (const auto& way : ways_to_read(layer.base.W.data(), layer.base.W.size(), threads)) {
        contenders.push_back({"reading", measure::timed(way, o_.seconds)});
      }
      const auto seconds = measure::take_turns(contenders, o_.rows.rounds);
      const Seconds& fastest = *std::min_element(seconds.begin() + 1, seconds.end(), faster);
      add("reading W, " + order + ", over the adapted forward", shape, 8, threads, ratio(fastest, seconds.front()), reading);
    }
  }

  /// All contenders in turn; what they took, by number of threads.
  std::map<int, Times> take_turns(const Work& work, const std::function<std::function<double()>(int threads)>& torch = nullptr) const {
    std::map<int, Times> times;
    std::vector<measure::Contender> contenders;
    std::vector<Seconds*> results;
    const auto enter = [&](Seconds& result, const std::string& name, std::function<double()> round) {
      contenders.push_back({name, std::move(round)});
      results.push_back(&result);
    };
    for (const int threads : o_.threads) {
      const auto on_threads = [&](auto use_threads, std::function<void()> call) {
        return [use_threads, threads, round = measure::timed(std::move(call), o_.seconds)] {
          use_threads(threads);
          return round();
        };
      };
      Times& t = times[threads];
      t.libraries.resize(libraries_.size());
      for (std::size_t i = 0; i < libraries_.size(); ++i) {
        const peers::Library& library = libraries_[i];
        enter(t.libraries[i], library.name, on_threads(library.use_threads, [&] { work.library(library); }));
      }
      enter(t.own, "own", on_threads(text::use_threads, work.own));
      for (const Index rank : ranks) {
        enter(t.adapted[rank], "adapted", on_threads(text::use_threads, [&work, rank] { work.adapted(rank); }));
      }
      if (torch && torch_) enter(t.torch, "PyTorch", torch(threads));
    }
    const auto seconds = measure::take_turns(contenders, o_.rows.rounds);
    for (std::size_t i = 0; i < seconds.size(); ++i) *results[i] = seconds[i];
    return times;
  }

  /// A round of PyTorch's step at rank 8, once it has shown that it computes the same.
  std::function<double()> torch_step(const Shape& shape, int threads) const {
    const auto reply = torch_->ask(
        {{"do", "linear"}, {"in", shape.in}, {"out", shape.out}, {"tokens", shape.tokens}, {"rank", 8}, {"threads", threads}, {"seed", 1}});
    for (const auto& [name, norm] : Layer(shape, 8, Rng(1)).norms(8)) {
      const double theirs = reply.at("norms").at(name);
      if (!(std::abs(theirs - norm) <= 1e-3 * norm)) {
        throw std::runtime_error("PyTorch's step is not ours: norm of " + name + ": " + std::to_string(theirs) + ", ours " +
                                 std::to_string(norm));
      }
    }
    return [torch = torch_, request = nlohmann::json{{"do", "repeat"}, {"id", reply.at("id")}, {"seconds", o_.seconds}}] {
      return torch->seconds(request);
    };
  }

  void tell_speeds(const Shape& shape, int threads, const Times& t) const {
    const auto tell = [&](const std::string& name, const Seconds& seconds) {
      std::fprintf(stderr, " %s %.0f", name.c_str(), shape.step_flops(0) / measure::median(seconds) / 1e9);
    };
    std::fprintf(stderr, "%s, %d threads, Gflop/s of the frozen pair:", shape.name().c_str(), threads);
    for (std::size_t i = 0; i < libraries_.size(); ++i) tell(libraries_[i].name, t.libraries[i]);
    tell("ours", t.own);
    std::fprintf(stderr, "\n");
  }

  Options o_;
  std::vector<peers::Library> libraries_;
  std::shared_ptr<peers::TorchPeer> torch_;
  measure::Report report_;
};

void run(Options o, const CLI::App& app) {
  measure::shorten_if_quick(app, o);
  Benchmark(o).run();
}

}  // namespace step_ratio

int main(int argc, char** argv) {
  return program::run_main(argc, argv, "step_ratio", "Compare a step of an adapted linear layer with the two products of its frozen weight",
                           step_ratio::Options{}, step_ratio::declare, step_ratio::run);
}
