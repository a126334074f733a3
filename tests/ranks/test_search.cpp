#include "dylora/ranks/search.hpp"

#include <Eigen/QR>
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dylora/train/loss.hpp"
#include "gpt/gpt.hpp"
#include "support/catch.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

using L = Linear<double>;
using A = Attention<double>;
using Ranks = std::vector<Index>;

/// Layers that have nothing to do with each other.
struct Several {
  using Scalar = double;
  struct Gradients {
    std::vector<L::Gradients> parts;
  };

  std::vector<L> parts;

  static void members(const auto& f, auto&... t) { f(Child<L>{"part"}, t.parts...); }
};

/// Square layers of these widths, so that a component has 2 · width parameters.
Several several(const std::vector<Index>& widths, Index max_rank) {
  Several model;
  for (const Index width : widths) {
    const auto seed = static_cast<std::uint64_t>(model.parts.size() + 1);
    model.parts.push_back(MakeLayer<L>::make(width, width, false, max_rank, seed));
  }
  randomize<Several>(model, 9);
  return model;
}

std::vector<Index> random_widths(std::size_t count, Rng& rng) {
  std::vector<Index> widths;
  for (std::size_t i = 0; i < count; ++i) widths.push_back(4 + rng.below(8));
  return widths;
}

/// A loss that is a sum over the adapters of what table[i][components] says.
using Table = std::vector<std::vector<double>>;

double loss_of(const Table& table, const Ranks& ranks) {
  double sum = 0;
  for (std::size_t i = 0; i < ranks.size(); ++i) sum += table[i][static_cast<std::size_t>(ranks[i])];
  return sum;
}

Ranks components_of(const Several& model) {
  Ranks ranks;
  for (const L& part : model.parts) ranks.push_back(part.adapter.components());
  return ranks;
}

/// Each component lowers the loss; each by less than the one before, if returns diminish.
Table random_table(std::size_t adapters, Index max_rank, bool diminishing, Rng& rng) {
  Table table;
  for (std::size_t i = 0; i < adapters; ++i) {
    std::vector<double> falls;
    for (Index j = 0; j < max_rank; ++j) falls.push_back(0.01 + std::pow(rng.uniform(), 2));
    if (diminishing) std::sort(falls.rbegin(), falls.rend());
    std::vector<double> losses{5};
    for (const double fall : falls) losses.push_back(losses.back() - fall);
    table.push_back(losses);
  }
  return table;
}

/// Calls f(ranks) for every choice between lowest and the adapters' ranks.
template <class F>
void for_each_choice(const std::vector<AdapterRank>& adapters, Index lowest, F&& f) {
  Ranks ranks;
  for (const AdapterRank& adapter : adapters) ranks.push_back(std::min(lowest, adapter.rank));
  const Ranks first = ranks;
  for (;;) {
    f(ranks);
    std::size_t i = 0;
    while (i < ranks.size() && ranks[i] == adapters[i].rank) ranks[i] = first[i], ++i;
    if (i == ranks.size()) return;
    ++ranks[i];
  }
}

/// The lowest loss of any choice within the budget.
template <class ChoiceLoss>
double exhaustive(const std::vector<AdapterRank>& adapters, double budget, ComponentCost cost, ChoiceLoss&& loss, Index lowest = 0) {
  double best = std::numeric_limits<double>::infinity();
  for_each_choice(adapters, lowest, [&](const Ranks& ranks) {
    if (total_cost(adapters, ranks, cost) <= budget) best = std::min(best, loss(ranks));
  });
  return best;
}

/// By the width alone, and with a base, in numbers without rounding.
double own_cost(const AdapterRank& adapter) { return 1 + 0.25 * static_cast<double>(adapter.component_size); }
double equal_cost(const AdapterRank& /*adapter*/) { return 1; }

/// Layers that have learned all of their changes exactly, at their largest rank: with s = 1, each component is one singular direction.
struct Trained {
  Several model;
  std::vector<MatrixX<double>> changes;
  std::vector<VectorX<double>> sigma;

