// Pretrains a small byte-level model on source code, adapts it with DyLoRA to other text, and shows the validation loss at every rank
// that this one run gives.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <dylora/dylora.hpp>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gpt/gpt.hpp"
#include "text/base_model.hpp"
#include "text/corpus.hpp"
#include "text/platform.hpp"
#include "text/progress.hpp"
#include "text/training.hpp"

namespace {

using namespace dylora;

using Model = gpt::Gpt<float>;
using Plan = std::function<StepRanks(Index, Rng&)>;

const std::map<std::string, ScaleRule> scale_rules{
    {"rank", alpha_over_rank}, {"sqrt-rank", alpha_over_sqrt_rank}, {"max-rank", alpha_over_max_rank}};
const std::map<std::string, Decay> decays{{"constant", Decay::constant}, {"linear", Decay::linear}, {"cosine", Decay::cosine}};

struct Options {
  std::vector<std::string> text, pretrain{DYLORA_EIGEN_INCLUDE_DIR};
  std::string base_folder = DYLORA_BUILD_DIR, json;

  Index context = 64, width = 128, layers = 3, heads = 4;
  bool untied = false;
  Index pretrain_steps = 1200;
  double pretrain_lr = 2e-3;

  Index max_rank = 8, min_rank = 0, unit = 1;
  double alpha = 16, geometric_p = 0.25;
  std::string scale = "max-rank", sampler = "recommended", mode = "nested", targets = "qkvom";

  Index steps = 800, batch = 32, accumulation = 1, warmup = 40, validation = 256;
  double lr = 1.2e-2, weight_decay = 0, max_norm = 1;
  std::string decay = "cosine", update = "active-only";
  double tolerance = 0.01;
  Index layer_budget = 0;

  std::string prompt = "This License ";
  Index sample_length = 240;
  double temperature = 0.7;

  std::uint64_t seed = 1;
  int threads = 0;
};

/// Declares the command line; every option also goes into the report.
void declare(CLI::App& app, Options& o) {
  app.add_option("--text", o.text, "Files or folders to adapt to (default: the licence texts of this system)");
  app.add_option("--pretrain", o.pretrain, "Files or folders to pretrain the base on (default: Eigen's headers)");
  app.add_option("--base-folder", o.base_folder, "Where the pretrained base is kept");
  app.add_option("--json", o.json, "Write a report to this file");

  app.add_option("--context", o.context, "Tokens in a window")->check(CLI::Range(1, 4096));
  app.add_option("--width", o.width, "Width of the model")->check(CLI::Range(1, 4096));
  app.add_option("--layers", o.layers, "Blocks of the model")->check(CLI::Range(1, 64));
  app.add_option("--heads", o.heads, "Attention heads")->check(CLI::Range(1, 64));
  app.add_flag("--untied", o.untied, "Give the head weights of its own");
  app.add_option("--pretrain-steps", o.pretrain_steps, "Steps of pretraining")->check(CLI::PositiveNumber);
  app.add_option("--pretrain-lr", o.pretrain_lr, "Learning rate of pretraining")->check(CLI::NonNegativeNumber);

  app.add_option("--max-rank", o.max_rank, "R, the components of each adapter")->check(CLI::PositiveNumber);
  app.add_option("--min-rank", o.min_rank, "The lowest rank that is drawn; 0 for the smallest there is")->check(CLI::NonNegativeNumber);
  app.add_option("--alpha", o.alpha, "Numerator of the scale")->check(CLI::PositiveNumber);
  app.add_option("--scale", o.scale, "Denominator of the scale: the rank, its root, or the maximal rank")
      ->check(CLI::IsMember(scale_rules));
  app.add_option(
         "--sampler", o.sampler,
         "How ranks are drawn: one per micro-batch (uniform, as the paper, or geometric), several for parts of each (sandwich, every, "
         "recommended), or --max-rank alone, which is LoRA (fixed)")
      ->check(CLI::IsMember({"recommended", "uniform", "geometric", "sandwich", "every", "fixed"}));
  app.add_option("--geometric-p", o.geometric_p, "The geometric sampler's p")->check(CLI::Range(0.0, 1.0));
  app.add_option("--unit", o.unit, "Components in a block; ranks are multiples of it")->check(CLI::PositiveNumber);
  app.add_option("--mode", o.mode, "Whether all active components learn or the newest block only")
      ->check(CLI::IsMember({"nested", "frozen"}));
  app.add_option("--targets", o.targets, "Which projections are adapted: letters of q k v o and m for the MLP");

  app.add_option("--steps", o.steps, "Steps of adaptation")->check(CLI::PositiveNumber);
  app.add_option("--batch", o.batch, "Windows in a micro-batch")->check(CLI::PositiveNumber);
  app.add_option("--accumulation", o.accumulation, "Micro-batches in a step, each at ranks of its own")->check(CLI::PositiveNumber);
  app.add_option("--lr", o.lr, "Learning rate of adaptation")->check(CLI::NonNegativeNumber);
  app.add_option("--decay", o.decay, "Learning-rate schedule")->check(CLI::IsMember(decays));
  app.add_option("--warmup", o.warmup, "Steps of warm-up")->check(CLI::NonNegativeNumber);
  app.add_option("--weight-decay", o.weight_decay, "Decoupled weight decay")->check(CLI::NonNegativeNumber);
  app.add_option("--max-norm", o.max_norm, "Clip the global gradient norm; 0 never")->check(CLI::NonNegativeNumber);
  app.add_option("--update", o.update, "What a step does to inactive components")->check(CLI::IsMember({"active-only", "dense"}));
  app.add_option("--validation", o.validation, "Windows of held-out text for each loss")->check(CLI::PositiveNumber);

  app.add_option("--tolerance", o.tolerance, "How much worse than the best rank, in nats, the selected one may be")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--layer-budget", o.layer_budget,
                 "After training, give each layer a rank of its own, all together with the parameters of this rank for all; 0 leaves them")
      ->check(CLI::NonNegativeNumber);

