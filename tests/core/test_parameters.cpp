#include "dylora/core/parameters.hpp"

#include <cmath>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

using AllAdapted = Attention<double>;
using Subset = Attention<double, Linear<double>, FrozenLinear<double>, Linear<double>, FrozenLinear<double>>;

namespace {

/// What a backward at this rank leaves.
template <class L>
typename L::Gradients gradients_at(const L& layer, RankSlice rank, std::uint64_t seed) {
  typename L::Cache cache;
  auto gradients = zeros_like(layer);
  (void)layer.forward(noise<double>(layer.in_features(), 6, seed), rank, cache);
  (void)layer.backward(noise<double>(layer.out_features(), 6, seed + 1), cache, gradients);
  return gradients;
}

}  // namespace

TEST_CASE("parameters have the dotted names of their members") {
  CHECK(names(MakeLayer<Linear<double>>::make(0, law_rank)) == std::vector<std::string>{"lora_A", "lora_B"});
  CHECK(names(MakeLayer<AllAdapted>::make(0, law_rank)) == std::vector<std::string>{"q_proj.lora_A", "q_proj.lora_B", "k_proj.lora_A",
                                                                                    "k_proj.lora_B", "v_proj.lora_A", "v_proj.lora_B",
                                                                                    "o_proj.lora_A", "o_proj.lora_B"});
  CHECK(names(MakeLayer<Subset>::make(0, law_rank)) ==
        std::vector<std::string>{"q_proj.lora_A", "q_proj.lora_B", "v_proj.lora_A", "v_proj.lora_B"});
}

TEST_CASE("the rank axis is the rows of A and the columns of B") {
  const auto attention = MakeLayer<AllAdapted>::make(0, law_rank);
  for_each_parameter(
      [](Parameter parameter, const auto& p) {
        CHECK(parameter.rank_axis == (parameter.name.ends_with("lora_A") ? RankAxis::rows : RankAxis::cols));
        CHECK(detail::component_count(parameter.rank_axis, p) == law_rank);
      },
      attention);
}

TEST_CASE("only what is trained is counted") {
  CHECK(parameter_count(MakeLayer<Linear<double>>::make(0, law_rank)) == 5 * 7 + 6 * 5);
  CHECK(parameter_count(MakeLayer<AllAdapted>::make(0, law_rank)) == 3 * 5 * (7 + 12) + 5 * (12 + 6));
  CHECK(parameter_count(MakeLayer<AllAdapted>::make(3, law_rank)) == 5 * (7 + 12) + 5 * (7 + 6));  // k and o have no rank
  CHECK(parameter_count(MakeLayer<Subset>::make(0, law_rank)) == 2 * 5 * (7 + 12));
  CHECK(parameter_count(MakeLayer<FrozenLinear<double>>::make(0, 0)) == 0);
}

TEST_CASE("fresh gradients are zeros of the parameters' shapes and nothing is trained") {
  const auto layer = MakeLayer<AllAdapted>::make(2, law_rank);
  const auto gradients = zeros_like(layer);
  for_each_parameter(
      [](Parameter, const auto& p, const auto& g) {
        CHECK(g.rows() == p.rows());
        CHECK(g.cols() == p.cols());
        CHECK(g.isZero(0));
        CHECK(g.components.size() == law_rank);
        CHECK(g.components.empty());
      },
      layer, gradients);
}

TEST_CASE("clearing zeroes every value and every component") {
  const auto layer = MakeLayer<Linear<double>>::make(1, law_rank);
  auto gradients = gradients_at(layer, law_rank, 1);
  fill_components<Linear<double>>(gradients, nan<double>);
  set_zero(layer, gradients);
  CHECK(values<Linear<double>>(gradients).isZero(0));
  CHECK(gradients.adapter.A.components.empty());
  CHECK(gradients.adapter.B.components.empty());
}