  Trained(const std::vector<Index>& widths, const std::vector<VectorX<double>>& sigma_) : sigma(sigma_) {
    for (std::size_t i = 0; i < widths.size(); ++i) {
      const Index n = widths[i], rank = sigma[i].size();
      const auto orthonormal = [&](std::uint64_t seed) -> MatrixX<double> {
        return Eigen::HouseholderQR<MatrixX<double>>(noise<double>(n, n, seed)).householderQ() * MatrixX<double>::Identity(n, rank);
      };
      const MatrixX<double> U = orthonormal(2 * i + 1), V = orthonormal(2 * i + 2);
      changes.emplace_back(U * sigma[i].asDiagonal() * V.transpose());
      const LowRankOptions options{.max_rank = rank, .alpha = static_cast<double>(rank), .scale = alpha_over_max_rank};
      model.parts.emplace_back(MatrixX<double>(noise<double>(n, n, 50 + i)),
                               LowRank<double>(RowMatrix<double>(sigma[i].asDiagonal() * V.transpose()), U, options));
    }
  }

  /// The squared error of all layers on whitened inputs.
  double loss(const Several& at) const {
    double sum = 0;
    for (std::size_t i = 0; i < changes.size(); ++i) {
      const L& part = at.parts[i];
      const MatrixX<double> x = MatrixX<double>::Identity(part.in_features(), part.in_features());
      sum += (part.forward(x, part.max_rank()) - part.base.W - changes[i]).squaredNorm();
    }
    return sum;
  }

  /// The squares of the singular values that a choice leaves out.
  double left_out(const Ranks& ranks) const {
    double sum = 0;
    for (std::size_t i = 0; i < ranks.size(); ++i) sum += sigma[i].tail(sigma[i].size() - ranks[i]).squaredNorm();
    return sum;
  }
};

Trained trained_model() {
  const auto falling = [](double first, double factor) -> VectorX<double> {
    return VectorX<double>{{first, first * factor, first * factor * factor}};
  };
  return {{5, 9, 6, 4}, {falling(4, 0.5), falling(3, 0.9), falling(1, 0.2), falling(2, 0.7)}};
}

/// An attention whose four adapters matter to each other, and its loss against another one.
struct TrainedAttention {
  A model = MakeLayer<A>::make(2, law_rank);
  MatrixX<double> x = noise<double>(7, 9, 1), target;

  explicit TrainedAttention(ScaleRule scale) {
    randomize<A>(model, 3);
    A other = model;
    for (A* attention : {&model, &other}) {
      for (L* part : {&attention->q, &attention->k, &attention->v, &attention->o}) part->adapter.options.scale = scale;
    }
    for_each_value<A>(other, 0, law_rank, [rng = Rng(4)](double& value) mutable { value += 0.2 * rng.uniform(); });
    target = other.forward(x, law_rank);
  }

  double loss(const A& at) const { return mse(at.forward(x, law_rank), target).value; }
  double loss(const Ranks& ranks) const {
    A cut = model;
    truncate_each(cut, ranks);
    return loss(cut);
  }
};

bool same_choice(const RankChoice& a, const RankChoice& b) { return a.ranks == b.ranks && a.cost == b.cost && a.loss == b.loss; }

}  // namespace

TEST_CASE("with diminishing returns and equal costs the search finds the best choice of all under every budget") {
  Rng rng(1);
  for (int i = 0; i < 20; ++i) {
    Several model = several(random_widths(4, rng), 3);
    const std::vector<AdapterRank> adapters = adapter_ranks(model);
    const Table table = random_table(4, 3, true, rng);
    for (int budget = 0; budget <= 12; ++budget) {
      const auto found = search_ranks(model, {.budget = static_cast<double>(budget), .cost = equal_cost},
                                      [&] { return loss_of(table, components_of(model)); });
      CHECK(found.best.cost == budget);
      CHECK(found.best.loss ==
            Approx(exhaustive(adapters, budget, equal_cost, [&](const Ranks& ranks) { return loss_of(table, ranks); })).epsilon(1e-14));
      if (budget % 4 == 0) CHECK(found.best.loss <= loss_of(table, Ranks(4, budget / 4)) + 1e-12);
    }
  }
}

