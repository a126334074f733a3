#include "dylora/io/adapter_file.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/random.hpp"
#include "dylora/layers/attention/attention.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/ranks/truncate.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

using namespace dylora;
using namespace dylora::test;

namespace {

using Model = Attention<float>;

/// A file in memory, of a format that has room for the adapters of linear layers and calls "q_proj" "file.q_proj".
struct Shelf {
  std::map<std::string, FileAdapter<float>> adapters;
  std::vector<std::string> taken = {};

  std::string name() const { return "shelf"; }
  std::vector<std::string> notes() const { return {"a note"}; }
  std::vector<std::string> unmatched() const {
    std::vector<std::string> names;
    for (const auto& [name, adapter] : adapters)
      if (std::find(taken.begin(), taken.end(), name) == taken.end()) names.push_back(name);
    return names;
  }

  std::optional<FileAdapter<float>> take(const std::string& name) {
    const auto found = adapters.find(name);
    if (found == adapters.end()) return std::nullopt;
    if (!found->second.factors.A.allFinite()) throw FormatError("shelf: " + name);
    taken.push_back(name);
    return found->second;
  }
};

struct ShelfFormat {
  std::string_view caller;

  template <class T, class F>
  void for_each_module(T& model, F&& f) const {
    for_each_portable_adapter(
        model, caller, [](std::string_view module) { return std::string(module); },
        [&]<class A>(const std::string& module, A& adapter) {
          f(detail::AdapterPlace{module, "file." + module}, detail::AdapterModule<A>(adapter));
        });
  }
};

Shelf save(const Model& model, const std::vector<Index>& ranks) {
  Shelf shelf;
  detail::for_each_module_at(ShelfFormat{"save"}, model, ranks, [&](const auto& place, const auto&, auto values) {
    values.alpha = values.factors.scale * static_cast<double>(values.factors.A.rows());
    shelf.adapters.emplace(place.in_file, std::move(values));
  });
  return shelf;
}

Shelf save(const Model& model, Index rank) { return save(model, detail::same_rank(ShelfFormat{"save"}, model, rank)); }

LoadReport load(Shelf shelf, Model& model, bool strict = true) {
  return detail::load_adapters(ShelfFormat{"load"}, shelf, model, strict,
                               [&](const auto& place, const auto&) { return shelf.take(place.in_file); });
}

Model attention(LowRankOptions options, std::uint64_t seed) {
  Rng rng(seed);
  const auto projection = [&] { return Linear<float>(MatrixX<float>(noise<float>(8, 8, 1)), options, rng); };
  Model model{projection(), projection(), projection(), projection(), {.heads = 2}};
  randomize<Model>(model, seed);
  return model;
}

MatrixX<float> output(const Model& model, Index rank) { return model.forward(noise<float>(8, 3, 9), rank); }

constexpr LowRankOptions options{.max_rank = 4, .alpha = 3};

}  // namespace

TEST_CASE("What a format saves of a model at any rank, it loads to the same bits") {
  const Model model = attention(options, 1);
  for (Index rank = 1; rank <= 4; ++rank) {
    Model loaded = attention({.max_rank = 2}, 2);
    const LoadReport report = load(save(model, rank), loaded);
    CHECK(same_bits(output(loaded, rank), output(model, rank)));
    REQUIRE(report.adapters.size() == 4);
    CHECK(report.adapters[1] == AdapterScale{"file.k_proj", rank, 3, 3.0 / static_cast<double>(rank)});
    CHECK(report.notes == std::vector<std::string>{"a note"});
    CHECK(report.missing_modules.empty());
    CHECK(report.unmatched_tensors.empty());
  }
}

TEST_CASE("Each module is saved at its own rank, at rank 0 without a component") {
  Model loaded = attention(options, 2);
  const LoadReport report = load(save(attention(options, 1), {3, 0, 4, 1}), loaded);
  std::vector<Index> ranks;
  for (const AdapterScale& adapter : report.adapters) ranks.push_back(adapter.rank);
  CHECK(ranks == std::vector<Index>{3, 0, 4, 1});
  CHECK(report.adapters[1] == AdapterScale{.name = "file.k_proj"});
  CHECK(loaded.k.max_rank() == 0);
}