  app.add_option("--prompt", o.prompt, "What the samples continue");
  app.add_option("--sample-length", o.sample_length, "Bytes in a sample; 0 for none")->check(CLI::NonNegativeNumber);
  app.add_option("--temperature", o.temperature, "Temperature of the samples")->check(CLI::PositiveNumber);

  app.add_option("--seed", o.seed, "Seed of everything random");
  app.add_option("--threads", o.threads, "Threads; 0 for as many as there are")->check(CLI::NonNegativeNumber);

  for (CLI::Option* option : app.get_options()) {
    if (option->get_expected_max() == 1) option->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);  // what comes later wins
  }
}

/// Which ranks a micro-batch works at, as the options say.
Plan make_plan(const Options& o) {
  if (o.min_rank % o.unit != 0 || o.max_rank % o.unit != 0 || o.min_rank > o.max_rank) {
    throw std::invalid_argument("--min-rank and --max-rank: expected multiples of --unit " + std::to_string(o.unit) +
                                " in that order, got " + std::to_string(o.min_rank) + " and " + std::to_string(o.max_rank));
  }
  const Index lowest = o.sampler == "fixed" ? o.max_rank / o.unit : std::max<Index>(1, o.min_rank / o.unit), highest = o.max_rank / o.unit;
  if (o.sampler == "recommended" || o.sampler == "sandwich" || o.sampler == "every") {
    if (o.unit != 1 || o.mode != "nested" || (o.sampler == "recommended" && lowest != 1)) {
      throw std::invalid_argument("--sampler " + o.sampler + ": expected --unit 1 and --mode nested" +
                                  (o.sampler == "recommended" ? ", and ranks from 1 on" : "") +
                                  " (--sampler uniform takes others), got --unit " + std::to_string(o.unit) + ", --mode " + o.mode +
                                  " and ranks from " + std::to_string(lowest) + " on");
    }
    const Index ranks = highest - lowest + 1,
                parts = o.sampler == "every" ? ranks : std::min<Index>(ranks, o.sampler == "sandwich" ? 4 : 6);
    if (o.batch < parts) {
      throw std::invalid_argument("--batch: expected at least " + std::to_string(parts) + " windows for --sampler " + o.sampler +
                                  ", one for each part, got " + std::to_string(o.batch));
    }
    if (o.sampler == "sandwich") return Sandwich{lowest, highest};
    if (o.sampler == "every") return EveryRank{lowest, highest};
    return recommended_plan(highest, o.steps);
  }
  const auto in_units = [&](auto sampler) -> Plan {
    if (o.mode == "frozen") return FreshRanks{BlockRank{FrozenPrefix{sampler}, o.unit}};
    return FreshRanks{BlockRank{sampler, o.unit}};
  };
  if (o.sampler == "geometric") return in_units(GeometricRank{lowest, highest, o.geometric_p});
  return in_units(UniformRank{lowest, highest});
}

