#include "dylora/layers/linear.hpp"
#include "methods/pissa/offset_low_rank_under_test.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

template <class S>
using Started = Linear<S, OffsetLowRankUnderTest<S>>;

using LayersUnderTest = InFloatAndDouble<Started>;

}  // namespace dylora::test

#include "laws/layer_laws.hpp"