TEST_CASE("with diminishing returns every point of the curve is the best choice at its cost") {
  Rng rng(2);
  for (const ComponentCost cost : {parameters_per_component, flops_per_component, own_cost, equal_cost}) {
    for (int i = 0; i < 10; ++i) {
      Several model = several(random_widths(4, rng), 3);
      const Table table = random_table(4, 3, true, rng);
      const auto loss = [&] { return loss_of(table, components_of(model)); };
      for (const RankChoice& point : search_ranks(model, {.budget = 0, .cost = cost}, loss).curve) {
        const double best = exhaustive(adapter_ranks(model), point.cost, cost, [&](const Ranks& ranks) { return loss_of(table, ranks); });
        CHECK(point.loss == Approx(best).epsilon(1e-14));
        CHECK(search_ranks(model, {.budget = point.cost, .cost = cost}, loss).best.loss == Approx(best).epsilon(1e-14));
      }
    }
  }
}

TEST_CASE("where costs differ and the budget fits no point of the curve most searches still find the best choice") {
  Rng rng(3);
  int found = 0;
  for (int i = 0; i < 200; ++i) {
    Several model = several(random_widths(4, rng), 3);
    const std::vector<AdapterRank> adapters = adapter_ranks(model);
    const Table table = random_table(4, 3, true, rng);
    const double budget = rng.uniform() * total_cost(adapters, 3, parameters_per_component);
    const double best = exhaustive(adapters, budget, parameters_per_component, [&](const Ranks& ranks) { return loss_of(table, ranks); });
    const RankSearch search = search_ranks(model, {.budget = budget}, [&] { return loss_of(table, components_of(model)); });
    CHECK(search.best.loss >= best - 1e-12);
    found += search.best.loss <= best + 1e-12;
  }
  CHECK(found > 170);
}

TEST_CASE("of trained layers the search keeps the singular directions that are worth most for what they cost") {
  Trained trained = trained_model();
  const std::vector<AdapterRank> adapters = adapter_ranks(trained.model);
  const auto loss = [&] { return trained.loss(trained.model); };
  for (const ComponentCost cost : {parameters_per_component, flops_per_component, own_cost}) {
    for (const Index lowest : {0, 1}) {
      // From the least that is possible to everything, and more.
      const double least = total_cost(adapters, lowest, cost), all = total_cost(adapters, 3, cost);
      for (const double part : {0.0, 0.25, 0.4, 0.5, 0.8, 1.0, 3.0}) {
        const double budget = least + part * (all - least);
        const RankSearch search = search_ranks(trained.model, {.budget = budget, .cost = cost, .lowest_rank = lowest}, loss);
        INFO("lowest rank " << lowest << ", budget " << budget);
        CHECK(search.best.cost <= budget);
        CHECK(search.best.loss == Approx(trained.left_out(search.best.ranks)).margin(1e-12));
        Several cut = trained.model;
        const double best = exhaustive(
            adapters, budget, cost,
            [&](const Ranks& ranks) {
              cut = trained.model;
              truncate_each(cut, ranks);
              return trained.loss(cut);
            },
            lowest);
        CHECK(search.best.loss == Approx(best).margin(1e-12));
      }
    }
  }
}

TEST_CASE("a search is no worse than a uniform rank of the same cost") {
  Trained trained = trained_model();
  for (const ComponentCost cost : {parameters_per_component, equal_cost}) {
    for (Index rank = 0; rank <= 3; ++rank) {
      const double budget = total_cost(adapter_ranks(trained.model), rank, cost);
      const RankSearch search = search_ranks(trained.model, {.budget = budget, .cost = cost}, [&] { return trained.loss(trained.model); });
      const double uniform = trained.left_out(Ranks(4, rank));
      if (rank == 1 || rank == 2) CHECK(search.best.loss < 0.9 * uniform);
      CHECK(search.best.loss <= uniform + 1e-12);
    }
  }
  for (const ScaleRule scale : {alpha_over_rank, alpha_over_max_rank}) {
    TrainedAttention attention(scale);
    for (Index rank = 0; rank <= law_rank; ++rank) {
      const double budget = total_cost(adapter_ranks(attention.model), rank, parameters_per_component);
      const RankSearch search = search_ranks(attention.model, {.budget = budget}, [&] { return attention.loss(attention.model); });
      CHECK(search.best.loss <= attention.loss(Ranks(4, rank)));
    }
  }
}

