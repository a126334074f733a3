#ifndef DYLORA_IO_ATOMIC_FILE_HPP
#define DYLORA_IO_ATOMIC_FILE_HPP

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "dylora/core/error.hpp"
#include "dylora/io/mapped_file.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#else
#include <fstream>
#endif

namespace dylora {

namespace detail {

#if defined(__unix__) || defined(__APPLE__)

/// A file that this process alone has open for writing, as long as every writer asks this way. The lock goes with the process, however it
/// ends.
class LockedFile {
 public:
  /// Opens or makes the file. Throws FileError if it cannot be, or if another LockedFile has it.
  explicit LockedFile(std::string name) : name_(std::move(name)) {
    for (;;) {
      file_ = ::open(name_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
      if (file_ < 0) throw_file_error(name_, "cannot write", errno);
      if (flock(file_, LOCK_EX | LOCK_NB) != 0) {
        const int error = errno;
        ::close(file_);
        if (error == EWOULDBLOCK) throw FileError(name_ + ": cannot write: another process is writing there");
        throw_file_error(name_, "cannot lock", error);
      }
      struct stat locked {
      }, named{};
      if (fstat(file_, &locked) == 0 && ::stat(name_.c_str(), &named) == 0 && locked.st_ino == named.st_ino &&
          locked.st_dev == named.st_dev)
        return;
      ::close(file_);  // between opening and locking, its owner gave it another name
    }
  }
  LockedFile(const LockedFile&) = delete;
  LockedFile& operator=(const LockedFile&) = delete;
  ~LockedFile() { ::close(file_); }

  const std::string& name() const { return name_; }

  void clear() {
    if (ftruncate(file_, 0) != 0) throw_file_error(name_, "cannot write", errno);
  }

  void write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t written = ::write(file_, bytes.data(), bytes.size());
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) throw_file_error(name_, "cannot write", errno);
      bytes = bytes.subspan(static_cast<std::size_t>(written));
    }
  }

  void sync() {
    if (fsync(file_) != 0) throw_file_error(name_, "cannot write", errno);
  }

 private:
  std::string name_;
  int file_ = -1;
};

/// What was renamed in `folder` stays so if the power fails.
inline void sync_folder(const std::filesystem::path& folder) {
  const int file = ::open(folder.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return;
  fsync(file);  // some file systems cannot, and then need not
  close(file);
}

#else

/// Without locks: where the system has none of POSIX's.
class LockedFile {
 public:
  explicit LockedFile(std::string name) : name_(std::move(name)) { clear(); }
  const std::string& name() const { return name_; }
  void clear() {
    if (file_.is_open()) file_.close();
    file_.open(name_, std::ios::binary | std::ios::trunc);
    check();
  }
  void write(std::span<const std::byte> bytes) {
    file_.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    check();
  }
  void sync() {
    file_.close();
    check();
  }

 private:
  void check() const {
    if (!file_) throw FileError(name_ + ": cannot write");
  }
  std::string name_;
  std::ofstream file_;
};

inline void sync_folder(const std::filesystem::path&) {}

#endif

}  // namespace detail

/// A file that appears under its name whole or not at all: it is written beside it under the name with ".part", which takes the name when
/// everything is on the disk. What was there before stays until then, also if the disk is full or the process is killed.
///
///     AtomicFile file("adapter_model.safetensors");
///     file.write(header);
///     file.write(data);
///     file.commit();
///
/// Two that write to one name at once, in one process or two: the second throws. A part that a killed process left is written over.
class AtomicFile {
 public:
  /// Throws FileError if the part cannot be opened, or if somebody else is writing it.
  explicit AtomicFile(std::filesystem::path path) : path_(std::move(path)), part_(path_.string() + ".part") { part_.clear(); }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// Without commit, nothing has happened.
  ~AtomicFile() {
    std::error_code ignored;
    if (!committed_) std::filesystem::remove(part_.name(), ignored);
  }

  /// Throws FileError if the bytes cannot be written.
  void write(std::span<const std::byte> bytes) { part_.write(bytes); }
  void write(std::string_view bytes) { write(std::as_bytes(std::span(bytes))); }

  /// Waits until all that was written is on the disk. Who commits several files syncs all of them first: then little can go wrong between.
  void sync() { part_.sync(); }

  /// Takes the name. Throws FileError if that fails; what had the name still has it.
  void commit() {
    sync();
    std::error_code error;
    std::filesystem::rename(part_.name(), path_, error);
    if (error) throw FileError(path_.string() + ": cannot write: " + error.message());
    committed_ = true;
    detail::sync_folder(path_.has_parent_path() ? path_.parent_path() : ".");
  }

 private:
  std::filesystem::path path_;
  detail::LockedFile part_;
  bool committed_ = false;
};

}  // namespace dylora

#endif
