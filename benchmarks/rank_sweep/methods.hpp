#ifndef DYLORA_BENCHMARKS_RANK_SWEEP_METHODS_HPP
#define DYLORA_BENCHMARKS_RANK_SWEEP_METHODS_HPP

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <dylora/analysis/intruder_dimensions.hpp>
#include <dylora/dylora.hpp>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "finetune/methods.hpp"
#include "finetune/task.hpp"
#include "rank_sweep/contender.hpp"
#include "rank_sweep/report.hpp"
#include "rank_sweep/store.hpp"
#include "rank_sweep/text_task.hpp"

/// Every method of finetune_text on the same text with the same number of trained parameters, and what two of them forget.
namespace rank_sweep {

using nlohmann::json;

/// What a comparison of methods is about.
struct MethodSettings {
  Index max_rank, steps;
  std::vector<double> rates;
  int seeds, workers;
};

class MethodComparison {
 public:
  /// `remembered` are windows of the text that the base was pretrained on, of its held-out part.
  MethodComparison(const TextTask& task, std::vector<text::Batch> remembered, const MethodSettings& settings, Store& store,
                   std::string prefix)
      : task_(task), remembered_(std::move(remembered)), settings_(settings), store_(store), prefix_(std::move(prefix)) {
    text_ = finetune::make_task(task.corpus, finetune::Bytes{}, task.base.config.context);
    const Index budget = finetune::adapt_base(task.base, options("lora", settings.max_rank, 0, 1))->trained_parameters();
    for (const std::string& name : finetune::method_names()) methods_.push_back(within_budget(name, budget));
  }

  /// Prints the tables and returns them.
  json run() {
    train();
    const auto [base_loss, base_remembered] = base_losses();
    std::vector<double> shown;
    for (Index rank = 1; rank < settings_.max_rank; rank *= 2) shown.push_back(static_cast<double>(rank));
    std::printf("\nloss on %td steps of %td windows, %d seeds; without adapter %.4f; the last column is all components\n\n",
                settings_.steps, task_.windows, settings_.seeds, base_loss);
    print_row("loss at rank", shown, "%8.0f", "     all   ±      R  trained    rate  seconds");
    json report{{"base_loss", base_loss}, {"base_loss_remembered", base_remembered}, {"methods", json::array()}};
    for (const Method& method : methods_) report["methods"].push_back(row(method, shown));
    std::printf("* a rate is at the end of the grid\n");
    std::printf(
        "\nwhat is forgotten: loss on the text of pretraining (%.4f before), and the intruder dimensions of all adapted weights together, "
        "of "
        "%td that are looked at in each\n\n",
        base_remembered, IntruderOptions{}.top);
    for (const Method& method : methods_) {
      if (method.name == "dylora" || method.name == "lora") report["forgetting"].push_back(forgetting(method));
    }
    return report;
  }

 private:
  struct Method {
    std::string name;
    Index max_rank;
    Index parameters;
    double rate = 0;
    bool edge = false;  ///< the rate is the smallest or the largest of the grid: there may be a better one beyond
  };

  finetune::Options options(const std::string& method, Index max_rank, double lr, int seed) const {
    finetune::Options o;
    o.method = method;
    o.quiet = true;
    o.context = task_.base.config.context;
    o.max_rank = max_rank;
    o = finetune::for_method(o, false, false);
    const auto rank = static_cast<double>(max_rank);
    o.alpha = 2 * (o.scale == "sqrt-rank" ? std::sqrt(rank) : rank);  // with all components, every method has the same scale
    o.steps = settings_.steps;
    o.batch = task_.windows;
    o.lr = lr;
    o.seed = static_cast<std::uint64_t>(1000 * seed);
    return o;
  }

  /// At the largest rank whose trained parameters are no more than those of a LoRA, or, where they do not depend on it, at the LoRA's.
  Method within_budget(const std::string& name, Index budget) const {
    const auto parameters = [&](Index rank) { return finetune::adapt_base(task_.base, options(name, rank, 0, 1))->trained_parameters(); };
    Index rank = settings_.max_rank, count = parameters(rank);
    while (count > budget && rank > 1) count = parameters(--rank);
    for (Index more = 0; rank < task_.base.config.width; count = more) {
      more = parameters(rank + 1);
      if (more == count || more > budget) break;
      ++rank;
    }
    return {name, rank, count};
  }

