#include "dylora/layers/linear.hpp"
#include "methods/pissa/initialized_under_test.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

template <class S>
using Started = Linear<S, InitializedUnderTest<S>>;

using LayersUnderTest = InFloatAndDouble<Started>;

}  // namespace dylora::test

#include "laws/layer_laws.hpp"
