#include "dylora/train/parameter_groups.hpp"

#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/parameters.hpp"
#include "dylora/io/checkpoint/archive.hpp"
#include "dylora/io/checkpoint/file.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/loss.hpp"
#include "dylora/train/sgd.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

/// One of everything that a name decides about. All square, so that no shape can.
template <class S>
struct Named {
  using Scalar = S;
  struct Gradients {
    Gradient<RowMatrix<S>> A, embedding_A;
    Gradient<Matrix<S>> B, embedding_B;
    Vector<S> magnitude, gain;
  };
  RowMatrix<S> A = noise<S>(3, 3, 1), embedding_A = noise<S>(3, 3, 2);
  Matrix<S> B = noise<S>(3, 3, 3), embedding_B = noise<S>(3, 3, 4);
  Vector<S> magnitude = noise<S>(3, 1, 5), gain = noise<S>(3, 1, 6);

  template <class F, class... T>
  static void zip_parameters(F&& f, T&... t) {
    f(Parameter{"h.0.q_proj.lora_A", RankAxis::rows}, t.A...);
    f(Parameter{"h.0.q_proj.lora_B", RankAxis::cols}, t.B...);
    f(Parameter{"h.0.q_proj.lora_magnitude_vector"}, t.magnitude...);
    f(Parameter{"wte.lora_embedding_A", RankAxis::rows}, t.embedding_A...);
    f(Parameter{"wte.lora_embedding_B", RankAxis::cols}, t.embedding_B...);
    f(Parameter{"lora_B.gain"}, t.gain...);
  }
};

template <class S>
typename Named<S>::Gradients gradients_of(const Named<S>& named, std::uint64_t seed = 7) {
  auto gradients = zeros_like(named);
  randomize<Named<S>>(gradients, seed);
  for (auto* A : {&gradients.A, &gradients.embedding_A}) A->components.insert(3);
  for (auto* B : {&gradients.B, &gradients.embedding_B}) B->components.insert(3);
  return gradients;
}

/// What some steps make of a Named.
template <template <class> class Optimizer, class S, class Options>
Named<S> stepped(Options options, int steps = 1) {
  Named<S> named;
  Optimizer<Named<S>> optimizer(named, options);
  for (int step = 0; step < steps; ++step) optimizer.step(named, gradients_of(named, 7 + static_cast<std::uint64_t>(step)));
  return named;
}

/// One step of a Linear whose B is 0 on a regression: the changes of A and B.
template <template <class> class Optimizer, class Options>
std::pair<RowMatrix<double>, Matrix<double>> first_step(Options options) {
  Rng rng(1);
  Linear<double> layer(Matrix<double>(noise<double>(6, 8, 1)), {.max_rank = 4, .alpha = 8}, rng);
  const RowMatrix<double> A = layer.adapter.A;
  typename Linear<double>::Cache cache;
  auto gradients = zeros_like(layer);
  const auto loss = mse(layer.forward(noise<double>(8, 20, 2), 3, cache), noise<double>(6, 20, 3));
  layer.backward(loss.gradient, cache, gradients);
  Optimizer<Linear<double>> optimizer(layer, options);
  optimizer.step(layer, gradients);
  return {layer.adapter.A - A, layer.adapter.B};
}

template <class State>
void read_text(const std::string& bytes, State&& state) {
  read_checkpoint(std::as_bytes(std::span(bytes)), "run/file", state);
}

}  // namespace

TEST_CASE("oracle of LoRA+: from B = 0 a step of Sgd moves B by ratio times as much and A not at all") {
  const auto [dA, dB] = first_step<Sgd>(SgdOptions{.lr = 0.25});
  const auto [plus_dA, plus_dB] = first_step<Sgd>(SgdOptions{.lr = 0.25, .groups = lora_plus(16)});
  CHECK(dA.isZero(0));
  CHECK(plus_dA.isZero(0));
  CHECK(dB.leftCols(3).cwiseAbs().minCoeff() > 0);
  CHECK(same_bits(plus_dB, Matrix<double>(16 * dB)));
}

TEST_CASE("oracle of LoRA+: from B = 0 a step of AdamW moves B by ratio times as much and A not at all") {
  const auto [dA, dB] = first_step<AdamW>(AdamWOptions{.lr = 1e-3});
  const auto [plus_dA, plus_dB] = first_step<AdamW>(AdamWOptions{.lr = 1e-3, .groups = lora_plus(16)});
  CHECK(dA.isZero(0));
  CHECK(plus_dA.isZero(0));
  CHECK(dB.leftCols(3).cwiseAbs().minCoeff() > 0);
  CHECK(same_bits(plus_dB, Matrix<double>(16 * dB)));
}

TEST_CASE("oracle of LoRA+: what is B is said by its name and not by its shape") {
  const ParameterGroups groups = lora_plus(16, 0.5);
  CHECK(groups("lora_B") == ParameterGroup{.lr_ratio = 16});
  CHECK(groups("h.0.attn.c_attn.1.lora_B") == ParameterGroup{.lr_ratio = 16});
  CHECK(groups("wte.lora_embedding_A") == ParameterGroup{.lr_ratio = 0.5});
  CHECK(groups("wte.lora_embedding_B") == ParameterGroup{.lr_ratio = 0.5});
  for (const std::string_view other : {"lora_A", "h.0.lora_magnitude_vector", "lora_B.gain", "my_lora_B", "lora_Bias", "gain", ""})
    CHECK(groups(other) == ParameterGroup{});
}

TEST_CASE("oracle of LoRA+: a ratio of 1 is the optimiser itself bit for bit") {
  const AdamWOptions adamw{.lr = 0.05, .weight_decay = 0.1, .max_norm = 0.5};
  AdamWOptions adamw_plus = adamw;
  adamw_plus.groups = lora_plus(1);
  CHECK(same_bits(values<Named<float>>(stepped<AdamW, float>(adamw, 5)), values<Named<float>>(stepped<AdamW, float>(adamw_plus, 5))));
  const SgdOptions sgd{.lr = 0.05, .momentum = 0.5, .weight_decay = 0.1, .max_norm = 0.5};
  SgdOptions sgd_plus = sgd;
  sgd_plus.groups = lora_plus(1);
  CHECK(same_bits(values<Named<float>>(stepped<Sgd, float>(sgd, 5)), values<Named<float>>(stepped<Sgd, float>(sgd_plus, 5))));
}

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

TEST_CASE("a group may be any function of a name and a ratio of 0 freezes") {
  const Named<double> before;
  const Named<double> after = stepped<AdamW, double>(AdamWOptions{.weight_decay = 0.1, .groups = [](std::string_view name) {
                                                                    return ParameterGroup{.lr_ratio = name.starts_with("h.0.") ? 0.0 : 1.0};
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
  for (const double ratio : {0.0, -1.0, infinity, nan<double>}) {
    CHECK_THROWS_SAYING(std::invalid_argument, lora_plus(ratio), "lora_plus: ratio", "finite number > 0", "got");
    CHECK_THROWS_SAYING(std::invalid_argument, lora_plus(16, ratio), "lora_plus: embedding_ratio", "finite number > 0", "got");
  }
  const Named<double> named;
  for (const double ratio : {-1.0, infinity, nan<double>}) {
    const ParameterGroups groups = [&](std::string_view name) { return ParameterGroup{.lr_ratio = name.ends_with("gain") ? ratio : 1}; };
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
