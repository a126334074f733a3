#include "dylora/methods/dora/dora_linear.hpp"
#include "dylora/methods/dora/options.hpp"

#include "golden/golden.hpp"

using namespace dylora;

namespace {

template <class L>
void check_dora(const golden::File& file, const std::string& kind) {
  using S = typename L::Scalar;
  const auto x = file.matrix<S>("x"), dy = file.matrix<S>("dy");
  L layer({file.matrix<S>(kind + "weight"), file.matrix<S>(kind + "bias")},
          {file.matrix<S>(kind + "lora_A"), file.matrix<S>(kind + "lora_B"), {.alpha = file.number("alpha")}},
          {.dropout = file.number("dropout")}, file.matrix<S>(kind + "lora_magnitude_vector"));
  auto gradients = zeros_like(layer);
  for (const std::string dropout : {"all", "dropped"}) {
    for (Index rank = 1; rank <= layer.max_rank(); ++rank) {
      const std::string at_rank = kind + dropout + '/' + std::to_string(rank);
      for (const auto& [mode, slice] : {std::pair("/nested/", RankSlice(rank)), std::pair("/frozen/", RankSlice(rank, rank - 1))}) {
        for (const auto& [name, norm_gradient] :
             {std::pair("/detached", NormGradient::detached), std::pair("/exact", NormGradient::exact)}) {
          layer.norm_gradient = norm_gradient;
          typename L::Cache cache;
          if (dropout == "dropped") cache.rng = Rng(static_cast<std::uint64_t>(file.number("seed")));
          set_zero(layer, gradients);
          golden::check(layer.forward(x, slice, cache), file, at_rank + "/y");
          golden::check(layer.backward(dy, cache, gradients), file, at_rank + "/dx");
          golden::check_gradients(layer, gradients, file, at_rank + name + mode);
        }
      }
    }
  }
}

}  // namespace

TEMPLATE_TEST_CASE("DoraLinear computes what PyTorch does at every rank, with norms that have a gradient and without", "[golden]", float,
                   double) {
  using S = TestType;
  const golden::File file("dora.txt");
  check_dora<DoraLinear<S>>(file, "shared/");
  check_dora<DoraLinear<S, LowRank<S>, DenseWeight<S>, Magnitude::nested>>(file, "nested/");
}

TEMPLATE_TEST_CASE("the mask of the golden numbers is the one that its seed gives", "[golden]", float, double) {
  using S = TestType;
  const golden::File file("dora.txt");
  Rng rng(static_cast<std::uint64_t>(file.number("seed")));
  DropoutMask<S> mask;
  REQUIRE(mask.draw(MatrixX<S>::Ones(5, 4), file.number("dropout"), rng));
  CHECK(mask.x() == file.matrix<S>("mask"));
  CHECK((mask.x().array() == 0).any());
}
