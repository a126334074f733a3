#ifndef DYLORA_IO_PEFT_KINDS_HPP
#define DYLORA_IO_PEFT_KINDS_HPP

#include <concepts>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/types.hpp"
#include "dylora/io/adapter_file.hpp"

/// What a module is to PEFT: which tensors it has, and of which shapes.
namespace dylora {

enum class PeftKind { linear, embedding, convolution };

/// As messages name it.
inline std::string described(PeftKind kind) {
  return kind == PeftKind::linear ? "a linear layer" : kind == PeftKind::embedding ? "an embedding" : "a two-dimensional convolution";
}

/// The shapes of a module's tensors at each rank. As matrices, A is rank × in() and B is out × rank / groups.
struct PeftShape {
  PeftKind kind = PeftKind::linear;
  Index channels = 0;  ///< of the input: in_features, the vocabulary, or the channels of all groups
  Index out = 0;       ///< out_features, the width, or the output's channels
  bool dora = false;   ///< whether there is a magnitude, of `out` values
  Index kernel_height = 1, kernel_width = 1;
  Index groups = 1;  ///< each has rank / groups of the components, and its share of the channels on both sides

  Index in() const { return channels * kernel_height * kernel_width; }

  std::vector<Index> A(Index rank) const {
    return kind == PeftKind::convolution ? std::vector{rank, channels, kernel_height, kernel_width} : std::vector{rank, channels};
  }
  std::vector<Index> B(Index rank) const {
    return kind == PeftKind::convolution ? std::vector<Index>{out, rank / groups, 1, 1} : std::vector{out, rank};
  }
};

/// What a file has for one module, its tensors as the matrices of PeftShape.
template <std::floating_point S>
struct PeftAdapter : FileAdapter<S> {
  VectorX<S> magnitude = {};  ///< of DoRA, else empty
};

}  // namespace dylora

#endif
