#include <dylora/methods/reslora/residual_low_rank.hpp>
#include <dylora/methods/reslora/shortcut.hpp>
#include "golden/golden.hpp"
#include "methods/reslora/residual_under_test.hpp"

using namespace dylora;

namespace {

template <class S, Shortcut shortcut>
void check_chain(const std::string& name, Index reach) {
  const golden::File file("residual.txt");
  test::TanhChain<S, shortcut> chain;
  for (Index n = 0; n < 3; ++n) {
    const std::string link = "links." + std::to_string(n) + '.';
    const LowRank<S> lora(file.matrix<S>(link + "lora_A"), file.matrix<S>(link + "lora_B"), {.alpha = file.number("alpha")});
    chain.links.emplace_back(DenseWeight<S>(file.matrix<S>(link + "weight"), file.matrix<S>(link + "bias")),
                             ResidualLowRank<S, shortcut>(lora, reach, n));
  }
  const auto x = file.matrix<S>("x"), dy = file.matrix<S>("dy");
  golden::check_at_every_rank(chain, file, name + '/' + std::to_string(reach), dy, x);
}

}  // namespace

TEMPLATE_TEST_CASE("a residual chain computes what PyTorch does with every shortcut at every rank, nested and frozen", "[golden]", float,
                   double) {
  using S = TestType;
  check_chain<S, Shortcut::input>("input", 1);
  for (const Index reach : {1, 2}) {
    check_chain<S, Shortcut::block>("block", reach);
    check_chain<S, Shortcut::middle>("middle", reach);
  }
}
