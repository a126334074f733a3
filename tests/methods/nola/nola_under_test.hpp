#ifndef DYLORA_TESTS_METHODS_NOLA_NOLA_UNDER_TEST_HPP
#define DYLORA_TESTS_METHODS_NOLA_NOLA_UNDER_TEST_HPP

#include "dylora/methods/nola/nola.hpp"
#include "support/make.hpp"

namespace dylora::test {

template <class S>
NolaOptions options_of(As<Nola<S>>, Index /*out*/, Index max_rank) {
  return {.max_rank = max_rank, .bases = 6, .alpha = law_alpha};
}
template <class S>
NolaOptions options_of(As<NolaBases<S>>, Index /*out*/, Index max_rank) {
  return {.max_rank = 3, .bases = max_rank, .alpha = law_alpha};
}

}  // namespace dylora::test

#endif
