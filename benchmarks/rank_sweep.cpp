// One DyLoRA run against the search that it replaces: a LoRA trained at each rank, LoRA at the largest rank truncated, and DyLoRA trained
// once in several ways, on the text model of the examples and on a regression with a known answer. Then the rank of each layer under a
// budget.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <dylora/dylora.hpp>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "measure/program.hpp"
#include "program.hpp"
#include "rank_sweep/contender.hpp"
#include "rank_sweep/methods.hpp"
#include "rank_sweep/regression.hpp"
#include "rank_sweep/report.hpp"
#include "rank_sweep/store.hpp"
#include "rank_sweep/text_task.hpp"

namespace rank_sweep {

using nlohmann::json;

constexpr Index heads = 4;

struct Options {
  std::vector<std::string> text, pretrain{DYLORA_EIGEN_INCLUDE_DIR};
  std::string folder = std::string(DYLORA_BUILD_DIR) + "/rank_sweep", base_folder = DYLORA_BUILD_DIR, json;
  Index pretrain_steps = 1200;
  Index width = 64, layers = 2, context = 64, max_rank = 8, windows = 16, steps = 1200, validation = 416;
  std::vector<double> rates{3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2};
  int seeds = 3, workers = 0, rounds = 25;
  bool quick = false, methods = false, fresh = false;
};

void declare(CLI::App& app, Options& o) {
  app.add_flag("--quick", o.quick, "400 steps, two seeds, three rates and three ways of DyLoRA unless told otherwise: within 4 minutes");
  app.add_flag("--methods", o.methods, "Compare all methods of finetune_text instead, at the trained parameters of a LoRA of --max-rank");
  app.add_option("--json", o.json, "Write a report to this file");
  app.add_option("--folder", o.folder, "Where finished runs, the CSV and the picture go; a run that was stopped goes on from there");
  app.add_flag("--fresh", o.fresh, "Forget the finished runs");
  app.add_option("--text", o.text, "Files or folders to adapt to (default: the licence texts of this system)");
  app.add_option("--pretrain", o.pretrain, "Files or folders to pretrain the base on (default: Eigen's headers)");
  app.add_option("--base-folder", o.base_folder, "Where the pretrained base is kept");
  app.add_option("--pretrain-steps", o.pretrain_steps, "Steps of pretraining")->check(CLI::PositiveNumber);
  app.add_option("--steps", o.steps, "Steps of each run")->check(CLI::Range(20, 1000000));
  app.add_option("--windows", o.windows, "Windows in the batch of a step")->check(CLI::Range(16, 4096));
  app.add_option("--rates", o.rates, "The grid of learning rates, the same for every contender; the first seed chooses")
      ->check(CLI::PositiveNumber);
  app.add_option("--seeds", o.seeds, "Seeds")->check(CLI::PositiveNumber);
  app.add_option("--rounds", o.rounds, "Rounds in which the costs are measured in turn")->check(CLI::PositiveNumber);
  app.add_option("--max-rank", o.max_rank, "R")->check(CLI::Range(2, 64));
  app.add_option("--width", o.width, "Width of the model")->check(CLI::Range(4, 4096));
  app.add_option("--layers", o.layers, "Blocks of the model")->check(CLI::Range(1, 64));
  app.add_option("--context", o.context, "Bytes in a window")->check(CLI::Range(1, 4096));
  app.add_option("--validation", o.validation, "Windows of held-out text")->check(CLI::Range(32, 100000));
  app.add_option("--workers", o.workers, "Runs at a time, each on one thread; 0 for as many as there are cores")
      ->check(CLI::NonNegativeNumber);
  for (CLI::Option* option : app.get_options()) {
    if (option->get_expected_max() == 1) option->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);  // what comes later wins
  }
}

/// The runs of contenders at learning rates and seeds.
class Sweep {
 public:
  Sweep(const Options& options, const TextTask& task, Store& store, std::string prefix)
      : options_(options), task_(task), store_(store), prefix_(std::move(prefix)) {}

