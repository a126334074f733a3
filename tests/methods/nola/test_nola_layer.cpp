#include "dylora/layers/linear.hpp"
#include "methods/nola/nola_under_test.hpp"
#include "support/law.hpp"

namespace dylora::test {

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
