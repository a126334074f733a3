#ifndef DYLORA_BENCHMARKS_METHOD_RATIO_NOLA_MEMORY_HPP
#define DYLORA_BENCHMARKS_METHOD_RATIO_NOLA_MEMORY_HPP

#include <dylora/dylora.hpp>
#include <dylora/methods/nola/nola.hpp>

#include "measure/peak_memory.hpp"
#include "measure/program.hpp"
#include "method_ratio/methods.hpp"
#include "text/platform.hpp"

namespace method_ratio {

/// Of an adapter, its gradients, its cache and its workspace after a step.
struct NolaBytes {
  double coefficients;  ///< and their gradients
  double buffers;       ///< all the rest

  double all() const { return coefficients + buffers; }
};

inline NolaBytes nola_bytes(const Shape& shape, Index bases) {
  Samples samples(shape, Rng(1));
  Rng rng(1);
  const auto layer = nola(samples, bases, rng);
  auto gradients = zeros_like(layer);
  Layer<Nola<float>>::Cache cache;
  Layer<Nola<float>>::Workspace workspace;
  layer.forward(samples.x, rank, cache, samples.y);
  layer.backward(samples.dy, cache, gradients, workspace, samples.dx);

  const auto bytes = [](const auto&... matrices) {
    return static_cast<double>(sizeof(float)) * static_cast<double>((0 + ... + (matrices.rows() * matrices.cols())));
  };
  const auto& of = gradients.adapter;
  const auto& scratch = workspace.adapter;
  return {bytes(layer.adapter.alpha, layer.adapter.beta, of.alpha, of.beta),
          bytes(cache.adapter.h, cache.adapter.A, cache.adapter.B, scratch.dh, scratch.dA, scratch.dB)};
}

/// By how much the memory of this process grows for a layer that is made and takes two steps; its weight and samples were there before. To
/// be asked of a process that has done nothing else.
inline double nola_peak(const Shape& shape, Index bases) {
  const auto take_steps = [](Samples& samples, Index k) {
    Rng rng(1);
    const auto step = step_of(nola(samples, k, rng), rank, samples);
    step();
    step();
  };
  Samples few({64, 64, 8}, Rng(1)), samples(shape, Rng(1));
  take_steps(few, 4);
  return measure::peak_growth([&] { take_steps(samples, bases); });
}

/// The same, of a process of its own: this program, called with --nola-peak.
inline double nola_peak_elsewhere(const Shape& shape, Index bases, int threads) {
  return measure::ask_own_process("--nola-peak", {shape.in, shape.out, shape.tokens, bases, threads});
}

}  // namespace method_ratio

#endif
