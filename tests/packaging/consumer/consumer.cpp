#include <dylora/dylora.hpp>

#if defined(_OPENMP) != WANT_OPENMP
#error "OpenMP is not as this way of using dylora promises"
#endif

int main() {
  using namespace dylora;
  Rng rng(1);
  const Matrix<float> W = random_uniform<float>(3, 4, 0.5, rng);
  const Matrix<float> x = random_uniform<float>(4, 5, 0.5, rng);
  const Linear<float> layer(W, {.max_rank = 2}, rng);
  return layer.forward(x, 1).isApprox(W * x) ? 0 : 1;  // B starts at zero
}
