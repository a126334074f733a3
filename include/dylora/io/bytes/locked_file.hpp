#ifndef DYLORA_IO_BYTES_LOCKED_FILE_HPP
#define DYLORA_IO_BYTES_LOCKED_FILE_HPP

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#include "dylora/core/error.hpp"
#include "dylora/io/bytes/mapped_file.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#else
#include <fstream>
#endif

namespace dylora::detail {

#if defined(__unix__) || defined(__APPLE__)

/// A file that nobody else has open for writing, as long as every writer asks this way. The lock goes with the process, however it ends.
/// A process that forks shares the lock with its child: it is free when both have ended, or closed the file. A child that only calls exec
/// gives it up then.
class LockedFile {
 public:
  /// Opens or makes the file. Throws FileError if it cannot be, if it is no regular file, or if another LockedFile has it. A file system
  /// without locks gives none.
  explicit LockedFile(std::string name) : name_(std::move(name)) {
    // Between opening and locking, who had the lock may have removed the file, or given it another name. Then it is free: once more.
    if (!take() && !take()) throw FileError(name_ + somebody);
  }
  LockedFile(const LockedFile&) = delete;
  LockedFile& operator=(const LockedFile&) = delete;
  ~LockedFile() { ::close(file_); }

  const std::string& name() const { return name_; }

  /// Gives it the permissions of the file `other` and `more`, if that is a regular file of this user's.
  void take_permissions(const std::filesystem::path& other, mode_t more = 0) {
    struct stat own {};
    struct stat theirs {};
    if (lstat(other.c_str(), &theirs) != 0 || !S_ISREG(theirs.st_mode) || theirs.st_uid != geteuid()) return;
    const mode_t wanted = (theirs.st_mode & 07777) | more;
    if (fstat(file_, &own) == 0 && (own.st_mode & 07777) == wanted) return;  // some file systems have only one for all files
    if (fchmod(file_, wanted) != 0) throw_file_error(name_, "cannot set the permissions", errno);
  }

  void clear() {
    if (uninterrupted([&] { return ::ftruncate(file_, 0); }) != 0) throw_file_error(name_, "cannot write", errno);
  }

  void write(std::span<const std::byte> bytes) {
    constexpr std::size_t most = std::size_t{1} << 30;  // some systems refuse more at once
    while (!bytes.empty()) {
      const ssize_t written = uninterrupted([&] { return ::write(file_, bytes.data(), std::min(bytes.size(), most)); });
      if (written < 0) throw_file_error(name_, "cannot write", errno);
      bytes = bytes.subspan(static_cast<std::size_t>(written));
    }
  }

  void sync() {
    if (uninterrupted([&] { return ::fsync(file_); }) != 0) throw_file_error(name_, "cannot write", errno);
  }

  /// Gives it the name `to`, in place of what has that. Throws FileError.
  void rename(const std::filesystem::path& to) {
    if (!has_name()) throw FileError(name_ + ": cannot rename: it was removed, or replaced by another file");
    const int error = ::rename(name_.c_str(), to.c_str()) == 0 ? 0 : errno;
    if (error != 0) throw_file_error(to.string(), "cannot write", error);
  }

  void remove() {
    if (has_name()) ::unlink(name_.c_str());
  }

 private:
  static constexpr const char* somebody = ": cannot write: somebody else is writing it";

  /// Opens the file and locks it. False if it no longer has the name.
  bool take() {
    file_ = uninterrupted([&] { return ::open(name_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666); });
    if (file_ < 0) throw_file_error(name_, "cannot write", errno);
    try {
      lock();
    } catch (...) {
      ::close(file_);
      throw;
    }
    if (has_name()) return true;
    ::close(file_);
    return false;
  }

  void lock() {
    struct stat opened {};
    if (fstat(file_, &opened) != 0) throw_file_error(name_, "cannot write", errno);
    if (!S_ISREG(opened.st_mode)) throw FileError(name_ + ": cannot write: expected a regular file, found something else");
    const int error = flock(file_, LOCK_EX | LOCK_NB) == 0 ? 0 : errno;
    const bool no_locks = error == ENOSYS || error == EOPNOTSUPP || error == ENOLCK;  // this file system has none
    if (error != 0 && error != EWOULDBLOCK && !no_locks) throw_file_error(name_, "cannot lock", error);
    if (error == EWOULDBLOCK) throw FileError(name_ + somebody);
  }

  /// Whether the file of that name is still this one.
  bool has_name() const {
    struct stat opened {};
    struct stat named {};
    return fstat(file_, &opened) == 0 && lstat(name_.c_str(), &named) == 0 && opened.st_ino == named.st_ino &&
           opened.st_dev == named.st_dev;
  }

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
  explicit LockedFile(std::string name) : name_(std::move(name)) { write({}); }

  const std::string& name() const { return name_; }

  void take_permissions(const std::filesystem::path&, unsigned = 0) {}

  void clear() {
    file_.close();
    open(std::ios::trunc);
  }

  void write(std::span<const std::byte> bytes) {
    if (!file_.is_open()) open(std::ios::app);
    file_.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    check();
  }

  void sync() {
    if (file_.is_open()) file_.close();
    check();
  }

  void rename(const std::filesystem::path& to) {
    sync();  // an open file keeps its name
    std::error_code error;
    std::filesystem::rename(name_, to, error);
    if (error) throw FileError(to.string() + ": cannot write: " + error.message());
  }

  void remove() {
    std::error_code ignored;
    file_.close();
    std::filesystem::remove(name_, ignored);
  }

 private:
  void open(std::ios::openmode mode) {
    file_.open(name_, std::ios::binary | mode);
    check();
  }

  void check() const {
    if (!file_) throw FileError(name_ + ": cannot write");
  }

  std::string name_;
  std::ofstream file_;
};

inline void sync_folder(const std::filesystem::path&) {}

#endif

}  // namespace dylora::detail

#endif