gpt::Targets make_targets(const std::string& letters) {
  if (letters.empty() || letters.find_first_not_of("qkvom") != std::string::npos) {
    throw std::invalid_argument("--targets: expected some of the letters q k v o m, got \"" + letters + '"');
  }
  const auto has = [&](char letter) { return letters.find(letter) != std::string::npos; };
  return {.q = has('q'), .k = has('k'), .v = has('v'), .o = has('o'), .mlp = has('m')};
}

void print_sample(const Model& model, const Options& o, RankSlice rank) {
  Rng rng(o.seed);
  std::string sample = text::continue_text(model, o.prompt, o.sample_length, o.temperature, rank, rng);
  for (char& c : sample) {
    if ((static_cast<unsigned char>(c) < ' ' && c != '\n') || static_cast<unsigned char>(c) > '~') c = '?';
  }
  std::printf("\n--- rank %td: %s%s\n", rank.active, o.prompt.c_str(), sample.c_str());
}

struct Training {
  double seconds = 0, tokens_per_second = 0;
  std::string stopped;  // why it ended early, if it did
};

Training train(Model& model, const Options& o, const Plan& plan, const text::Corpus& corpus, Model::Cache& cache) {
  Rng data_rng(o.seed + 1), rank_rng(o.seed + 2);
  auto gradients = zeros_like(model), current = gradients, good = gradients;  // good: the last parameters seen to give a finite loss
  save_parameters(model, good);
  AdamW optimizer(model, {.beta2 = 0.99,
                          .weight_decay = o.weight_decay,
                          .max_norm = o.max_norm,
                          .update = o.update == "dense" ? Update::dense : Update::active_only});
  const Schedule schedule(decays.at(o.decay), {.peak = o.lr, .steps = o.steps, .warmup_steps = std::min(o.warmup, o.steps)});
  text::Progress progress("adapting", o.steps, o.accumulation * o.batch * o.context);
  text::Batch batch;
  Index step = 0;
  Training result;
  try {
    for (; step < o.steps; ++step) {
      Index shown = 0;
      save_parameters(model, current);
      optimizer.set_learning_rate(schedule(step));
      const double loss = train_step(model, optimizer, gradients, [&] {
        double sum = 0;
        for (Index i = 0; i < o.accumulation; ++i) {
          text::random_batch(corpus.training, o.batch, o.context, data_rng, batch);
          auto groups = divide(plan(step, rank_rng), o.batch);
          shown = groups.size() == 1 ? groups.front().rank.active : 0;
          for (RankGroup& group : groups) group.weight /= static_cast<double>(o.accumulation);
          sum += text::loss_and_gradients(model, batch, groups, cache, gradients);
        }
        return sum / static_cast<double>(o.accumulation);
      });
      std::swap(current, good);
      progress.update(step, loss, shown);
    }
  } catch (const NonFiniteError& error) {
    result.stopped = error.what();
    restore_parameters(model, good);
    std::fprintf(stderr,
                 "\nfinetune_text: training stopped at %s\nfinetune_text: going on with the last parameters that gave a finite loss\n",
                 error.what());
  }
  result.seconds = progress.seconds();
  result.tokens_per_second = progress.tokens_per_second(step);
  return result;
}

