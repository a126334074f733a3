#include "dylora/layers/linear.hpp"
#include "methods/multilora_under_test.hpp"
#include "support/law.hpp"

namespace dylora::test {

template <class S>
using ParallelModules = Linear<S, MultiLora<S>>;

using LayersUnderTest = InFloatAndDouble<ParallelModules>;

}  // namespace dylora::test

#include "laws/layer_laws.hpp"