TEST_CASE("One rank for all is for an adapter of fewer components as many as it has") {
  Model model = attention(options, 1);
  truncate_each(model, {4, 2, 0, 3});
  CHECK(detail::same_rank(ShelfFormat{"save"}, model, 3) == std::vector<Index>{3, 2, 0, 3});
  for (const Index rank : {0, 5})
    CHECK_THROWS_SAYING(std::invalid_argument, save(model, rank), "save: rank: expected a value in [1, 4], got " + std::to_string(rank));
}

TEST_CASE("What cannot be saved is refused by the name of its module") {
  const Model model = attention(options, 1);
  CHECK_THROWS_SAYING(std::invalid_argument, save(model, {1, 1, 1}), "save: expected a rank for each of 4 adapters, got 3");
  CHECK_THROWS_SAYING(std::invalid_argument, save(model, {1, 1, 1, 1, 1}), "save: expected a rank for each of 4 adapters, got 5");
  CHECK_THROWS_SAYING(std::invalid_argument, save(model, {1, 5, 1, 1}), "save: module \"k_proj\": rank: expected a value in [0, 4], got 5");
  CHECK_THROWS_SAYING(std::invalid_argument, save(model, {1, 1, -1, 1}), "save: module \"v_proj\": rank", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, save(model, {0, 0, 0, 0}), "save: expected a model with an adapter that has a component");
  Model scaled = model;
  scaled.o.adapter.options.alpha = HUGE_VAL;
  CHECK_THROWS_SAYING(NonFiniteError, save(scaled, 2), "save: module \"o_proj\": expected a finite scale");
  scaled.o.adapter.options.alpha = 1e-60;  // 0 in float
  CHECK_THROWS_SAYING(std::invalid_argument, save(scaled, 2), "save: module \"o_proj\": expected a scale other than 0");
  CHECK_NOTHROW(save(scaled, {2, 2, 2, 0}));
}

TEST_CASE("A load that throws has changed nothing, whichever module it is for") {
  const Shelf whole = save(attention(options, 1), 2);
  const Model before = attention(options, 2);
  for (const std::string module : {"q_proj", "k_proj", "v_proj", "o_proj"}) {
    const std::string name = "file." + module;
    Model model = before;
    Shelf shelf = whole;
    shelf.adapters.erase(name);
    CHECK_THROWS_SAYING(FormatError, load(shelf, model), "shelf: ", "got nothing: \"" + module + "\"");
    shelf.adapters["file.other"] = whole.adapters.at(name);
    CHECK_THROWS_SAYING(FormatError, load(shelf, model), "got nothing: \"" + module + "\"; ", "no module of the model: \"file.other\"");
    shelf = whole;
    shelf.adapters.at(name).factors.A(0, 0) = dylora::test::nan<float>;
    CHECK_THROWS_SAYING(FormatError, load(shelf, model), "shelf: " + name);
    shelf = whole;
    shelf.adapters.at(name).factors.scale = -1;  // α / r of no α
    CHECK_THROWS_SAYING(std::invalid_argument, load(shelf, model), "load: module \"" + module + "\": ");
    CHECK(same_bits(values<Model>(model), values<Model>(before)));
  }
}

TEST_CASE("Unless strict, a load reports what has no counterpart and sets the rest") {
  Shelf shelf = save(attention(options, 1), 2);
  shelf.adapters["file.other"] = shelf.adapters.at("file.v_proj");
  shelf.adapters.erase("file.v_proj");
  const Model before = attention(options, 2);
  Model model = before;
  const LoadReport report = load(shelf, model, false);
  CHECK(report.adapters.size() == 3);
  CHECK(report.missing_modules == std::vector<std::string>{"v_proj"});
  CHECK(report.unmatched_tensors == std::vector<std::string>{"file.other"});
  CHECK(same_bits(model.v.adapter.A, before.v.adapter.A));
  CHECK(model.q.max_rank() == 2);
}

TEST_CASE("Assignments assign when they are told to, and in their order") {
  int number = 1;
  std::string text = "before";
  detail::Assignments assignments;
  assignments.add(number, 2);
  assignments.add(text, "after");
  assignments.add(number, 3);
  CHECK(number == 1);
  CHECK(text == "before");
  assignments.assign();
  CHECK(number == 3);
  CHECK(text == "after");
}