/// Cuts the adapters to ranks of their own that have the parameters of --layer-budget for all together and lose least on training text, of
/// which there is more than enough for a search. The model goes on serving every rank, each adapter with what it kept.
nlohmann::json choose_layer_ranks(Model& model, const Options& o, const text::Corpus& corpus, Model::Cache& cache) {
  const auto adapters = adapter_ranks(model);
  const auto seen = text::spread_batches(corpus.training, 4 * o.validation, o.batch, o.context);
  const RankSearch search = search_ranks(model, {.budget = total_cost(adapters, o.layer_budget, parameters_per_component)},
                                         [&] { return text::mean_loss(model, seen, o.max_rank, cache); });
  truncate_each(model, search.best.ranks);
  nlohmann::json ranks;
  for (std::size_t i = 0; i < adapters.size(); ++i) ranks[adapters[i].name] = search.best.ranks[i];
  return ranks;
}

/// Every option and its value under the option's name, numbers as numbers.
nlohmann::json used_options(const CLI::App& app) {
  nlohmann::json used;
  for (const CLI::Option* option : app.get_options()) {
    if (option->get_lnames().empty() || option->get_lnames().front() == "help") continue;
    std::string name = option->get_lnames().front();
    std::replace(name.begin(), name.end(), '-', '_');
    if (option->get_expected_max() == 0) {
      used[name] = option->count() > 0;  // a flag
      continue;
    }
    const std::string value = option->count() > 0 ? option->results().back() : option->get_default_str();
    const auto parsed = nlohmann::json::parse(value, nullptr, false);
    used[name] = parsed.is_number() ? parsed : nlohmann::json(value);
  }
  return used;
}

