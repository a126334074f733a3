#include <dylora/dylora.hpp>

dylora::Index draw_elsewhere(dylora::Rng& rng) { return dylora::UniformRank{1, 8}(rng).active; }