  /// Every contender with the first seed at each rate of the grid, then with the other seeds at the best of them: the one whose loss on the
  /// half for choosing is lowest in the mean over the ranks it is trained for. Throws std::runtime_error if it diverged at all of them.
  std::vector<Series> run(const std::vector<Contender>& contenders, bool highest_rank_only) {
    std::vector<Entry> grid, rest;
    for (const double lr : options_.rates) {
      for (const Contender& contender : contenders) grid.push_back({&contender, lr, 1});
    }
    finish(grid);
    std::vector<double> rates;
    for (const Contender& contender : contenders) {
      const std::size_t from = highest_rank_only ? static_cast<std::size_t>(contender.max_rank - 1) : 0;
      double lowest = std::numeric_limits<double>::infinity(), best = 0;
      for (const double lr : options_.rates) {
        const auto losses = numbers(stored({&contender, lr, 1}).at("choosing"));
        const double sum = std::accumulate(losses.begin() + static_cast<std::ptrdiff_t>(from), losses.end(), 0.0);
        if (!(sum < lowest)) continue;
        lowest = sum;
        best = lr;
      }
      if (lowest == std::numeric_limits<double>::infinity()) {
        throw std::runtime_error(contender.name + ": diverged at every learning rate");
      }
      rates.push_back(best);
    }
    return run(contenders, rates);
  }

  /// Every contender with each seed at a rate of its own.
  std::vector<Series> run(const std::vector<Contender>& contenders, const std::vector<double>& rates) {
    std::vector<Entry> entries;
    for (int seed = 1; seed <= options_.seeds; ++seed) {
      for (std::size_t i = 0; i < contenders.size(); ++i) entries.push_back({&contenders[i], rates[i], seed});
    }
    finish(entries);
    std::vector<Series> all;
    for (std::size_t i = 0; i < contenders.size(); ++i) all.push_back(series(contenders[i], rates[i]));
    return all;
  }

 private:
  struct Entry {
    const Contender* contender;
    double lr;
    int seed;
  };

  void finish(const std::vector<Entry>& entries) {
    std::vector<Job> jobs;
    for (const Entry& entry : entries) {
      jobs.push_back({prefix_ + run_name(entry), run_name(entry), [entry, this] {
                        const TextRun run = run_text(task_, *entry.contender, entry.lr, static_cast<std::uint64_t>(entry.seed));
                        return json{{"choosing", run.choosing}, {"judging", run.judging}, {"seconds", run.seconds}, {"flops", run.flops}};
                      }});
    }
    do_jobs(std::move(jobs), store_, options_.workers);
  }

  Series series(const Contender& contender, double lr) const {
    Series result;
    result.name = contender.name;
    result.lr = lr;
    result.edge = lr == options_.rates.front() || lr == options_.rates.back();
    result.steps = contender.steps;
    const auto ranks = static_cast<std::size_t>(contender.max_rank);
    result.mean.assign(ranks, 0);
    result.low.assign(ranks, std::numeric_limits<double>::infinity());
    result.high.assign(ranks, 0);
    for (int seed = 1; seed <= options_.seeds; ++seed) {
      const json& run = stored({&contender, lr, seed});
      const auto losses = numbers(run.at("judging"));
      for (std::size_t i = 0; i < ranks; ++i) {
        result.mean[i] += losses[i] / options_.seeds;
        result.low[i] = std::min(result.low[i], losses[i]);
        result.high[i] = std::max(result.high[i], losses[i]);
      }
      result.seconds += run.at("seconds").get<double>() / options_.seeds;
      result.flops += run.at("flops").get<double>() / options_.seeds;
    }
    return result;
  }

  static std::string run_name(const Entry& entry) {
    std::ostringstream name;
    name << entry.contender->name << ", " << entry.contender->steps << " steps, rate " << entry.lr << ", seed " << entry.seed;
    return name.str();
  }

  const json& stored(const Entry& entry) const { return store_.at(prefix_ + run_name(entry)); }

  /// JSON has no infinity: a diverged run is stored with nulls.
  static std::vector<double> numbers(const json& values) {
    std::vector<double> result;
    for (const json& value : values) result.push_back(value.is_number() ? value.get<double>() : std::numeric_limits<double>::infinity());
    return result;
  }

  const Options& options_;
  const TextTask& task_;
  Store& store_;
  std::string prefix_;
};

