#include "dylora/adapters/none.hpp"

#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

using AdaptersUnderTest = InFloatAndDouble<NoAdapter>;

}  // namespace dylora::test

#include "laws/adapter_laws.hpp"

namespace dylora::test {

TEST_CASE("no adapter trains nothing and takes any rank") {
  const NoAdapter<float> none(3, 4);
  CHECK(none.in_features() == 3);
  CHECK(none.out_features() == 4);
  CHECK(none.max_rank() == 0);
  CHECK(parameter_count(none) == 0);
  CHECK(none.delta(1000).isZero(0));
  CHECK(none.delta(1000).rows() == 4);
  CHECK(none.delta(1000).cols() == 3);
}

}  // namespace dylora::test
