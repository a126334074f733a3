#ifndef DYLORA_IO_CHECKPOINT_FILE_HPP
#define DYLORA_IO_CHECKPOINT_FILE_HPP

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/bytes/checksum.hpp"
#include "dylora/io/bytes/tensor.hpp"
#include "dylora/io/checkpoint/archive.hpp"
#include "dylora/io/checkpoint/values.hpp"
#include "dylora/io/safetensors/safetensors.hpp"

/// A checkpoint as a file: safetensors, for others to look into. Matrices and vectors are tensors; single values are entries of the
/// metadata, in JSON, as "state.NAME", and what must be the same as "same.NAME". The first entry is a checksum of all bytes of the file,
/// with its own digits taken as zeros.
namespace dylora {

namespace detail {

inline constexpr std::string_view checkpoint_kind = "checkpoint 1";

/// How a checkpoint begins, after the length of the header; behind it are the digits.
inline constexpr std::string_view checkpoint_beginning = R"({"__metadata__":{"checksum":")";
inline constexpr std::size_t checksum_position = safetensors_word + checkpoint_beginning.size(), checksum_digits = 16;

/// The digits that belong into a file of these bytes, of which there are at least 64.
inline std::string checkpoint_checksum(std::span<const std::byte> bytes) {
  std::array<std::byte, 64> first;
  std::memcpy(first.data(), bytes.data(), first.size());
  std::memset(first.data() + checksum_position, '0', checksum_digits);
  return hexadecimal(checksum(bytes.subspan(first.size()), checksum(first)));
}

/// Throws FormatError, beginning with `name`, unless the bytes are those that were written.
inline void require_whole_checkpoint(std::span<const std::byte> bytes, const std::string& name) {
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (text.size() < 64 || text.substr(safetensors_word, checkpoint_beginning.size()) != checkpoint_beginning) {
    throw FormatError(name + ": expected the beginning of a checkpoint, got other bytes, or too few");
  }
  const std::string_view digits = text.substr(checksum_position, checksum_digits);
  const std::string found = checkpoint_checksum(bytes);
  if (digits != found) throw FormatError(name + ": expected bytes with the checksum " + printable(digits) + ", got " + found + ": damaged");
}

struct CheckpointContents {
  SafetensorsContents file;
  Index step;
};

/// After require_whole_checkpoint. Throws FormatError, beginning with `name`, for what this version does not write.
inline CheckpointContents parse_whole_checkpoint(std::span<const std::byte> bytes, const std::string& name) {
  SafetensorsContents file = parse_safetensors(bytes, name);
  const std::string kind = file.metadata["dylora"], digits = file.metadata["step"];
  if (kind != checkpoint_kind) throw FormatError(name + ": expected a " + std::string(checkpoint_kind) + ", got " + in_quotes(kind));
  const std::optional<Index> step = archived_value<Index>(digits);
  if (!step || *step < 0) throw FormatError(name + ": expected the number of a step, got " + in_quotes(digits));
  return {std::move(file), *step};
}

}  // namespace detail

/// The bytes of the checkpoint file of this step; the same for the same state. Takes the memory of the file, and once more that of its
/// column-major matrices. What `state` names must stay where it is until this returns. Throws NonFiniteError if a number of the state is a
/// NaN or an infinity, and std::invalid_argument for two parts of one name and for text that is not UTF-8.
template <class State>
std::string checkpoint_bytes(Index step, State&& state) {
  CheckpointArchive archive;
  state(archive);
  std::vector<TensorView> tensors = archive.tensors();
  std::sort(tensors.begin(), tensors.end(),
            [](const TensorView& a, const TensorView& b) { return std::tie(b.dtype, a.name) < std::tie(a.dtype, b.name); });
  std::map<std::string, std::string> metadata = archive.values();
  metadata.insert({{"checksum", std::string(detail::checksum_digits, '0')},
                   {"dylora", std::string(detail::checkpoint_kind)},
                   {"format", "pt"},
                   {"step", std::to_string(step)}});
  std::size_t size = 0;
  for (const TensorView& tensor : tensors) {
    detail::require_writable(tensor);
    size += tensor.bytes.size();
  }
  std::string bytes = safetensors_beginning(tensors, metadata);
  bytes.reserve(bytes.size() + size);
  for (const TensorView& tensor : tensors) bytes.append(reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size());
  return bytes.replace(detail::checksum_position, detail::checksum_digits, detail::checkpoint_checksum(std::as_bytes(std::span(bytes))));
}

/// The step of a checkpoint file, read without its state. Throws FormatError, beginning with `name`, if the bytes are damaged or no such
/// file. Costs one pass over the bytes.
inline Index checkpoint_step(std::span<const std::byte> bytes, const std::string& name) {
  detail::require_whole_checkpoint(bytes, name);
  return detail::parse_whole_checkpoint(bytes, name).step;
}

/// Gives `state` what the bytes of a checkpoint file hold, and returns its step. Throws FormatError, beginning with `name` and with nothing
/// changed, if they are damaged or of another run; the message names what differs, as CheckpointArchive::read does.
template <class State>
Index read_checkpoint(std::span<const std::byte> bytes, const std::string& name, State&& state) {
  detail::require_whole_checkpoint(bytes, name);
  const detail::CheckpointContents contents = detail::parse_whole_checkpoint(bytes, name);
  CheckpointArchive::read(contents.file, name, state);
  return contents.step;
}

}  // namespace dylora

#endif
