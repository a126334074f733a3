#include "dylora/train/parameter_groups.hpp"

#include <limits>
#include <span>
#include <string>

#include "dylora/core/parameters.hpp"
#include "dylora/io/checkpoint/archive.hpp"
#include "dylora/io/checkpoint/file.hpp"
#include "dylora/methods/lora_plus.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/sgd.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"
#include "train/named_parameters.hpp"

namespace dylora::test {

namespace {

template <class State>
void read_text(const std::string& bytes, State&& state) {
  read_checkpoint(std::as_bytes(std::span(bytes)), "run/file", state);
}

}  // namespace

TEMPLATE_TEST_CASE("a group's parameters move as under an optimiser with its learning rate and decay", "", float, double) {
  using S = TestType;
  const ParameterGroups groups = without_decay({"lora_magnitude_vector", "gain"}, lora_plus(4, 0.5));
  const auto shown = [&](auto made_with) {
    const Named<S> got = made_with(1.0, 0.5, groups);
    const Named<S> plain = made_with(1.0, 0.5, {}), faster = made_with(4.0, 0.5, {}), slower = made_with(0.5, 0.5, {}),
                   free = made_with(1.0, 0.0, {});
    CHECK(same_bits(got.A, plain.A));
    CHECK(same_bits(got.B, faster.B));
    CHECK(same_bits(got.embedding_A, slower.embedding_A));
    CHECK(same_bits(got.embedding_B, slower.embedding_B));
    CHECK(same_bits(got.magnitude, free.magnitude));
    CHECK(same_bits(got.gain, free.gain));
    CHECK_FALSE(same_bits(free.magnitude, plain.magnitude));
  };
  shown([](double factor, double decay, ParameterGroups chosen) {
    return stepped<AdamW, S>(AdamWOptions{.lr = 0.0625 * factor, .weight_decay = decay, .groups = chosen}, 4);
  });
  shown([](double factor, double decay, ParameterGroups chosen) {
    return stepped<Sgd, S>(SgdOptions{.lr = 0.0625 * factor, .momentum = 0.5, .weight_decay = decay, .groups = chosen}, 4);
  });
}

TEST_CASE("a group may be any function of a parameter and a ratio of 0 freezes") {
  const Named<double> before;
  const Named<double> after =
      stepped<AdamW, double>(AdamWOptions{.weight_decay = 0.1, .groups = [](const Parameter& parameter) {
                                            return ParameterGroup{.lr_ratio = parameter.name.starts_with("h.0.") ? 0.0 : 1.0};
                                          }});
  CHECK(same_bits(after.A, before.A));
  CHECK(same_bits(after.magnitude, before.magnitude));
  CHECK_FALSE(same_bits(after.embedding_A, before.embedding_A));
}

TEST_CASE("a learning rate that is set later keeps the ratios") {
  Named<double> late, early;
  Sgd one(late, {.lr = 0.5, .groups = lora_plus(16)}), other(early, {.lr = 0.25, .groups = lora_plus(16)});
  one.set_learning_rate(0.25);
  one.step(late, gradients_of(late));
  other.step(early, gradients_of(early));
  CHECK(same_bits(values<Named<double>>(late), values<Named<double>>(early)));
}

TEST_CASE("ratios that are no learning rates are refused and the parameter is named") {
  const double infinity = std::numeric_limits<double>::infinity();
  const Named<double> named;
  for (const double ratio : {-1.0, infinity, nan<double>}) {
    const ParameterGroups groups = [&](const Parameter& parameter) {
      return ParameterGroup{.lr_ratio = parameter.name.ends_with("gain") ? ratio : 1};
    };
    CHECK_THROWS_SAYING(std::invalid_argument, AdamW<Named<double>>(named, {.groups = groups}), "AdamW: lr_ratio of lora_B.gain",
                        "finite number ≥ 0", "got");
    CHECK_THROWS_SAYING(std::invalid_argument, Sgd<Named<double>>(named, {.groups = groups}), "Sgd: lr_ratio of lora_B.gain",
                        "finite number ≥ 0", "got");
  }
}

TEST_CASE("a run is resumed with the groups that it began with or refused") {
  const Named<double> named;
  const auto difference = [&](auto written, auto read) {
    const std::string bytes = checkpoint_bytes(3, [&](auto& archive) { archive("optimizer", written); });
    try {
      read_text(bytes, [&](auto& archive) { archive("optimizer", read); });
    } catch (const FormatError& error) {
      const std::string message = error.what();
      return message.substr(message.find('\n'));
    }
    return std::string();
  };
  const auto adamw = [&](ParameterGroups groups) { return AdamW(named, {.weight_decay = 0.1, .groups = groups}); };
  const auto sgd = [&](ParameterGroups groups) { return Sgd(named, {.weight_decay = 0.1, .groups = groups}); };
  const auto shown = [&](auto with) {
    CHECK(difference(with({}), with({})) == "");
    CHECK(difference(with(lora_plus(16)), with(lora_plus(16))) == "");
    CHECK(difference(with({}), with(lora_plus(1))) == "");  // which is one group for all
    CHECK(difference(with(lora_plus(16, 2)), with(lora_plus(8, 2))) ==
          "\n  optimizer.groups.h.0.q_proj.lora_B.lr_ratio: the checkpoint has 16.0, this run 8.0");
    CHECK(difference(with(lora_plus(16, 2)), with(lora_plus(16, 4))) ==
          "\n  optimizer.groups.wte.lora_embedding_A.lr_ratio: the checkpoint has 2.0, this run 4.0"
          "\n  optimizer.groups.wte.lora_embedding_B.lr_ratio: the checkpoint has 2.0, this run 4.0");
    CHECK(difference(with({}), with(without_decay({"gain"}))) ==
          "\n  optimizer.groups.lora_B.gain.decays: the checkpoint has none, this run false");
    CHECK(difference(with(without_decay({"gain"})), with({})) ==
          "\n  optimizer.groups.lora_B.gain.decays: the checkpoint has false, this run none");
  };
  shown(adamw);
  shown(sgd);
}

}  // namespace dylora::test
