#include "dylora/core/members.hpp"

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/core/parameters.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

/// One of everything that a type can name.
struct Leaf {
  struct Gradients {
    Gradient<RowMatrix<float>> A;
  };
  RowMatrix<float> A = RowMatrix<float>::Ones(2, 3);
  MatrixX<float> frozen = MatrixX<float>::Ones(4, 1);
  std::uint64_t seed = 7;

  static void members(const auto& f, auto&... t) {
    f(Parameter{"lora_A", RankAxis::rows, Factor::A}, t.A...);
    f(Constant{"frozen"}, &Leaf::frozen);
    f(Setting{"seed"}, &Leaf::seed);
    f(Setting{.name = "dropped", .only_in_training = true}, [](const Leaf&) { return 0.5; });
    f(Setting{"absent"}, [](const Leaf&) { return std::optional<double>(); });
  }
};

struct Tree {
  struct Gradients {
    Leaf::Gradients named, bare;
    std::vector<Leaf::Gradients> list;
  };
  Leaf named, bare;
  std::vector<Leaf> list = std::vector<Leaf>(2), before = std::vector<Leaf>(1);

  static void members(const auto& f, auto&... t) {
    f(Child<Leaf>{"named"}, t.named...);
    f(Child<Leaf>{}, t.bare...);
    f(Child<Leaf>{"list"}, t.list...);
    f(Constant{"before"}, [](auto& self) { return std::span(self.before); });
  }
};

/// Writes down what it is shown.
struct Recorder {
  std::vector<std::string> seen = {};

  void parameter(Parameter parameter, const auto& value) { note("parameter", parameter.name, value.size()); }
  void constant(Constant constant, const auto& value) { note("constant", constant.name, value.size()); }
  void setting(Setting setting, const auto& value) { note(setting.only_in_training ? "training" : "setting", setting.name, value); }
  auto enter(std::string_view name, const auto&) {
    seen.push_back("[" + std::string(name) + "]");
    return std::true_type{};
  }

 private:
  void note(const char* kind, std::string_view name, auto value) {
    seen.push_back(std::string(kind) + ' ' + std::string(name) + ' ' + std::to_string(static_cast<int>(10 * value)));
  }
};

/// Looks at every Leaf from outside.
struct StaysOutside {
  std::vector<std::string> seen = {};
  void parameter(Parameter parameter, const auto&) { seen.emplace_back(parameter.name); }
  template <class T>
  auto enter(std::string_view name, const T&) {
    seen.push_back("[" + std::string(name) + "]");
    return std::bool_constant<!std::is_same_v<T, Leaf>>{};
  }
};

const std::vector<std::string> expected = {"[]",
                                           "[named]",
                                           "parameter named.lora_A 60",
                                           "constant named.frozen 40",
                                           "setting named.seed 70",
                                           "training named.dropped 5",
                                           "[]",
                                           "parameter lora_A 60",
                                           "constant frozen 40",
                                           "setting seed 70",
                                           "training dropped 5",
                                           "[list.0]",
                                           "parameter list.0.lora_A 60",
                                           "constant list.0.frozen 40",
                                           "setting list.0.seed 70",
                                           "training list.0.dropped 5",
                                           "[list.1]",
                                           "parameter list.1.lora_A 60",
                                           "constant list.1.frozen 40",
                                           "setting list.1.seed 70",
                                           "training list.1.dropped 5",
                                           "constant before.0.lora_A 60",
                                           "constant before.0.frozen 40",
                                           "setting before.0.seed 70",
                                           "training before.0.dropped 5"};

}  // namespace

TEST_CASE("a walk shows each member once, in the order in which it is named, by its path") {
  Tree tree;
  Recorder recorder;
  visit_members(recorder, tree);
  CHECK(recorder.seen == expected);
  Recorder of_const;
  visit_members(of_const, std::as_const(tree));
  CHECK(of_const.seen == expected);
}

TEST_CASE("a walk passes by what the visitor does not enter") {
  StaysOutside outside;
  const Tree tree;
  visit_members(outside, tree);
  CHECK(outside.seen == std::vector<std::string>{"[]", "[named]", "[]", "[list.0]", "[list.1]"});
}

TEST_CASE("gradients are walked in step with what is trained, or alone under the same names") {
  Tree tree;
  auto gradients = zeros_like(tree);
  REQUIRE(gradients.list.size() == 2);
  std::vector<std::string> beside, alone;
  for_each_parameter(
      [&](Parameter parameter, const auto& p, auto& g) {
        CHECK(p.size() == g.size());
        g.setOnes();
        beside.emplace_back(parameter.name);
      },
      tree, gradients);
  for_each_parameter<Tree>(
      [&](Parameter parameter, const auto& g) {
        CHECK(g.isOnes(0));
        alone.emplace_back(parameter.name);
      },
      gradients);
  CHECK(beside == std::vector<std::string>{"named.lora_A", "lora_A", "list.0.lora_A", "list.1.lora_A"});
  CHECK(alone == beside);
}

TEST_CASE("what is constant can be assigned through the walk") {
  Tree tree;
  for_each_constant([](Constant, auto& value) { value.setConstant(3); }, tree);
  CHECK(tree.before[0].A.isConstant(3));
  CHECK(tree.named.frozen.isConstant(3));
  CHECK(tree.named.A.isOnes(0));
}

TEST_CASE("a list of gradients with another number of elements is refused by name") {
  const Tree tree;
  const Tree::Gradients none;
  CHECK_THROWS_SAYING(ShapeError, require_shapes(tree, "gradient of", none), "gradient of named.lora_A");
  auto longer = zeros_like(tree);
  longer.list.pop_back();
  CHECK_THROWS_SAYING(ShapeError, require_shapes(tree, "gradient of", std::as_const(longer)), "list", "number of elements", "expected 2",
                      "got 1");
}

}  // namespace dylora::test
