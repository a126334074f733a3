#include <dylora/dylora.hpp>

dylora::Index draw_elsewhere(dylora::Rng& rng);

int main() {
  dylora::Rng here(1), there(1);
  return dylora::UniformRank{1, 8}(here).active == draw_elsewhere(there) ? 0 : 1;
}
