#ifndef DYLORA_IO_BYTES_FILE_KIND_HPP
#define DYLORA_IO_BYTES_FILE_KIND_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

namespace dylora {

/// What a file is by its first bytes, for the message about one that is not what it should be: what people have in place of a model. To be
/// read after "it looks like "; empty if unknown. A guess, never a check.
inline std::string_view likely_kind(std::span<const std::byte> bytes) {
  std::uint64_t header = 0;
  const std::string_view start(reinterpret_cast<const char*>(bytes.data()), std::min(bytes.size(), std::size_t{256}));
  if (start.size() > sizeof header) std::memcpy(&header, start.data(), sizeof header);
  if (header > 0 && header <= bytes.size() - sizeof header && start[sizeof header] == '{') return "a safetensors file";
  if (start.starts_with("GGUF")) return "a GGUF file";
  if (start.starts_with("version https://git-lfs")) return "a Git LFS pointer: the file itself is still to be fetched, by git lfs pull";
  if (start.starts_with("PK\3\4")) return "a zip archive, as torch.save writes";
  if (start.size() > 1 && start[0] == '\x80' && start[1] >= 2 && start[1] <= 5)
    return "a Python pickle, as older versions of torch.save write";
  if (start.starts_with("\x89HDF\r\n")) return "an HDF5 file";
  if (start.starts_with("\x1f\x8b")) return "a gzip archive";

  if (start.find('\0') == start.npos) {
    const std::string_view text = start.substr(std::min(start.find_first_not_of("\xef\xbb\xbf \t\r\n"), start.size()));
    if (text.starts_with('<')) return "a web page, perhaps the server's error message";
    if (text.starts_with('{') || text.starts_with('[')) return "JSON, perhaps the server's error message or an index of other files";
  }
  if (!start.empty() && start.find_first_not_of('\0') == start.npos) return "zeros, perhaps of a download that was interrupted";
  return "";
}

}  // namespace dylora

#endif