TEST_CASE(
    "whatever the losses and the costs a search stays within its budget and is no worse than a uniform rank and leaves no room that "
    "helps") {
  const auto fractional = [](const AdapterRank& adapter) { return 0.1 * static_cast<double>(adapter.component_size); };
  Rng rng(11);
  for (int i = 0; i < 200; ++i) {
    Several model = several({2 + rng.below(4), 2 + rng.below(4), 2 + rng.below(4), 2 + rng.below(4)}, 2);
    const Table table = random_table(4, 2, i % 2 == 0, rng);
    const auto adapters = adapter_ranks(model);
    for (const ComponentCost cost : {ComponentCost(parameters_per_component), ComponentCost(fractional)}) {
      for (const Index rank : {1, 2}) {
        const double budget = total_cost(adapters, rank, cost);
        const RankSearch search =
            search_ranks(model, {.budget = budget, .cost = cost}, [&] { return loss_of(table, components_of(model)); });
        CHECK(total_cost(adapters, search.best.ranks, cost) <= budget);
        CHECK(search.best.loss <= loss_of(table, Ranks(4, rank)));
        for (std::size_t a = 0; a < 4; ++a) {
          Ranks more = search.best.ranks;
          if (++more[a] <= 2 && total_cost(adapters, more, cost) <= budget) CHECK(loss_of(table, more) >= search.best.loss);
        }
      }
    }
  }
}

TEST_CASE("a search begins at a uniform rank where its own descent ends worse") {
  Several model = several({2, 4, 2}, 2);
  const Table table{{8, 4, 0}, {14, 7, 0}, {9, 2, 0}};
  const RankSearch search = search_ranks(model, {.budget = 16, .max_exchanges = 0}, [&] { return loss_of(table, components_of(model)); });
  CHECK(search.best.ranks == Ranks{1, 1, 1});
  CHECK(search.best.loss == 13);
}

TEST_CASE("a budget without end is one for everything that helps") {
  Several model = several({2, 3}, 2);
  const Table table{{2, 1, 3}, {2, 1, 0}};
  const RankSearch search =
      search_ranks(model, {.budget = std::numeric_limits<double>::infinity()}, [&] { return loss_of(table, components_of(model)); });
  CHECK(search.best.ranks == Ranks{1, 2});
}

TEST_CASE("the curve goes from all components to the lowest ranks by one component at a time") {
  TrainedAttention attention(alpha_over_rank);
  truncate_each(attention.model, {5, 2, 4, 0});
  const std::vector<AdapterRank> adapters = adapter_ranks(attention.model);
  for (const Index lowest : {0, 1, 3, 5, 100}) {
    for (const ComponentCost cost : {parameters_per_component, flops_per_component, own_cost}) {
      const RankSearch search = search_ranks(attention.model, {.budget = 1e6, .cost = cost, .lowest_rank = lowest},
                                             [&] { return attention.loss(attention.model); });
      CHECK(search.adapters == adapters);
      CHECK(search.curve.front().ranks == Ranks{5, 2, 4, 0});
      CHECK(search.curve.back().ranks == Ranks{std::min<Index>(lowest, 5), std::min<Index>(lowest, 2), std::min<Index>(lowest, 4), 0});
      for (std::size_t i = 0; i < search.curve.size(); ++i) {
        const RankChoice& point = search.curve[i];
        CHECK(point.cost == total_cost(adapters, point.ranks, cost));
        if (i == 0) continue;
        const RankChoice& before = search.curve[i - 1];
        CHECK(point.cost < before.cost);
        Ranks taken;
        for (std::size_t j = 0; j < 4; ++j) taken.push_back(before.ranks[j] - point.ranks[j]);
        std::sort(taken.begin(), taken.end());
        CHECK(taken == Ranks{0, 0, 0, 1});
      }
    }
  }
}

