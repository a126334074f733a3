#ifndef DYLORA_TESTS_TRAIN_NAMED_PARAMETERS_HPP
#define DYLORA_TESTS_TRAIN_NAMED_PARAMETERS_HPP

#include <cstdint>

#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"
#include "support/values.hpp"

namespace dylora::test {

/// One of everything that a group may differ by. All square, so that no shape can.
template <class S>
struct Named {
  using Scalar = S;
  struct Gradients {
    Gradient<RowMatrix<S>> A, embedding_A;
    Gradient<MatrixX<S>> B, embedding_B;
    VectorX<S> magnitude, gain;
  };
  RowMatrix<S> A = noise<S>(3, 3, 1), embedding_A = noise<S>(3, 3, 2);
  MatrixX<S> B = noise<S>(3, 3, 3), embedding_B = noise<S>(3, 3, 4);
  VectorX<S> magnitude = noise<S>(3, 1, 5), gain = noise<S>(3, 1, 6);

  static void members(const auto& f, auto&... t) {
    f(Parameter{"h.0.q_proj.lora_A", RankAxis::rows, Factor::A}, t.A...);
    f(Parameter{"h.0.q_proj.lora_B", RankAxis::cols, Factor::B}, t.B...);
    f(Parameter{"h.0.q_proj.lora_magnitude_vector"}, t.magnitude...);
    f(Parameter{"wte.lora_embedding_A", RankAxis::rows, Factor::A, true}, t.embedding_A...);
    f(Parameter{"wte.lora_embedding_B", RankAxis::cols, Factor::B, true}, t.embedding_B...);
    f(Parameter{"lora_B.gain"}, t.gain...);
  }
};

template <class S>
typename Named<S>::Gradients gradients_of(const Named<S>& named, std::uint64_t seed = 7) {
  auto gradients = zeros_like(named);
  randomize<Named<S>>(gradients, seed);
  for (auto* A : {&gradients.A, &gradients.embedding_A}) A->components.insert(3);
  for (auto* B : {&gradients.B, &gradients.embedding_B}) B->components.insert(3);
  return gradients;
}

/// What some steps make of a Named.
template <template <class> class Optimizer, class S, class Options>
Named<S> stepped(Options options, int steps = 1) {
  Named<S> named;
  Optimizer<Named<S>> optimizer(named, options);
  for (int step = 0; step < steps; ++step) optimizer.step(named, gradients_of(named, 7 + static_cast<std::uint64_t>(step)));
  return named;
}

}  // namespace dylora::test

#endif
