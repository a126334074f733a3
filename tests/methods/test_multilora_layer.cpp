#include "dylora/layers/linear.hpp"
#include "methods/multilora_under_test.hpp"
#include "support/law.hpp"

namespace dylora::test {

template <class S>
using ParallelModules = Linear<S, MultiLora<S>>;

using LayersUnderTest = InFloatAndDouble<ParallelModules>;

}  // namespace dylora::test

#include "laws/layer_laws.hpp"

namespace dylora::test {

TEST_CASE("a linear layer with parallel modules is a layer and a projection that can be merged") {
  STATIC_REQUIRE(Layer<ParallelModules<float>>);
  STATIC_REQUIRE(Projection<ParallelModules<double>>);
  STATIC_REQUIRE(is_mergeable<ParallelModules<float>>);
}

}  // namespace dylora::test