/// Per-layer ranks of the recommended contender at the parameters of uniform rank R/2: chosen on training text and the half for choosing,
/// since a search among many choices fits a little text too well, and judged on the other half.
json per_layer(const TextTask& task, const Contender& contender, double lr, std::uint64_t seed) {
  TextRun taken;
  auto model = train_text(task, contender, lr, seed, taken);
  if (!model) throw std::runtime_error(contender.name + ": diverged at its best rate");
  TextTask::Model::Cache cache;
  const Index uniform = contender.max_rank / 2;
  const auto adapters = adapter_ranks(*model);
  const double budget = total_cost(adapters, uniform, parameters_per_component);
  auto seen = text::spread_batches(task.corpus.training, 512, 16, task.base.config.context);
  seen.insert(seen.end(), task.choosing.begin(), task.choosing.end());
  const RankSearch search = search_ranks(*model, {.budget = budget, .tried_exchanges = 24},
                                         [&] { return text::mean_loss(*model, seen, contender.max_rank, cache); });
  json curve = json::array(), ranks;
  for (const RankChoice& point : search.curve) curve.push_back({{"parameters", point.cost}, {"loss", point.loss}});
  for (std::size_t i = 0; i < adapters.size(); ++i) ranks[adapters[i].name] = search.best.ranks[i];
  const double uniform_loss = text::mean_loss(*model, task.judging, uniform, cache),
               uniform_seen = text::mean_loss(*model, seen, uniform, cache);
  truncate_each(*model, search.best.ranks);
  return {{"uniform_loss", uniform_loss},
          {"chosen_loss", text::mean_loss(*model, task.judging, contender.max_rank, cache)},
          {"uniform_loss_seen", uniform_seen},
          {"chosen_loss_seen", search.best.loss},
          {"uniform_parameters", budget},
          {"parameters", search.best.cost},
          {"evaluations", search.evaluations},
          {"ranks", ranks},
          {"curve", curve}};
}

/// What a run of the contender costs beside the runs of all LoRAs: in one process, on one thread, taking turns, since minutes apart the
/// same work may take very different times on a machine that others use. All by round and sorted.
struct Cost {
  std::vector<double> run, search;   ///< seconds of the contender's steps, and of the same steps of all LoRAs together
  std::vector<double> step_ratio;    ///< a step of the contender over one of the last LoRA
  std::vector<double> search_ratio;  ///< the steps of all LoRAs over those of the contender

  static double median(const std::vector<double>& sorted) { return sorted[sorted.size() / 2]; }
};

Cost measure_cost(const TextTask& task, const Contender& contender, const std::vector<Contender>& loras, int rounds) {
  text::use_threads(1);
  constexpr Index steps = 24;
  // A measure takes its steps evenly from the whole run, so that every phase of a plan is in it.
  const auto seconds = [&](Contender chosen, int round) {
    const Index whole = chosen.steps;
    chosen.plan = [plan = chosen.plan, whole](Index step, Rng& rng) { return plan(step * whole / steps, rng); };
    chosen.steps = steps;
    chosen.ordered_before = 0;
    TextRun taken;
    (void)train_text(task, chosen, 1e-3, static_cast<std::uint64_t>(round + 1), taken);
    return taken.seconds * static_cast<double>(whole) / static_cast<double>(steps);
  };
  Cost cost;
  (void)seconds(contender, 0);  // warms up
  for (int round = 0; round < rounds; ++round) {
    const double run = seconds(contender, round);
    double search = 0, last = 0;
    for (const Contender& lora : loras) search += last = seconds(lora, round);
    cost.run.push_back(run);
    cost.search.push_back(search);
    cost.step_ratio.push_back(run / last);
    cost.search_ratio.push_back(search / run);
  }
  for (auto* values : {&cost.run, &cost.search, &cost.step_ratio, &cost.search_ratio}) std::sort(values->begin(), values->end());
  return cost;
}

json regression(const Options& o, const std::vector<Contender>& searched, const std::vector<Contender>& dyloras) {
  // The mean over the seeds, at the rate that is best for the first.
  const auto best = [&](const Contender& contender, Index from) {
    double chosen = o.rates.front(), lowest = std::numeric_limits<double>::infinity();
    for (const double lr : o.rates) {
      const auto errors = Regression(1).errors(contender, lr, 1);
      const double sum = std::accumulate(errors.begin() + (from - 1), errors.end(), 0.0);
      if (!(sum < lowest)) continue;
      lowest = sum;
      chosen = lr;
    }
    std::vector<double> mean(static_cast<std::size_t>(contender.max_rank), 0);
    for (int seed = 1; seed <= o.seeds; ++seed) {
      const auto errors = Regression(static_cast<std::uint64_t>(seed)).errors(contender, chosen, static_cast<std::uint64_t>(seed));
      for (std::size_t i = 0; i < mean.size(); ++i) mean[i] += errors[i] / o.seeds;
    }
    return mean;
  };
  std::printf("\nregression with a known answer: error over that of the best approximation at each rank (1 is perfect)\n");
  std::vector<double> dedicated;
  for (const Contender& lora : searched) dedicated.push_back(best(lora, lora.max_rank).back());
  json report{{"dedicated", dedicated}};
  print_row("LoRA at each rank", dedicated, "%8.3f");
  report["truncated"] = best(searched.back(), o.max_rank);
  print_row("LoRA r=" + std::to_string(o.max_rank) + ", truncated", report["truncated"], "%8.3f");
  for (const Contender& contender : dyloras) {
    const auto errors = best(contender, 1);
    print_row(contender.name, errors, "%8.3f");
    report["dylora"].push_back({{"name", contender.name}, {"errors", errors}});
  }
  return report;
}

