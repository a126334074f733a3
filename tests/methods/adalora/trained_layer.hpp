#ifndef DYLORA_TESTS_METHODS_ADALORA_TRAINED_LAYER_HPP
#define DYLORA_TESTS_METHODS_ADALORA_TRAINED_LAYER_HPP

#include "dylora/layers/linear.hpp"
#include "support/values.hpp"

namespace dylora::test {

inline constexpr Index in = 9, out = 7, max_rank = 4;

inline Linear<double> trained_layer() {
  Rng rng(1);
  Linear<double> layer(MatrixX<double>(noise<double>(out, in, 1)), {.max_rank = max_rank, .alpha = 3}, rng);
  randomize<Linear<double>>(layer, 2);
  return layer;
}

}  // namespace dylora::test

#endif