TEST_CASE("what is measured for a choice is the loss of the model cut to it under any scale") {
  for (const ScaleRule scale : {alpha_over_rank, alpha_over_sqrt_rank, alpha_over_max_rank}) {
    TrainedAttention attention(scale);
    const std::vector<AdapterRank> adapters = adapter_ranks(attention.model);
    for (const double budget : {20.0, 100.0, 200.0, 300.0}) {
      const RankSearch search = search_ranks(attention.model, {.budget = budget}, [&] { return attention.loss(attention.model); });
      for (const RankChoice& point : search.curve) CHECK(point.loss == attention.loss(point.ranks));
      CHECK(search.best.loss == attention.loss(search.best.ranks));
      CHECK(search.best.cost == total_cost(adapters, search.best.ranks, parameters_per_component));
      CHECK(search.best.cost <= budget);
      for (const RankChoice& point : search.curve) CHECK((point.cost > budget || point.loss >= search.best.loss));
    }
  }
}

TEST_CASE("the loss sees the model cut to the ranks that are measured and nothing else changed") {
  TrainedAttention attention(alpha_over_rank);
  const A before = attention.model;
  Index calls = 0;
  const RankSearch search = search_ranks(attention.model, {.budget = 200}, [&] {
    ++calls;
    Ranks ranks;
    for (const AdapterRank& adapter : adapter_ranks(attention.model)) ranks.push_back(adapter.rank);
    A cut = before;
    truncate_each(cut, ranks);
    CHECK(same_bits(values<A>(attention.model), values<A>(cut)));
    CHECK(attention.model.max_rank() == law_rank);
    return attention.loss(attention.model);
  });
  CHECK(search.evaluations == calls);
  CHECK(same_bits(values<A>(attention.model), values<A>(before)));
  CHECK(adapter_ranks(attention.model) == adapter_ranks(before));
  CHECK(same_bits(frozen_values(attention.model), frozen_values(before)));
}

TEST_CASE("when the loss throws or is no number the parameters are as they were and the error names the ranks") {
  TrainedAttention attention(alpha_over_rank);
  truncate_each(attention.model, {5, 2, 4, 0});
  const A before = attention.model;
  const RankSearchOptions options{.budget = 100};
  const Index evaluations = search_ranks(attention.model, options, [&] { return attention.loss(attention.model); }).evaluations;
  for (Index bad = 0; bad < evaluations; ++bad) {
    Index calls = 0;
    std::string ranks;
    const auto failing = [&](auto&& fail) {
      calls = 0;
      return search_ranks(attention.model, options, [&] {
        if (calls++ != bad) return attention.loss(attention.model);
        ranks.clear();
        for (const AdapterRank& adapter : adapter_ranks(attention.model)) ranks += ' ' + std::to_string(adapter.rank);
        return fail();
      });
    };
    CHECK_THROWS_SAYING(std::out_of_range, failing([]() -> double { throw std::out_of_range("no such batch"); }), "no such batch");
    CHECK(same_bits(values<A>(attention.model), values<A>(before)));
    CHECK_THROWS_SAYING(NonFiniteError, failing([] { return nan<double>; }), "search_ranks: loss at the ranks" + ranks + ":",
                        "expected a finite number", "got");
    CHECK(adapter_ranks(attention.model) == adapter_ranks(before));
    CHECK(same_bits(values<A>(attention.model), values<A>(before)));
    CHECK_THROWS_SAYING(NonFiniteError, failing([] { return std::numeric_limits<double>::infinity(); }), "got inf");
    CHECK(same_bits(values<A>(attention.model), values<A>(before)));
    CHECK(calls == bad + 1);
  }
}