  std::string key(const Method& method, double lr, int seed) const {
    std::ostringstream key;
    key << "method " << method.name << ", R " << method.max_rank << ", " << settings_.steps << " steps, rate " << lr << ", seed " << seed;
    return key.str();
  }

  const json& stored(const Method& method, double lr, int seed) const { return store_.at(prefix_ + key(method, lr, seed)); }

  /// The ranks that a method is judged at: powers of two, and all of it.
  static std::vector<Index> judged_ranks(const Method& method, bool every) {
    std::vector<Index> ranks;
    for (Index rank = 1; rank < method.max_rank; rank = every ? rank + 1 : 2 * rank) ranks.push_back(rank);
    ranks.push_back(method.max_rank);
    return ranks;
  }

  json train_one(const Method& method, double lr, int seed) const {
    const auto model = finetune::adapt_base(task_.base, options(method.name, method.max_rank, lr, seed));
    const finetune::Training training = model->train(options(method.name, method.max_rank, lr, seed), {}, text_);
    const bool with_forgetting = method.name == "dylora" || method.name == "lora";
    json result{{"seconds", training.seconds}, {"diverged", !training.stopped.empty()}};
    result["choosing"] = model->loss(task_.choosing, model->max_rank());
    for (const Index rank : judged_ranks(method, with_forgetting)) {
      const RankSlice slice(std::min(rank, model->max_rank()));
      result["ranks"].push_back(rank);
      result["judging"].push_back(model->loss(task_.judging, slice));
      if (with_forgetting) result["remembered"].push_back(model->loss(remembered_, slice));
    }
    if (with_forgetting) add_intruders(*model, result);
    return result;
  }

  static void add_intruders(const finetune::AdaptedModel& model, json& result) {
    const std::vector<Matrix<float>> before = model.merged(RankSlice::none());
    std::vector<BaseSpectrum> spectra;
    for (const Matrix<float>& weight : before) spectra.emplace_back(weight);
    for (const Index rank : result["ranks"]) {
      const std::vector<Matrix<float>> after = model.merged(rank);
      Index count = 0, robust = 0;
      double cosine = 0;
      for (std::size_t i = 0; i < after.size(); ++i) {
        const Intruders found = spectra[i].intruders(after[i], {});
        count += found.count;
        robust += spectra[i].intruders(after[i], {.window = 0.05}).count;
        for (const TunedDirection& direction : found.directions)
          cosine += direction.cosine / static_cast<double>(found.directions.size() * after.size());
      }
      result["intruders"].push_back(count);
      result["intruders_in_windows"].push_back(robust);
      result["mean_cosine"].push_back(cosine);
    }
    result["weights"] = before.size();
  }

  /// Each method with the first seed at each rate, then with the others at the best of them on the half for choosing.
  void train() {
    const auto finish = [&](const auto& runs) {
      std::vector<Job> jobs;
      for (const auto& [method, lr, seed] : runs) {
        jobs.push_back({prefix_ + key(*method, lr, seed), key(*method, lr, seed),
                        [this, method = method, lr = lr, seed = seed] { return train_one(*method, lr, seed); }});
      }
      do_jobs(std::move(jobs), store_, settings_.workers);
    };
    using Run = std::tuple<const Method*, double, int>;
    std::vector<Run> grid, rest;
    for (const Method& method : methods_) {
      for (const double lr : settings_.rates) grid.emplace_back(&method, lr, 1);
    }
    finish(grid);
    for (Method& method : methods_) {
      double lowest = std::numeric_limits<double>::infinity();
      for (const double lr : settings_.rates) {
        const json& run = stored(method, lr, 1);
        const double loss = run["choosing"].is_number() && !run["diverged"] ? run["choosing"].get<double>() : lowest;
        if (loss < lowest) method.rate = lr;
        lowest = std::min(lowest, loss);
      }
      method.edge = method.rate == settings_.rates.front() || method.rate == settings_.rates.back();
      if (method.rate == 0) throw std::runtime_error(method.name + ": diverged at every learning rate");
      for (int seed = 2; seed <= settings_.seeds; ++seed) rest.emplace_back(&method, method.rate, seed);
    }
    finish(rest);
  }

