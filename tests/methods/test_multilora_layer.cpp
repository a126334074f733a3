#include "dylora/layers/linear.hpp"
#include "dylora/methods/multilora.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

template <class S>
MultiLoraOptions options_of(As<MultiLora<S>>, Index /*out*/, Index max_rank) {
  return {.max_rank = max_rank, .modules = 2, .alpha = law_alpha};
}

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