TEST_CASE("no adapter is cut below the lowest rank and those that have less keep it") {
  TrainedAttention attention(alpha_over_rank);
  truncate_each(attention.model, {5, 1, 4, 3});
  const std::vector<AdapterRank> adapters = adapter_ranks(attention.model);
  for (const Index lowest : {0, 1, 2, 4, 9}) {
    Ranks least;
    for (const AdapterRank& adapter : adapters) least.push_back(std::min(lowest, adapter.rank));
    const double cost = total_cost(adapters, least, parameters_per_component);
    const auto kept = [&] {
      const std::vector<AdapterRank> now = adapter_ranks(attention.model);
      for (std::size_t i = 0; i < 4; ++i) {
        if (now[i].rank < least[i] || now[i].rank > adapters[i].rank) return false;
      }
      return true;
    };
    for (const double more : {0.0, 30.0, 1000.0}) {
      bool always = true;
      const RankSearch search = search_ranks(attention.model, {.budget = cost + more, .lowest_rank = lowest}, [&] {
        always = always && kept();
        return attention.loss(attention.model);
      });
      CHECK(always);
      if (more == 0) CHECK(search.best.ranks == least);
    }
    const auto too_little = [&] { return search_ranks(attention.model, {.budget = cost - 1, .lowest_rank = lowest}, [] { return 0.0; }); };
    CHECK_THROWS_SAYING(std::invalid_argument, too_little(), "search_ranks: budget",
                        "at least the cost of the lowest ranks, " + std::to_string(cost), "got " + std::to_string(cost - 1));
  }
}

TEST_CASE("a budget for everything keeps everything that helps and one for nothing keeps nothing") {
  Trained trained = trained_model();
  const auto loss = [&] { return trained.loss(trained.model); };
  for (const double budget : {total_cost(adapter_ranks(trained.model), 3, parameters_per_component), 1e300}) {
    CHECK(search_ranks(trained.model, {.budget = budget}, loss).best.ranks == Ranks{3, 3, 3, 3});
  }
  CHECK(search_ranks(trained.model, {.budget = 0}, loss).best.ranks == Ranks{0, 0, 0, 0});
}

TEST_CASE("components that make the loss worse are left out though the budget has room") {
  Several model = several({4, 4, 4}, 3);
  const Table table{{3, 2, 1, 2}, {1, 2, 3, 4}, {5, 4, 4.5, 4.75}};
  const RankSearch search = search_ranks(model, {.budget = 100, .cost = equal_cost}, [&] { return loss_of(table, components_of(model)); });
  CHECK(search.best.ranks == Ranks{2, 0, 1});
  CHECK(search.best.loss == 1 + 1 + 4);
}

TEST_CASE("flops are twice the parameters, so that a search with twice the budget is the same") {
  TrainedAttention attention(alpha_over_max_rank);
  const auto loss = [&] { return attention.loss(attention.model); };
  for (const double budget : {50.0, 100.0, 150.0}) {
    const RankSearch parameters = search_ranks(attention.model, {.budget = budget}, loss);
    const RankSearch flops = search_ranks(attention.model, {.budget = 2 * budget, .cost = flops_per_component}, loss);
    CHECK(flops.best.ranks == parameters.best.ranks);
    CHECK(flops.best.cost == 2 * parameters.best.cost);
    CHECK(flops.evaluations == parameters.evaluations);
  }
}

TEST_CASE("what a component costs decides what is kept") {
  // Of the same use, the narrower layers are cheaper; for more use than it costs more, the wider one is worth it.
  const Table equal{{2, 1, 0}, {2, 1, 0}}, wide{{8, 4, 0}, {2, 1, 0}};
  Several model = several({12, 4}, 2);
  const auto search = [&](const Table& table, double budget, ComponentCost cost) {
    return search_ranks(model, {.budget = budget, .cost = cost}, [&] { return loss_of(table, components_of(model)); }).best.ranks;
  };
  CHECK(search(equal, 40, parameters_per_component) == Ranks{1, 2});
  CHECK(search(equal, 24, parameters_per_component) == Ranks{0, 2});
  CHECK(search(wide, 24, parameters_per_component) == Ranks{1, 0});
  CHECK(search(wide, 2, equal_cost) == Ranks{2, 0});
}