  std::pair<double, double> base_losses() const {
    const auto base = finetune::adapt_base(task_.base, options("lora", settings_.max_rank, 0, 1));
    return {base->loss(task_.judging, RankSlice::none()), base->loss(remembered_, RankSlice::none())};
  }

  /// Over the seeds, of one number of each run.
  template <class Number>
  std::vector<double> over_seeds(const Method& method, Number&& number) const {
    std::vector<double> values;
    for (int seed = 1; seed <= settings_.seeds; ++seed) values.push_back(number(stored(method, method.rate, seed)));
    std::sort(values.begin(), values.end());
    return values;
  }
  static double mean(const std::vector<double>& values) {
    return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
  }

  json row(const Method& method, const std::vector<double>& shown) const {
    const std::vector<Index> ranks = stored(method, method.rate, 1)["ranks"].get<std::vector<Index>>();
    const auto losses_at = [&](std::size_t i) {
      return over_seeds(method, [&](const json& run) { return run["judging"][i].get<double>(); });
    };
    std::string line = method.name + std::string(30 - method.name.size(), ' ');
    char cell[64];
    for (const double rank : shown) {
      const auto found = std::find(ranks.begin(), ranks.end(), static_cast<Index>(rank));
      if (found == ranks.end() || ranks.back() <= static_cast<Index>(rank)) {
        line += std::string(8, ' ');
        continue;
      }
      std::snprintf(cell, sizeof cell, "%8.4f", mean(losses_at(static_cast<std::size_t>(found - ranks.begin()))));
      line += cell;
    }
    const std::vector<double> all = losses_at(ranks.size() - 1);
    const double seconds = mean(over_seeds(method, [](const json& run) { return run["seconds"].get<double>(); }));
    std::printf("%s%8.4f  %.4f %3td %8td %7g%c %7.1f\n", line.c_str(), mean(all), (all.back() - all.front()) / 2, method.max_rank,
                method.parameters, method.rate, method.edge ? '*' : ' ', seconds);
    json losses = json::array();
    for (std::size_t i = 0; i < ranks.size(); ++i) losses.push_back(mean(losses_at(i)));
    return {{"name", method.name},
            {"max_rank", method.max_rank},
            {"parameters", method.parameters},
            {"lr", method.rate},
            {"ranks", ranks},
            {"losses", losses},
            {"low", all.front()},
            {"high", all.back()},
            {"seconds", seconds},
            {"at_edge_of_grid", method.edge}};
  }

  json forgetting(const Method& method) const {
    const json& first = stored(method, method.rate, 1);
    const std::vector<Index> ranks = first["ranks"].get<std::vector<Index>>();
    json report{{"name", method.name}, {"ranks", ranks}, {"weights", first["weights"]}};
    std::vector<double> numbers(ranks.begin(), ranks.end());
    print_row(method.name + ", rank", numbers, "%8.0f");
    const auto line = [&](const char* field, const char* name, const char* format) {
      std::vector<double> means;
      for (std::size_t i = 0; i < ranks.size(); ++i)
        means.push_back(mean(over_seeds(method, [&](const json& run) { return run[field][i].get<double>(); })));
      print_row(name, means, format);
      report[field] = means;
    };
    line("judging", "  loss on the text", "%8.4f");
    line("remembered", "  loss on that of pretraining", "%8.4f");
    line("intruders", "  intruder dimensions", "%8.1f");
    line("intruders_in_windows", "  beyond windows of 5 %", "%8.1f");
    line("mean_cosine", "  mean cosine", "%8.3f");
    std::printf("  of %td weights\n", first["weights"].get<Index>());
    return report;
  }

  const TextTask& task_;
  std::vector<text::Batch> remembered_;
  MethodSettings settings_;
  Store& store_;
  std::string prefix_;
  finetune::Task text_;
  std::vector<Method> methods_;
};

}  // namespace rank_sweep

#endif
