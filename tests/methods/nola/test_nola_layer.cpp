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