TEST_CASE("room that the curve leaves is filled by what is worth most for its cost") {
  // The first does not fit; of the others, the two small ones together are worth more than the large one.
  const Table table{{100, 0}, {6, 0}, {6, 0}, {8, 0}};
  Several model = several({10, 2, 2, 4}, 1);
  const RankSearch search = search_ranks(model, {.budget = 9, .max_exchanges = 0}, [&] { return loss_of(table, components_of(model)); });
  CHECK(search.best.ranks == Ranks{0, 1, 1, 0});
}

TEST_CASE("the total cost is that of all components together") {
  const std::vector<AdapterRank> adapters{{"q", 5, 10}, {"k", 0, 7}, {"v", 2, 4}};
  CHECK(parameters_per_component(adapters[0]) == 10);
  CHECK(flops_per_component(adapters[0]) == 20);
  CHECK(total_cost(adapters, {3, 0, 2}, parameters_per_component) == 38);
  CHECK(total_cost(adapters, {3, 0, 2}, flops_per_component) == 76);
  CHECK(total_cost(adapters, Ranks{0, 0, 0}, parameters_per_component) == 0);
  for (const Index rank : {0, 1, 2, 3, 5, 9}) {
    const Ranks ranks{std::min<Index>(rank, 5), 0, std::min<Index>(rank, 2)};
    CHECK(total_cost(adapters, rank, parameters_per_component) == total_cost(adapters, ranks, parameters_per_component));
  }
  A model = MakeLayer<A>::make(2, law_rank);
  const std::vector<AdapterRank> of_model = adapter_ranks(model);
  for (const Ranks& ranks : {Ranks{5, 5, 5, 5}, {3, 0, 1, 2}}) {
    A cut = model;
    truncate_each(cut, ranks);
    CHECK(total_cost(of_model, ranks, parameters_per_component) == static_cast<double>(parameter_count(cut)));
  }
  CHECK_THROWS_SAYING(ShapeError, total_cost(adapters, Ranks{1, 1}, parameters_per_component), "total_cost: number of ranks", "expected 3",
                      "got 2");
}

TEST_CASE("the same search gives the same answer") {
  TrainedAttention one(alpha_over_rank), other(alpha_over_rank);
  for (const double budget : {60.0, 150.0}) {
    const RankSearch a = search_ranks(one.model, {.budget = budget}, [&] { return one.loss(one.model); });
    const RankSearch b = search_ranks(other.model, {.budget = budget}, [&] { return other.loss(other.model); });
    CHECK(same_choice(a.best, b.best));
    CHECK(std::equal(a.curve.begin(), a.curve.end(), b.curve.begin(), b.curve.end(), same_choice));
    CHECK(a.evaluations == b.evaluations);
  }
}

TEST_CASE("with diminishing returns a search costs about two evaluations per component and three per adapter") {
  Rng rng(8);
  for (const std::size_t adapters : {std::size_t{2}, std::size_t{6}, std::size_t{20}}) {
    for (int i = 0; i < 10; ++i) {
      Several model = several(random_widths(adapters, rng), 4);
      const Table table = random_table(adapters, 4, true, rng);
      const RankSearch search = search_ranks(model, {.budget = 0.5 * total_cost(adapter_ranks(model), 4, equal_cost), .cost = equal_cost},
                                             [&] { return loss_of(table, components_of(model)); });
      // The descent, and one look at all exchanges with the most promising ones.
      const auto count = static_cast<Index>(adapters), components = 4 * count;
      CHECK(search.evaluations <= 1 + 2 * components + 3 * count + 8);
    }
  }
  // Whatever the loss: never more than all adapters for each component taken, and so for each exchange. Here there are 5^8 choices.
  for (int i = 0; i < 10; ++i) {
    Several model = several(random_widths(8, rng), 4);
    const Table table = random_table(8, 4, false, rng);
    const RankSearch search = search_ranks(model, {.budget = 200}, [&] { return loss_of(table, components_of(model)); });
    CHECK(search.evaluations < 300);
  }
}

