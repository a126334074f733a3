#include "dylora/layers/linear.hpp"
#include "dylora/methods/nola/nola.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

template <class S>
NolaOptions options_of(As<Nola<S>>, Index /*out*/, Index max_rank) {
  return {.max_rank = max_rank, .bases = 6, .alpha = law_alpha};
}
template <class S>
NolaOptions options_of(As<NolaBases<S>>, Index /*out*/, Index max_rank) {
  return {.max_rank = 3, .bases = max_rank, .alpha = law_alpha};
}

template <class S>
using NestedRanks = Linear<S, Nola<S>>;
template <class S>
using NestedBases = Linear<S, NolaBases<S>>;

using LayersUnderTest = InFloatAndDouble<NestedRanks, NestedBases>;

}  // namespace dylora::test

#include "laws/layer_laws.hpp"

namespace dylora::test {

TEST_CASE("a linear layer over random bases is a layer and a projection that can be merged") {
  STATIC_REQUIRE(Layer<NestedRanks<float>>);
  STATIC_REQUIRE(Projection<NestedBases<double>>);
  STATIC_REQUIRE(is_mergeable<NestedRanks<float>>);
}

}  // namespace dylora::test
