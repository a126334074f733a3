#ifndef DYLORA_IO_BYTES_MAPPED_FILE_HPP
#define DYLORA_IO_BYTES_MAPPED_FILE_HPP

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "dylora/core/error.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#else
#include <fstream>
#include <vector>
#endif

namespace dylora {

namespace detail {

[[noreturn]] inline void throw_file_error(const std::string& name, std::string_view what, int error) {
  throw FileError(name + ": " + std::string(what) + ": " + std::generic_category().message(error));
}

/// Calls a system function again for as long as a signal interrupts it.
template <class F>
auto uninterrupted(F call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

}  // namespace detail

/// The bytes of a file, mapped into memory: pages are read when they are first looked at, and shared with every other process that maps it.
///
/// The file may be renamed, replaced or removed meanwhile; the bytes stay. It must not be cut short in place: looking at bytes that are
/// gone ends the program (nothing in this library cuts a file short; see AtomicFile). Where there is no mmap, the file is read whole.
class MappedFile {
 public:
  /// Throws FileError, naming the path and the system's reason, if it cannot be read or is no regular file.
  explicit MappedFile(const std::filesystem::path& path) : name_(path.string()) { open(); }

  MappedFile(MappedFile&& other) noexcept { swap(other); }
  MappedFile& operator=(MappedFile&& other) noexcept {
    swap(other);
    return *this;
  }

  /// The path, as messages begin with it.
  const std::string& name() const { return name_; }

  /// The bytes as text.
  std::string_view text() const { return {reinterpret_cast<const char*>(bytes().data()), bytes().size()}; }

#if defined(__unix__) || defined(__APPLE__)
  ~MappedFile() {
    if (size_ > 0) munmap(bytes_, size_);
  }

  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(bytes_), size_}; }

 private:
  void open() {
    const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;  // a pipe must not make it wait
    const int file = detail::uninterrupted([&] { return ::open(name_.c_str(), flags); });
    if (file < 0) detail::throw_file_error(name_, "cannot read", errno);
    struct stat status {};
    const bool known = fstat(file, &status) == 0;
    const int error = errno;
    if (known && S_ISREG(status.st_mode) && status.st_size > 0) {
      size_ = static_cast<std::size_t>(status.st_size);
      bytes_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    }
    const int map_error = errno;
    close(file);  // the mapping keeps what it needs
    if (!known) detail::throw_file_error(name_, "cannot read", error);
    if (!S_ISREG(status.st_mode)) throw FileError(name_ + ": cannot read: expected a regular file, found a folder or a device");
    if (bytes_ == MAP_FAILED) {
      size_ = 0;
      detail::throw_file_error(name_, "cannot map", map_error);
    }
  }

  void swap(MappedFile& other) noexcept {
    std::swap(name_, other.name_);
    std::swap(bytes_, other.bytes_);
    std::swap(size_, other.size_);
  }

  std::string name_;
  void* bytes_ = nullptr;
  std::size_t size_ = 0;
#else
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  void open() {
    std::error_code error;
    const auto size = std::filesystem::file_size(name_, error);
    if (error) throw FileError(name_ + ": cannot read: " + error.message());
    bytes_.resize(static_cast<std::size_t>(size));
    std::ifstream in(name_, std::ios::binary);
    if (!in.read(reinterpret_cast<char*>(bytes_.data()), static_cast<std::streamsize>(size))) throw FileError(name_ + ": cannot read");
  }

  void swap(MappedFile& other) noexcept {
    std::swap(name_, other.name_);
    std::swap(bytes_, other.bytes_);
  }

  std::string name_;
  std::vector<std::byte> bytes_;
#endif
};

}  // namespace dylora

#endif
