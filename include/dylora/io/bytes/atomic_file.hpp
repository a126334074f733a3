#ifndef DYLORA_IO_BYTES_ATOMIC_FILE_HPP
#define DYLORA_IO_BYTES_ATOMIC_FILE_HPP

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "dylora/core/error.hpp"
#include "dylora/io/bytes/locked_file.hpp"

namespace dylora {

/// A file that appears under its name whole or not at all: it is written beside it under the name with ".part", which takes the name when
/// everything is on the disk. What was there before stays until then, also if the disk is full or the process is killed. If that was a
/// symbolic link, the link is replaced, and not what it points to. A file of this user's that is replaced keeps its permissions, which are
/// those of the part too, so that nobody sees it who may not.
///
///     AtomicFile file("adapter_model.safetensors");
///     file.write(header);
///     file.write(data);
///     file.commit();
///
/// Two that write to one name at once, in one process or two: the second throws (unless the file system has no locks). A part that a killed
/// process left is written over.
class AtomicFile {
 public:
  /// Throws FileError if the part cannot be opened, or if somebody else is writing it.
  explicit AtomicFile(std::filesystem::path path) : path_(std::move(path)), part_(path_.string() + ".part") {
    part_.clear();
    constexpr unsigned owner_may_read_and_write = 0600;  // else a part that is left could not be written over
    part_.take_permissions(path_, owner_may_read_and_write);
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// Without commit, nothing has happened.
  ~AtomicFile() {
    if (state_ != State::committed) part_.remove();
  }

  /// Throws FileError if the bytes cannot be written. After that, nothing but the destructor is of use: the file is not whole.
  void write(std::span<const std::byte> bytes) {
    change([&] { part_.write(bytes); });
  }
  void write(std::string_view bytes) { write(std::as_bytes(std::span(bytes))); }

  /// Waits until all that was written is on the disk. Who commits several files syncs all of them first: then little can go wrong between.
  void sync() {
    change([&] { part_.sync(); });
  }

  /// Takes the name. Throws FileError if that fails; what had the name still has it.
  void commit() {
    change([&] { part_.take_permissions(path_); });
    sync();
    change([&] { part_.rename(path_); });
    state_ = State::committed;
    detail::sync_folder(path_.has_parent_path() ? path_.parent_path() : ".");
  }

 private:
  enum class State { open, failed, committed };

  template <class F>
  void change(F&& f) {
    if (state_ == State::committed) throw FileError(path_.string() + ": cannot write: it is committed already");
    if (state_ == State::failed) throw FileError(path_.string() + ": cannot write: an earlier attempt failed");
    state_ = State::failed;
    f();
    state_ = State::open;
  }

  std::filesystem::path path_;
  detail::LockedFile part_;
  State state_ = State::open;
};

}  // namespace dylora

#endif
