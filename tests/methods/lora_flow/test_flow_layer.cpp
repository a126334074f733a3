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
