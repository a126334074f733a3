#ifndef DYLORA_TESTS_METHODS_MULTILORA_UNDER_TEST_HPP
#define DYLORA_TESTS_METHODS_MULTILORA_UNDER_TEST_HPP

#include "dylora/methods/multilora.hpp"
#include "support/make.hpp"

namespace dylora::test {

template <class S>
MultiLoraOptions options_of(As<MultiLora<S>>, Index /*out*/, Index max_rank) {
  return {.max_rank = max_rank, .modules = 2, .alpha = law_alpha};
}

}  // namespace dylora::test

#endif
