#include <dylora/dylora.hpp>

#ifdef WITH_IO
#include <dylora/io/peft/peft.hpp>
#endif

#if defined(_OPENMP) != WANT_OPENMP
#error "OpenMP is not as this way of using dylora promises"
#endif

int main() {
  using namespace dylora;
  Rng rng(1);
  const MatrixX<float> W = random_uniform<float>(3, 4, 0.5, rng);
  const MatrixX<float> x = random_uniform<float>(4, 5, 0.5, rng);
  const Linear<float> layer(W, {.max_rank = 2}, rng);
#ifdef WITH_IO
  save_peft("adapter", layer, 1, {.prefix = "layer"});
#endif
  return layer.forward(x, 1).isApprox(W * x) ? 0 : 1;  // B starts at zero
}
