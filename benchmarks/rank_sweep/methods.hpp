#ifndef DYLORA_BENCHMARKS_RANK_SWEEP_METHODS_HPP
#define DYLORA_BENCHMARKS_RANK_SWEEP_METHODS_HPP

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <dylora/analysis/intruders.hpp>
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
#include "rank_sweep/forgetting.hpp"
#include "rank_sweep/report.hpp"
#include "rank_sweep/store.hpp"
#include "rank_sweep/text_task.hpp"

/// Every method of finetune_text on the same text with the same number of trained parameters, and what two of them forget.
namespace rank_sweep {

using nlohmann::json;

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
    const Index budget = finetune::adapt_base(task.base, options({"lora", false, settings.max_rank}, 0, 1))->trained_parameters();
    for (const std::string& name : finetune::method_names()) {
      const bool one_rank = name == "lora" || name == "adalora" || name == "flow";  // by what they are
      for (const bool nested : {false, true}) {
        if (nested ? !one_rank : name != "dylora") methods_.push_back(within_budget({name, nested, settings.max_rank}, budget));
      }
    }
  }

  /// Prints the tables and returns them.
  json run() {
    train();
    const auto [base_loss, base_remembered] = base_losses();
    std::vector<double> shown;
    for (Index rank = 1; rank < settings_.max_rank; rank *= 2) shown.push_back(static_cast<double>(rank));
    std::printf(
        "\n%td steps of %td windows, mean of %d seeds ± half their range; loss without adapter %.4f\n"
        "nested: trained at all ranks in one run by the recommended plan; else at R alone, and cut. trained: parameters, by the whole "
        "run\n\n",
        settings_.steps, task_.windows, settings_.seeds, base_loss);
    print_row("loss at rank", shown, "%8.0f", "       R        ±     R  trained    rate");
    json report{{"base_loss", base_loss}, {"base_loss_remembered", base_remembered}, {"methods", json::array()}};
    for (const bool nested : {false, true}) {
      for (const Method& method : methods_) {
        if (method.nested == nested) report["methods"].push_back(row(method, shown));
      }
      std::printf("\n");
    }
    std::printf("* a rate is at the end of the grid\n");
    std::printf(
        "\nwhat is forgotten: loss on the text of pretraining (%.4f before), and the intruder dimensions of all adapted weights together, "
        "of "
        "%td that are looked at in each\n\n",
        base_remembered, IntruderOptions{}.top);
    for (const Method& method : methods_) {
      if (forgets(method)) report["forgetting"].push_back(forgetting(method));
    }
    return report;
  }

 private:
  struct Method {
    std::string name;
    bool nested;  ///< trained at all ranks, or at the largest alone
    Index max_rank;
    Index parameters = 0;
    double rate = 0;
    bool edge = false;  ///< the rate is the smallest or the largest of the grid: there may be a better one beyond
  };

  static bool forgets(const Method& method) { return method.name == "dylora" || method.name == "lora"; }

  finetune::Options options(const Method& method, double lr, int seed) const {
    finetune::Options o;
    o.method = method.name;
    o.sampler = method.nested ? "recommended" : "fixed";
    o.quiet = true;
    o.context = task_.base.config.context;
    o.max_rank = method.max_rank;
    o = finetune::for_method(o, [](const std::string&) { return false; });
    const auto rank = static_cast<double>(method.max_rank);
    o.alpha = 2 * (o.scale == "sqrt-rank" ? std::sqrt(rank) : rank);  // with all components, every method has the same scale
    o.steps = settings_.steps;
    o.batch = task_.windows;
    o.lr = lr;
    o.seed = static_cast<std::uint64_t>(1000 * seed);
    return o;
  }

  /// At the largest rank whose trained parameters are no more than 2 % above those of a LoRA, or, where they do not depend on it, at the
  /// LoRA's.
  Method within_budget(Method method, Index budget) const {
    const auto parameters = [&](Index rank) {
      Method other = method;
      other.max_rank = rank;
      return finetune::adapt_base(task_.base, options(other, 0, 1))->trained_parameters();
    };
    const Index most = budget + budget / 50;
    method.parameters = parameters(method.max_rank);
    while (method.parameters > most && method.max_rank > 1) method.parameters = parameters(--method.max_rank);
    for (Index more = 0; method.max_rank < task_.base.config.width; method.parameters = more) {
      more = parameters(method.max_rank + 1);
      if (more == method.parameters || more > most) break;
      ++method.max_rank;
    }
    return method;
  }

  std::string key(const Method& method, double lr, int seed) const {
    std::ostringstream key;
    key << "method " << method.name << (method.nested ? ", nested" : "") << ", R " << method.max_rank << ", " << settings_.steps
        << " steps, rate " << lr << ", seed " << seed;
    return key.str();
  }

  const json& stored(const Method& method, double lr, int seed) const { return store_.at(prefix_ + key(method, lr, seed)); }

  /// The ranks that a method is judged at: powers of two, and all of it; every one for what is forgotten; the largest alone if it was
  /// trained at no other and does not order its components.
  static std::vector<Index> judged_ranks(const Method& method) {
    std::vector<Index> ranks;
    for (Index rank = 1; rank < method.max_rank; rank = forgets(method) ? rank + 1 : 2 * rank) {
      if (method.nested || forgets(method) || method.name == "adalora") ranks.push_back(rank);
    }
    ranks.push_back(method.max_rank);
    return ranks;
  }

  json train_one(const Method& method, double lr, int seed) const {
    const finetune::Options o = options(method, lr, seed);
    const auto model = finetune::adapt_base(task_.base, o);
    json result;
    try {
      result["diverged"] = !model->train(o, {}, text_).stopped.empty();
    } catch (const NonFiniteError&) {
      result["diverged"] = true;
    }
    if (result["diverged"]) return result;
    double choosing = 0;
    for (const Index rank : judged_ranks(method)) {
      const RankSlice slice(std::min(rank, model->max_rank()));
      if (method.nested || rank == method.max_rank) choosing += model->loss(task_.choosing, slice);
      result["ranks"].push_back(rank);
      result["judging"].push_back(model->loss(task_.judging, slice));
      if (forgets(method)) result["remembered"].push_back(model->loss(remembered_, slice));
    }
    result["choosing"] = choosing;
    if (forgets(method)) add_intruders(*model, result);
    return result;
  }

  static bool diverged(const json& run) { return run["diverged"] || !run["choosing"].is_number(); }

  /// Each method with the first seed at each rate, then with the others at the best of them on the half for choosing, by the mean over the
  /// ranks that it is judged at and was trained for.
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
        const double loss = diverged(run) ? lowest : run["choosing"].get<double>();
        if (loss < lowest) method.rate = lr;
        lowest = std::min(lowest, loss);
      }
      method.edge = method.rate == settings_.rates.front() || method.rate == settings_.rates.back();
      if (method.rate == 0) continue;
      for (int seed = 2; seed <= settings_.seeds; ++seed) rest.emplace_back(&method, method.rate, seed);
    }
    finish(rest);
  }

  std::pair<double, double> base_losses() const {
    const auto base = finetune::adapt_base(task_.base, options({"lora", false, settings_.max_rank}, 0, 1));
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

  /// Whether there is no rate at which every seed came to its end.
  bool failed(const Method& method) const {
    for (int seed = 1; method.rate > 0 && seed <= settings_.seeds; ++seed) {
      if (diverged(stored(method, method.rate, seed))) return true;
    }
    return method.rate == 0;
  }

  json row(const Method& method, const std::vector<double>& shown) const {
    json report{{"name", method.name}, {"nested", method.nested}, {"max_rank", method.max_rank}, {"parameters", method.parameters}};
    const std::string name = method.name + (method.nested ? ", nested" : "");
    if (failed(method)) {
      std::printf("%-30s  diverged\n", name.c_str());
      report["diverged"] = true;
      return report;
    }
    const std::vector<Index> ranks = stored(method, method.rate, 1)["ranks"].get<std::vector<Index>>();
    const auto losses_at = [&](std::size_t i) {
      return over_seeds(method, [&](const json& run) { return run["judging"][i].get<double>(); });
    };
    std::printf("%-30s", name.c_str());
    for (const double rank : shown) {
      const auto found = std::find(ranks.begin(), ranks.end(), static_cast<Index>(rank));
      if (found == ranks.end() || ranks.back() <= static_cast<Index>(rank)) {
        std::printf("        ");
      } else {
        std::printf("%8.4f", mean(losses_at(static_cast<std::size_t>(found - ranks.begin()))));
      }
    }
    const std::vector<double> all = losses_at(ranks.size() - 1);
    std::printf("%8.4f ± %.4f %5td %8td %7g%s\n", mean(all), (all.back() - all.front()) / 2, method.max_rank, method.parameters,
                method.rate, method.edge ? "*" : "");
    json losses = json::array();
    for (std::size_t i = 0; i < ranks.size(); ++i) losses.push_back(mean(losses_at(i)));
    report.update({{"lr", method.rate},
                   {"at_edge_of_grid", method.edge},
                   {"ranks", ranks},
                   {"losses", losses},
                   {"low", all.front()},
                   {"high", all.back()}});
    return report;
  }

  json forgetting(const Method& method) const {
    if (failed(method)) return {{"name", method.name}, {"diverged", true}};
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