Index windows_of(const std::vector<text::Batch>& batches) {
  Index windows = 0;
  for (const text::Batch& batch : batches) windows += batch.sequences.count();
  return windows;
}

/// Everything besides the contender, the rate and the seed that a run depends on; the program itself included, as its checksum.
std::string prefix_of(const Options& o, const TextTask& task, const std::string& program) {
  std::ostringstream key;
  std::string code;
  for (const std::string& path : {std::string("/proc/self/exe"), program}) {
    if (code.empty() && std::filesystem::is_regular_file(path)) code = text::read_file(path);
  }
  if (code.empty()) std::printf("note: finished runs of an older program are not told from those of this one; --fresh forgets them\n");
  key << std::hex << text::checksum(code.data(), code.size()) << ' '
      << text::checksum((task.corpus.training + task.corpus.validation).data(), task.corpus.bytes()) << ' '
      << text::checksum(reinterpret_cast<const char*>(task.base.token_embedding.data()),
                        sizeof(float) * static_cast<std::size_t>(task.base.token_embedding.size()))
      << std::dec << " windows " << o.windows << " validation " << o.validation << " R " << o.max_rank << ": ";
  return key.str();
}

void write_json(const std::string& path, const json& report) {
  std::ofstream out(path);
  if (!(out << report.dump(2) << '\n') || !out.flush()) throw std::runtime_error("cannot write " + path);
}