TEST_CASE("exchanges only ever help and more of them no less") {
  Rng rng(9);
  int helped = 0, helped_at_once = 0, helped_further = 0;
  for (int i = 0; i < 100; ++i) {
    Several model = several(random_widths(5, rng), 4);
    const Table table = random_table(5, 4, false, rng);
    const double budget = (0.2 + 0.6 * rng.uniform()) * total_cost(adapter_ranks(model), 4, parameters_per_component);
    const auto search = [&](Index exchanges, Index tried) {
      return search_ranks(model, {.budget = budget, .max_exchanges = exchanges, .tried_exchanges = tried},
                          [&] { return loss_of(table, components_of(model)); });
    };
    const RankSearch none = search(0, 8), one = search(1, 8), many = search(32, 8), few_tried = search(32, 1);
    CHECK(one.best.loss <= none.best.loss);
    CHECK(many.best.loss <= one.best.loss);
    CHECK(few_tried.best.loss <= none.best.loss);
    for (const RankSearch& each : {one, many, few_tried}) {
      CHECK(each.best.cost <= budget);
      CHECK(each.best.loss == loss_of(table, each.best.ranks));
      CHECK(each.evaluations >= none.evaluations);
    }
    helped += one.best.loss < none.best.loss;
    helped_at_once += few_tried.best.loss < none.best.loss;  // the most promising exchange is tried first
    helped_further += many.best.loss < few_tried.best.loss;
  }
  CHECK(helped > 5);
  CHECK(2 * helped_at_once > helped);
  CHECK(helped_further > 0);
}

TEST_CASE("a model without adapters is measured once") {
  Rng rng(4);
  auto base = gpt::random_gpt<double>({.vocabulary = 5, .context = 4, .width = 4, .layers = 1, .heads = 1}, rng);
  const RankSearch search = search_ranks(base, {.budget = 0}, [] { return 1.5; });
  CHECK(search.adapters.empty());
  CHECK(search.curve.size() == 1);
  CHECK(search.best.ranks.empty());
  CHECK(search.best.loss == 1.5);
  CHECK(search.best.cost == 0);
  CHECK(search.evaluations == 1);
}

TEST_CASE("a search refuses options out of range before it measures anything") {
  Several model = several({4, 5}, 3);
  const VectorX<double> before = values<Several>(model);
  const auto refused = [&](const RankSearchOptions& options, std::initializer_list<std::string_view> parts) {
    int calls = 0;
    const std::string wrong = wrong_throw<std::invalid_argument>(
        [&] {
          (void)search_ranks(model, options, [&] {
            ++calls;
            return 0.0;
          });
        },
        parts);
    CHECK(calls == 0);
    CHECK(same_bits(values<Several>(model), before));
    return wrong;
  };
  CHECK(refused({.budget = -1}, {"search_ranks: budget", "at least the cost of the lowest ranks", "got -1"}) == "");
  CHECK(refused({.budget = nan<double>}, {"search_ranks: budget", "got"}) == "");
  CHECK(refused({.budget = 17, .lowest_rank = 1}, {"search_ranks: budget", "lowest ranks, 18", "got 17"}) == "");
  CHECK(refused({.budget = 50, .lowest_rank = -1}, {"search_ranks: lowest_rank", "got -1"}) == "");
  CHECK(refused({.budget = 50, .max_exchanges = -1}, {"search_ranks: max_exchanges", "got -1"}) == "");
  CHECK(refused({.budget = 50, .tried_exchanges = 0}, {"search_ranks: tried_exchanges", "got 0"}) == "");
  const auto costing = [](ComponentCost cost) { return RankSearchOptions{.budget = 50, .cost = cost}; };
  CHECK(refused(costing([](const AdapterRank& adapter) { return static_cast<double>(adapter.component_size - 10); }),
                {"search_ranks: cost of a component of part.0", "a finite number > 0", "got -2"}) == "");
  CHECK(refused(costing([](const AdapterRank& adapter) { return static_cast<double>(10 - adapter.component_size); }),
                {"search_ranks: cost of a component of part.1", "got 0"}) == "");
  CHECK(refused(costing([](const AdapterRank&) { return nan<double>; }), {"cost of a component of part.0"}) == "");
  CHECK(refused(costing([](const AdapterRank&) { return std::numeric_limits<double>::infinity(); }), {"part.0", "got inf"}) == "");
}

}  // namespace dylora::test
