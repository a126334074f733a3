#include "dylora/layers/linear.hpp"
#include "dylora/methods/lora_flow/flow.hpp"
#include "methods/lora_flow/flow_under_test.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

template <class S>
using Flowing = Linear<S, FlowUnderTest<S>>;

using LayersUnderTest = InFloatAndDouble<Flowing>;

}  // namespace dylora::test

#include "laws/layer_laws.hpp"

namespace dylora::test {

TEST_CASE("a layer of several adapters under a gate is a layer and a projection that cannot be merged") {
  STATIC_REQUIRE(Layer<Flowing<float>>);
  STATIC_REQUIRE(Projection<Flowing<float>>);
  STATIC_REQUIRE_FALSE(MergeableAdapter<Flow<double>>);
  STATIC_REQUIRE_FALSE(is_mergeable<Flowing<double>>);
  STATIC_REQUIRE(is_mergeable<Linear<double>>);
}

}  // namespace dylora::test