void run(Options o, const CLI::App& app, const std::string& program) {
  const auto start = std::chrono::steady_clock::now();
  if (o.quick) {
    measure::unless_told(app, "--steps", o.steps, 400);
    measure::unless_told(app, "--seeds", o.seeds, 2);
    measure::unless_told(app, "--rates", o.rates, {6e-3, 1.2e-2, 2.4e-2});
  }
  std::sort(o.rates.begin(), o.rates.end());
  if (o.workers == 0) o.workers = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  if (o.width % heads != 0 || o.max_rank > o.width) {
    throw std::invalid_argument("--width: expected a multiple of " + std::to_string(heads) + ", at least --max-rank " +
                                std::to_string(o.max_rank) + ", got " + std::to_string(o.width));
  }
  if (!o.json.empty() && !std::ofstream(o.json, std::ios::app)) throw std::runtime_error("cannot write " + o.json);  // before the work
  std::filesystem::create_directories(o.folder);
  const std::filesystem::path folder = o.folder;
  if (o.fresh) std::filesystem::remove(folder / "runs.jsonl");

  const std::vector<std::string> paths = o.text.empty() ? text::default_text(DYLORA_OWN_TEXT) : o.text;
  const text::PretrainOptions pretrain{.config = {.context = o.context, .width = o.width, .layers = o.layers, .heads = heads},
                                       .steps = o.pretrain_steps};
  const text::Corpus source = text::read_corpus(o.pretrain, o.context);
  const TextTask task(text::pretrained_base(o.base_folder, pretrain, source), text::read_corpus(paths, o.context), o.windows, o.validation);
  Store store(folder / "runs.jsonl");
  const std::string prefix = prefix_of(o, task, program);

  if (o.methods) {
    const json report = MethodComparison(task, text::spread_batches(source.validation, o.validation, 16, o.context),
                                         {o.max_rank, o.steps, o.rates, o.seeds, o.workers}, store, prefix)
                            .run();
    if (!o.json.empty()) write_json(o.json, report);
    return;
  }

  std::vector<Contender> searched;
  for (Index rank = 1; rank <= o.max_rank; ++rank) searched.push_back(lora(rank, o.steps));
  const std::vector<Contender> cut = truncated_loras(o.max_rank, o.steps), methods = dyloras(o.max_rank, o.steps, o.quick);
  std::vector<Contender> longer;
  if (!o.quick) longer = {recommended(o.max_rank, o.steps, 2), recommended(o.max_rank, o.steps, 3), recommended(o.max_rank, o.steps, 4)};

  Sweep sweep(o, task, store, prefix);
  const std::vector<Series> dedicated_runs = sweep.run(searched, true), method_runs = sweep.run(methods, false);
  const auto chosen = static_cast<std::size_t>(
      std::find_if(methods.begin(), methods.end(), [](const Contender& c) { return c.name == "recommended"; }) - methods.begin());
  const Contender& recommended_method = methods[chosen];
  const Series& recommended_series = method_runs[chosen];
  const double top_rate = dedicated_runs.back().lr;  // cut LoRAs are the same training
  const std::vector<Series> cut_runs = sweep.run(cut, std::vector<double>(cut.size(), top_rate));
  const std::vector<Series> longer_runs = sweep.run(longer, std::vector<double>(longer.size(), recommended_series.lr));

  TextTask::Model::Cache cache;
  const double base = text::mean_loss(task.adapted(searched.back(), 1), task.judging, RankSlice::none(), cache);
  Series truncated = dedicated_runs.back(), dedicated;
  truncated.name += ", truncated";
  dedicated.name = "LoRA at each rank";
  double search_flops = 0;
  json dedicated_rates = json::array(), dedicated_edges = json::array();
  for (const Series& one : dedicated_runs) {
    dedicated.mean.push_back(one.mean.back());
    dedicated.low.push_back(one.low.back());
    dedicated.high.push_back(one.high.back());
    dedicated_rates.push_back(one.lr);
    dedicated_edges.push_back(one.edge);
    dedicated.edge = dedicated.edge || one.edge;
    search_flops += one.flops;
  }
  const Cost cost = measure_cost(task, recommended_method, searched, o.rounds);
  std::vector<Series> series{dedicated, truncated};
  series.insert(series.end(), cut_runs.begin(), cut_runs.end());
  const std::size_t first_method = series.size();
  series.insert(series.end(), method_runs.begin(), method_runs.end());
  series.insert(series.end(), longer_runs.begin(), longer_runs.end());

  std::vector<Job> jobs;
  const auto layer_key = [&](int seed) {
    std::ostringstream key;
    key << prefix << "ranks per layer, " << recommended_method.name << ", " << o.steps << " steps, rate " << recommended_series.lr
        << ", seed " << seed;
    return key.str();
  };
  for (int seed = 1; seed <= o.seeds; ++seed) {
    jobs.push_back({layer_key(seed), "ranks per layer, seed " + std::to_string(seed),
                    [&, seed] { return per_layer(task, recommended_method, recommended_series.lr, static_cast<std::uint64_t>(seed)); }});
  }
  do_jobs(std::move(jobs), store, o.workers);

  std::printf(
      "\n%td × %td GPT, %td steps of %td windows of %td bytes, %d seeds; loss on %td windows of held-out text, without "
      "adapter %.4f\n\n",
      o.layers, o.width, o.steps, o.windows, o.context, o.seeds, windows_of(task.judging), base);
  std::vector<double> ranks;
  for (Index rank = 1; rank <= o.max_rank; ++rank) ranks.push_back(static_cast<double>(rank));
  const auto ending = [](const Series& s) {
    std::ostringstream end;
    if (s.lr > 0) end << "   " << s.lr;
    if (s.edge) end << (s.lr > 0 ? "*" : "   *");
    return end.str();
  };
  print_row("loss at rank", ranks, "%8.0f", "   rate");
  for (const Series& s : series) print_row(s.name, s.mean, "%8.4f", ending(s));
  std::printf("\n");
  print_row("± half the range over seeds", ranks, "%8.0f");
  for (const Series& s : series) {
    std::vector<double> spread;
    for (std::size_t i = 0; i < s.mean.size(); ++i) spread.push_back((s.high[i] - s.low[i]) / 2);
    print_row(s.name, spread, "%8.4f");
  }
  std::printf("\n");
  print_row("% of the dedicated gain", ranks, "%8.0f", "   lowest   seconds");
  json dylora_report = json::array(), truncated_report = json::array();
  for (std::size_t i = 1; i < series.size(); ++i) {
    const Series& s = series[i];
    const auto shares = gain_share(base, s, dedicated);
    char end[64];
    std::snprintf(end, sizeof end, "  %7.1f  %8.2f", 100 * *std::min_element(shares.begin(), shares.end()), s.seconds);
    std::vector<double> percent;
    for (const double one : shares) percent.push_back(100 * one);
    print_row(s.name, percent, "%8.1f", end);
    (i < first_method ? truncated_report : dylora_report)
        .push_back({{"name", s.name},
                    {"losses", s.mean},
                    {"low", s.low},
                    {"high", s.high},
                    {"gain_share", shares},
                    {"seconds", s.name == recommended_method.name ? Cost::median(cost.run) : s.seconds},
                    {"seconds_as_run", s.seconds},
                    {"steps", s.steps},
                    {"flops", s.flops},
                    {"lr", s.lr},
                    {"at_edge_of_grid", s.edge}});
  }
  std::printf("* a rate is at the end of the grid; several times the steps: at the rate of the single run\n");

  const auto three = [](const std::vector<double>& sorted) {
    return json{{"median", Cost::median(sorted)}, {"low", sorted.front()}, {"high", sorted.back()}};
  };
  std::printf(
      "\nthe search, %td LoRA runs: %.1f s and %.3g flops; one recommended run: %.1f s and %.3g flops (in turn, one process, one thread)\n",
      o.max_rank, Cost::median(cost.search), search_flops, Cost::median(cost.run), recommended_series.flops);
  std::printf(
      "the search over one run: %.2f (%.2f to %.2f) in time, %.2f in flops; a step over a LoRA step at rank %td: %.3f (%.3f to %.3f)\n",
      Cost::median(cost.search_ratio), cost.search_ratio.front(), cost.search_ratio.back(), search_flops / recommended_series.flops,
      o.max_rank, Cost::median(cost.step_ratio), cost.step_ratio.front(), cost.step_ratio.back());

  json layers{{"seeds", json::array()}};
  double uniform_loss = 0, chosen_loss = 0, parameters = 0, allowed = 0;
  for (int seed = 1; seed <= o.seeds; ++seed) {
    const json& one = store.at(layer_key(seed));
    layers["seeds"].push_back(one);
    uniform_loss += one["uniform_loss"].get<double>() / o.seeds;
    chosen_loss += one["chosen_loss"].get<double>() / o.seeds;
    parameters += one["parameters"].get<double>() / o.seeds;
    allowed = one["uniform_parameters"].get<double>();
  }
  layers.update(
      {{"uniform_loss", uniform_loss}, {"chosen_loss", chosen_loss}, {"parameters", parameters}, {"uniform_parameters", allowed}});
  std::printf("ranks per layer at the %.0f parameters of uniform rank %td: loss %.4f with %.0f parameters, uniform %.4f\n", allowed,
              o.max_rank / 2, chosen_loss, parameters, uniform_loss);

  const json known_answer = regression(o, searched, methods);

  write_csv(folder / "rank_sweep.csv", base, series);
  std::printf("\ntable: %s\n", (folder / "rank_sweep.csv").string().c_str());
  draw(folder, base, series);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("%.0f s\n", seconds);
  if (!o.json.empty()) {
    const json report{{"base_loss", base},
                      {"lora_truncated", truncated.mean},
                      {"lora_truncated_ways", truncated_report},
                      {"lora_dedicated", dedicated.mean},
                      {"lora_dedicated_low", dedicated.low},
                      {"lora_dedicated_high", dedicated.high},
                      {"lora_dedicated_at_edge_of_grid", dedicated_edges},
                      {"lora_dedicated_lr", dedicated_rates},
                      {"dylora", dylora_report},
                      {"recommended", recommended_method.name},
                      {"search_seconds", Cost::median(cost.search)},
                      {"search_flops", search_flops},
                      {"search_over_one_run", three(cost.search_ratio)},
                      {"step_over_lora_step", three(cost.step_ratio)},
                      {"per_layer", layers},
                      {"regression", known_answer},
                      {"settings",
                       {{"steps", o.steps},
                        {"windows", o.windows},
                        {"context", o.context},
                        {"width", o.width},
                        {"layers", o.layers},
                        {"max_rank", o.max_rank},
                        {"seeds", o.seeds},
                        {"windows_choosing", windows_of(task.choosing)},
                        {"windows_judging", windows_of(task.judging)},
                        {"rates", o.rates},
                        {"workers", o.workers},
                        {"text", paths},
                        {"pretrain", o.pretrain}}},
                      {"seconds", seconds}};
    write_json(o.json, report);
  }
}

}  // namespace rank_sweep

int main(int argc, char** argv) {
  return program::run_main(argc, argv, "rank_sweep", "Compare what one DyLoRA run gives at every rank with a LoRA trained at each",
                           rank_sweep::Options{}, rank_sweep::declare,
                           [&](const rank_sweep::Options& options, const CLI::App& app) { rank_sweep::run(options, app, argv[0]); });
}