int run(const Options& o, const CLI::App& app) {
  const std::vector<std::string> text_paths = o.text.empty() ? text::default_text(DYLORA_OWN_TEXT) : o.text;
  if (o.width % o.heads != 0) {
    throw std::invalid_argument("--heads: expected a divisor of --width " + std::to_string(o.width) + ", got " + std::to_string(o.heads));
  }
  if (o.max_rank > o.width) {
    throw std::invalid_argument("--max-rank: expected at most --width " + std::to_string(o.width) + ", got " + std::to_string(o.max_rank));
  }
  if (o.layer_budget > o.max_rank) {
    throw std::invalid_argument("--layer-budget: expected at most --max-rank " + std::to_string(o.max_rank) + ", got " +
                                std::to_string(o.layer_budget));
  }
  if (o.sample_length > 0 && o.prompt.empty()) throw std::invalid_argument("--prompt: expected at least one byte to continue, got none");
  if (!o.json.empty() && !std::ofstream(o.json, std::ios::app)) throw std::runtime_error("cannot write " + o.json);  // before the work
  const Plan plan = make_plan(o);
  const gpt::Targets targets = make_targets(o.targets);
  text::use_threads(o.threads);

  const text::Corpus source = text::read_corpus(o.pretrain, o.context), target = text::read_corpus(text_paths, o.context);
  std::printf("pretraining text: %zu files, %zu bytes; text to adapt to: %zu files, %zu bytes\n", source.files, source.bytes(),
              target.files, target.bytes());
  const text::PretrainOptions pretrain{
      .config = {.context = o.context, .width = o.width, .layers = o.layers, .heads = o.heads, .tied = !o.untied},
      .steps = o.pretrain_steps,
      .lr = o.pretrain_lr,
      .seed = o.seed};
  const text::BaseModel base = text::pretrained_base(o.base_folder, pretrain, source);

  Rng adapter_rng(o.seed);
  Model model = gpt::adapted(base, {.max_rank = o.max_rank, .alpha = o.alpha, .scale = scale_rules.at(o.scale)}, adapter_rng, targets);
  const auto validation = text::spread_batches(target.validation, o.validation, o.batch, o.context);
  Model::Cache cache;
  const double base_loss = text::mean_loss(model, validation, RankSlice::none(), cache);
  const Index parameters = parameter_count(base) + parameter_count(model);
  std::printf("%td parameters, of which %td are trained; validation loss of the base %.4f\n", parameters, parameter_count(model),
              base_loss);

  const Training training = train(model, o, plan, target, cache);

  if (!training.stopped.empty() && !std::isfinite(text::mean_loss(model, validation, o.max_rank, cache))) {
    std::fprintf(stderr, "finetune_text: the loss at --max-rank is no number; nothing to evaluate\n");
    return 3;
  }
  const RankCurve curve = text::rank_curve(model, validation, o.max_rank, cache);
  std::printf("\n rank   validation loss   bits per byte   over the best\n");
  nlohmann::json ranks = nlohmann::json::array();
  for (Index rank = 0; rank <= o.max_rank; ++rank) {
    const Estimate loss = curve.loss(rank), excess = curve.excess(rank, curve.best());
    std::printf("%5td   %15.4f   %13.3f", rank, loss.mean, loss.mean / std::log(2.0));
    if (rank == curve.best()) {
      std::printf("            best\n");
    } else {
      std::printf("   %6.4f ± %6.4f%s\n", excess.mean, excess.standard_error, rank == 0 ? "   no adapter" : "");
    }
    nlohmann::json entry{{"rank", rank}, {"loss", loss.mean}};
    if (curve.batches() > 1) entry["standard_error"] = loss.standard_error;
    ranks.push_back(entry);
  }
  const Index selected = select_rank(curve, {.tolerance = o.tolerance});
  std::printf("\nsmallest rank within %g of the best: %td\n", o.tolerance, selected);
  std::printf("trained once, in %.1f s at %.0f tokens/s\n", training.seconds, training.tokens_per_second);

  nlohmann::json layer_ranks;
  if (o.layer_budget > 0) {
    const double uniform = curve.loss(o.layer_budget).mean;
    layer_ranks = choose_layer_ranks(model, o, target, cache);
    const double chosen = text::mean_loss(model, validation, o.max_rank, cache);
    std::printf("\na rank for each layer, at the parameters of rank %td for all: validation loss %.4f, uniform %.4f\n", o.layer_budget,
                chosen, uniform);
    for (const auto& [name, rank] : layer_ranks.items()) std::printf("  %-18s %td\n", name.c_str(), rank.get<Index>());
    layer_ranks = {{"ranks", layer_ranks}, {"loss", chosen}, {"uniform_loss", uniform}};
  }

  if (!o.json.empty()) {
    nlohmann::json report = used_options(app);
    report.update({{"base_loss", base_loss},
                   {"ranks", ranks},
                   {"selected_rank", selected},
                   {"train_seconds", training.seconds},
                   {"tokens_per_second", training.tokens_per_second},
                   {"parameters", parameters},
                   {"trainable_parameters", parameter_count(model)},
                   {"peak_rss_mb", text::peak_rss_mb()},
                   {"text", text_paths},
                   {"pretrain", o.pretrain}});
    if (!training.stopped.empty()) report["stopped"] = training.stopped;
    if (!layer_ranks.is_null()) report["layer_ranks"] = layer_ranks;
    std::ofstream out(o.json);
    if (!(out << report.dump(2) << '\n') || !out.flush()) throw std::runtime_error("cannot write " + o.json);
  }
  if (o.sample_length > 0) {
    print_sample(model, o, std::max(o.unit, o.min_rank));
    print_sample(model, o, o.max_rank);
  }
  return training.stopped.empty() ? 0 : 3;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Adapt a small pretrained text model with DyLoRA: one run, every rank");
  app.option_defaults()->always_capture_default();
  declare(app, options);
  CLI11_PARSE(app, argc, argv);
  try {
    return run(options, app);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "finetune_text: %s\n", error.what());
    return 1;
  }
}
