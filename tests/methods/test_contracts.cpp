#include "dylora/adapters/adapter.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/layers/layer.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/methods/lora_flow/flow.hpp"
#include "dylora/methods/multilora.hpp"
#include "dylora/methods/nola/nola.hpp"
#include "dylora/methods/pissa/offset_low_rank.hpp"
#include "support/catch.hpp"
#include "support/make.hpp"

namespace dylora::test {

namespace {

/// What an adapter answers besides the calls of every Adapter.
struct Contracts {
  bool factored, mergeable, portable;

  bool operator==(const Contracts&) const = default;
};

template <class A>
inline constexpr Contracts contracts_of{FactoredAdapter<A>, MergeableAdapter<A>, PortableAdapter<A>};

/// And a Linear with such an adapter is a layer and a projection, which can be merged if the adapter can.
template <class... A>
void check_contracts(const Contracts& expected) {
  STATIC_REQUIRE((Layer<Linear<typename A::Scalar, A>> && ...));
  STATIC_REQUIRE((Projection<Linear<typename A::Scalar, A>> && ...));
  STATIC_REQUIRE(((is_mergeable<Linear<typename A::Scalar, A>> == MergeableAdapter<A>)&&...));
  for (const Contracts& answered : {contracts_of<A>...}) CHECK(answered == expected);
}

}  // namespace

TEST_CASE("LoRA, parallel modules and factors that began with the weight's are products that can be merged and exchanged") {
  check_contracts<LowRank<float>, LowRank<double>>({.factored = true, .mergeable = true, .portable = true});
  check_contracts<MultiLora<float>, MultiLora<double>>({.factored = true, .mergeable = true, .portable = true});
  check_contracts<OffsetLowRank<float>, OffsetLowRank<double>>({.factored = true, .mergeable = true, .portable = true});
}

TEST_CASE("NOLA is a product of low rank that can be merged but not taken back from factors") {
  check_contracts<Nola<float>, Nola<double>>({.factored = true, .mergeable = true, .portable = false});
  check_contracts<NolaBases<float>, NolaBases<double>>({.factored = true, .mergeable = true, .portable = false});
}

TEST_CASE("adapters under a gate depend on the input and cannot be merged") {
  check_contracts<Flow<float>, Flow<double>>({.factored = false, .mergeable = false, .portable = false});
}

}  // namespace dylora::test