TEST_CASE("gradients of workers add up and so do the components that they trained") {
  using L = Linear<double>;
  L layer = MakeLayer<L>::make(1, law_rank);
  randomize<L>(layer, 9);
  auto sum = gradients_at(layer, {2, 1}, 1);
  const auto other = gradients_at(layer, {5, 4}, 3);
  const VectorX<double> expected = values<L>(sum) + values<L>(other);
  accumulate_gradients(layer, sum, other);
  CHECK(same_bits(values<L>(sum), expected));
  CHECK(trained_components<L>(sum) == std::vector<std::string>{"01001", "01001"});
  CHECK(trained_components<L>(other) == std::vector<std::string>{"00001", "00001"});
}

TEST_CASE("backward calls at several ranks train the union of their components") {
  using L = Linear<double>;
  const L layer = MakeLayer<L>::make(1, law_rank);
  L::Cache cache;
  auto gradients = zeros_like(layer);
  const auto backward_at = [&](RankSlice rank) {
    (void)layer.forward(noise<double>(7, 4, 1), rank, cache);
    (void)layer.backward(noise<double>(6, 4, 2), cache, gradients);
    return trained_components<L>(gradients)[0];
  };
  CHECK(backward_at(RankSlice::none()) == "00000");
  CHECK(backward_at({4, 3}) == "00010");
  CHECK(backward_at(2) == "11010");
  CHECK(backward_at(5) == "11111");
}

TEST_CASE("the norm is taken over all trained values") {
  using L = Linear<double>;
  L layer = MakeLayer<L>::make(1, law_rank);
  randomize<L>(layer, 9);
  for (const RankSlice rank : {RankSlice{5}, RankSlice{2}, RankSlice{4, 3}}) {
    auto gradients = gradients_at(layer, rank, 1);
    double sum = 0;
    for (const double g : values<L>(gradients)) sum += g * g;
    CHECK(norm(layer, gradients) == Approx(std::sqrt(sum)).epsilon(1e-14));
    fill_components<L>(gradients, nan<double>, rank.active);  // not read
    CHECK(norm(layer, gradients) == Approx(std::sqrt(sum)).epsilon(1e-14));
  }
  CHECK(norm(layer, zeros_like(layer)) == 0);
}

TEST_CASE("the norm of float gradients is summed in double") {
  using L = Linear<float>;
  const L layer = MakeLayer<L>::make(0, law_rank);
  auto gradients = zeros_like(layer);
  fill_components<L>(gradients, 1e30f);  // the square is no float
  gradients.adapter.A.components.insert(law_rank);
  gradients.adapter.B.components.insert(law_rank);
  CHECK(norm(layer, gradients) == Approx(1e30 * std::sqrt(65.0)).epsilon(1e-6));
}

TEST_CASE("a snapshot gives the parameters back, and is refused whole where it does not fit") {
  auto layer = MakeLayer<Linear<float>>::make(6, 4, false, 3, 1);
  randomize<Linear<float>>(layer, 2);
  const VectorX<float> before = values<Linear<float>>(layer);
  Linear<float>::Gradients snapshot;
  take_snapshot(layer, snapshot);
  randomize<Linear<float>>(layer, 3);
  restore_snapshot(layer, snapshot);
  CHECK(same_bits(values<Linear<float>>(layer), before));

  auto other = MakeLayer<Linear<float>>::make(6, 5, false, 3, 1);  // A fits, B does not
  const VectorX<float> kept = values<Linear<float>>(other);
  CHECK_THROWS_SAYING(ShapeError, restore_snapshot(other, snapshot), "snapshot of lora_B", "expected 5 × 3", "got 4 × 3");
  CHECK(same_bits(values<Linear<float>>(other), kept));
  auto sum = zeros_like(other), wrong = sum;
  wrong.adapter.A.setOnes();
  wrong.adapter.B.setOnes(4, 3);
  CHECK_THROWS_SAYING(ShapeError, accumulate_gradients(other, sum, wrong), "gradient of lora_B");
  CHECK(sum.adapter.A.isZero(0));
}

}  // namespace dylora::test
