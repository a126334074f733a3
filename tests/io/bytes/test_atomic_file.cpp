#include "dylora/io/bytes/atomic_file.hpp"

#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/random.hpp"
#include "support/catch.hpp"
#include "support/process.hpp"
#include "support/temporary_folder.hpp"
#include "support/throws.hpp"

namespace {

/// What goes wrong in the system's functions below, which take the place of the C library's in this program.
struct {
  bool no_locks = false, fsync_fails = false, interrupted = false;
  std::size_t most_at_once = SIZE_MAX;
  int calls = 0;
  const char* lost = nullptr;  // the file that somebody removes between its opening and its locking
  int times_lost = 0;          // so often

  /// Every other call, if signals are to interrupt.
  bool interrupts() { return interrupted && ++calls % 2 == 1; }
} faults;

int failed(int error) {
  errno = error;
  return -1;
}

}  // namespace

extern "C" int flock(int file, int operation) noexcept {
  if (faults.times_lost > 0) {
    --faults.times_lost;
    unlink(faults.lost);
  }
  return faults.no_locks ? failed(ENOSYS) : static_cast<int>(syscall(SYS_flock, file, operation));
}

extern "C" int fsync(int file) {
  if (faults.interrupts()) return failed(EINTR);
  return faults.fsync_fails ? failed(EIO) : static_cast<int>(syscall(SYS_fsync, file));
}

extern "C" int ftruncate(int file, off_t size) noexcept {
  return faults.interrupts() ? failed(EINTR) : static_cast<int>(syscall(SYS_ftruncate, file, size));
}

extern "C" ssize_t write(int file, const void* bytes, std::size_t count) {
  return faults.interrupts() ? failed(EINTR) : syscall(SYS_write, file, bytes, std::min(count, faults.most_at_once));
}

namespace dylora::test {

namespace {

namespace fs = std::filesystem;

void save(const fs::path& path, std::string_view contents) {
  AtomicFile file(path);
  file.write(contents);
  file.commit();
}

/// What is the matter with how that fails: it throws FileError saying so, "file" keeps its contents, and no part is left.
template <class Call>
std::string wrong_failure(const fs::path& path, Call&& call, std::initializer_list<std::string_view> says) {
  const std::string before = contents_of(path), wrong = wrong_throw<FileError>(call, says);
  if (!wrong.empty()) return wrong;
  if (contents_of(path) != before) return "the file was changed";
  return fs::exists(path.string() + ".part") ? "a part was left" : "";
}

const std::string somebody = ".part: cannot write: somebody else is writing it";

}  // namespace

TEST_CASE("a file takes its name whole, when it is committed") {
  const TemporaryFolder folder;
  put(folder / "file", "before");
  {
    AtomicFile file(folder / "file");
    for (int i = 0; i < 1000; ++i) file.write("some " + std::to_string(i));
    CHECK(contents_of(folder / "file") == "before");
    file.sync();
    CHECK(contents_of(folder / "file") == "before");
    file.write("end");
    file.commit();
    const std::string after = contents_of(folder / "file");
    CHECK(after.starts_with("some 0some 1some 2"));
    CHECK(after.ends_with("some 999end"));
    CHECK(!fs::exists(folder / "file.part"));
  }
  CHECK(contents_of(folder / "file").size() == 5 * 1000 + 10 + 2 * 90 + 3 * 900 + 3);
  save(folder / "new", "");
  CHECK(contents_of(folder / "new").empty());
}

TEST_CASE("a file that is replaced keeps its permissions, and its part has no others but for its owner") {
  const TemporaryFolder folder;
  const auto permissions = [&](const char* name) { return static_cast<unsigned>(fs::status(folder / name).permissions()); };
  for (const unsigned mode : {0600u, 0640u, 0777u, 0444u, 02711u}) {
    put(folder / "file", "before");
    fs::permissions(folder / "file", static_cast<fs::perms>(mode));
    AtomicFile file(folder / "file");
    CHECK(permissions("file.part") == (mode | 0600u));
    file.write("after");
    file.commit();
    CHECK(permissions("file") == mode);
    fs::remove(folder / "file");
  }
  // Nothing, or a link to somewhere, has no permissions to keep.
  save(folder / "new", "");
  put(folder / "secret", "");
  fs::permissions(folder / "secret", fs::perms::owner_read);
  fs::create_symlink("secret", folder / "link");
  save(folder / "link", "");
  CHECK(permissions("link") == permissions("new"));
  CHECK(permissions("new") != 0400u);
}

TEST_CASE("without a commit, nothing has happened") {
  const TemporaryFolder folder;
  put(folder / "file", "before");
  { AtomicFile(folder / "file").write("after"); }
  { AtomicFile(folder / "new").write("after"); }
  CHECK(contents_of(folder / "file") == "before");
  CHECK(std::distance(fs::directory_iterator(folder.path()), {}) == 1);
}

TEST_CASE("a name without a folder is one in the current folder") {
  const TemporaryFolder folder;
  CHECK(in_child([&] {
          fs::current_path(folder.path());
          save("file", "contents");
          return std::string("saved");
        }) == "saved");
  CHECK(contents_of(folder / "file") == "contents");
}

TEST_CASE("a full disk leaves the file as it was, and is said") {
  const TemporaryFolder folder;
  put(folder / "file", "before");
  for (const std::size_t size : {100'001u, 1'000'000u}) {
    CHECK(in_child([&] {
            std::signal(SIGXFSZ, SIG_IGN);
            const rlimit limit{100'000, 100'000};
            if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return std::string("cannot set a limit");
            const auto call = [&] { save(folder / "file", std::string(size, 'x')); };
            return wrong_failure(folder / "file", call, {(folder / "file.part").string() + ": cannot write: File too large"});
          }) == "");
  }
}

TEST_CASE("after a write that failed, nothing can be committed") {
  const TemporaryFolder folder;
  put(folder / "file", "before");
  CHECK(in_child([&] {
          std::signal(SIGXFSZ, SIG_IGN);
          const rlimit limit{1000, 1000};
          if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return std::string("cannot set a limit");
          AtomicFile file(folder / "file");
          std::string wrong = wrong_throw<FileError>([&] { file.write(std::string(2000, 'x')); }, {"File too large"});
          const auto later = [&](auto call) { return wrong_throw<FileError>(call, {"file: cannot write: an earlier attempt failed"}); };
          return wrong + later([&] { file.write("x"); }) + later([&] { file.sync(); }) + later([&] { file.commit(); });
        }) == "");
  CHECK(contents_of(folder / "file") == "before");
}

TEST_CASE("a disk that fails when it is waited for leaves the file as it was") {
  const TemporaryFolder folder;
  put(folder / "file", "before");
  CHECK(in_child([&] {
          faults.fsync_fails = true;
          return wrong_failure(folder / "file", [&] { save(folder / "file", "after"); }, {"file.part: cannot write: Input/output error"});
        }) == "");
  CHECK(in_child([&] {
          AtomicFile file(folder / "file");
          file.write("after");
          faults.fsync_fails = true;
          const std::string wrong = wrong_throw<FileError>([&] { file.sync(); }, {"file.part: cannot write: Input/output error"});
          faults.fsync_fails = false;  // as systems do: an error is reported once
          return wrong + wrong_throw<FileError>([&] { file.commit(); }, {"file: cannot write: an earlier attempt failed"});
        }) == "");
  CHECK(contents_of(folder / "file") == "before");
}

TEST_CASE("a file that is committed is closed to more") {
  const TemporaryFolder folder;
  AtomicFile file(folder / "file");
  file.write("contents");
  file.commit();
  const std::string says = (folder / "file").string() + ": cannot write: it is committed already";
  CHECK_THROWS_SAYING(FileError, file.write("more"), says);
  CHECK_THROWS_SAYING(FileError, file.sync(), says);
  CHECK_THROWS_SAYING(FileError, file.commit(), says);
  CHECK(contents_of(folder / "file") == "contents");
  save(folder / "file", "of another");  // which need not wait for the first to go
  CHECK(contents_of(folder / "file") == "of another");
}

TEST_CASE("signals and short writes change nothing") {
  const TemporaryFolder folder;
  const std::string contents(10'000, 'c');
  CHECK(in_child([&] {
          faults.interrupted = true;
          faults.most_at_once = 7;
          save(folder / "file", contents);
          faults.interrupted = false;
          faults.most_at_once = SIZE_MAX;
          return faults.calls > 2 * 10'000 / 7 ? std::string("saved") : std::string("not interrupted");
        }) == "saved");
  CHECK(contents_of(folder / "file") == contents);
}

TEST_CASE("a folder that may not be written to is left as it was") {
  const TemporaryFolder folder;
  put(folder / "file", "before");
  fs::permissions(folder.path(), fs::perms::owner_read | fs::perms::owner_exec | fs::perms::others_read | fs::perms::others_exec);
  CHECK(in_child([&] {
          drop_privileges();
          const auto call = [&] { save(folder / "file", "after"); };
          return wrong_failure(folder / "file", call, {(folder / "file.part").string() + ": cannot write: Permission denied"});
        }) == "");
  fs::permissions(folder.path(), fs::perms::owner_all);
}

TEST_CASE("a folder that is not there, or vanishes, is said") {
  const TemporaryFolder folder;
  const fs::path path = folder / "folder" / "file";
  CHECK_THROWS_SAYING(FileError, AtomicFile(path), path.string() + ".part: cannot write: No such file or directory");
  fs::create_directory(folder / "folder");
  AtomicFile file(path);
  file.write("contents");
  fs::remove_all(folder / "folder");
  CHECK_THROWS_SAYING(FileError, file.commit(), path.string() + ".part: cannot rename: it was removed, or replaced by another file");
  CHECK(!fs::exists(folder / "folder"));
}

TEST_CASE("a part that somebody removed or replaced does not take the name") {
  const TemporaryFolder folder;
  put(folder / "file", "before");
  for (const bool replaced : {false, true}) {
    {
      AtomicFile file(folder / "file");
      file.write("after");
      fs::remove(folder / "file.part");
      if (replaced) put(folder / "file.part", "somebody else's");
      CHECK_THROWS_SAYING(FileError, file.commit(), "file.part: cannot rename: it was removed, or replaced by another file");
    }
    CHECK(contents_of(folder / "file") == "before");
    CHECK(fs::exists(folder / "file.part") == replaced);
  }
  CHECK(contents_of(folder / "file.part") == "somebody else's");
}

TEST_CASE("a folder of that name stays") {
  const TemporaryFolder folder;
  fs::create_directory(folder / "name");
  put(folder / "name" / "inside", "inside");
  CHECK_THROWS_SAYING(FileError, save(folder / "name", "contents"), (folder / "name").string() + ": cannot write: ", "directory");
  CHECK(contents_of(folder / "name" / "inside") == "inside");
  CHECK(!fs::exists(folder / "name.part"));
}

TEST_CASE("a symbolic link of that name is replaced, and what it points to stays") {
  const TemporaryFolder folder;
  put(folder / "blob", "blob");
  fs::create_symlink("blob", folder / "link");
  save(folder / "link", "contents");
  CHECK(contents_of(folder / "blob") == "blob");
  CHECK(contents_of(folder / "link") == "contents");
  CHECK(fs::is_regular_file(fs::symlink_status(folder / "link")));
}

TEST_CASE("a part that is a symbolic link, a folder or a pipe is not written to") {
  const TemporaryFolder folder;
  put(folder / "victim", "victim");
  fs::create_symlink("victim", folder / "link.part");
  fs::create_directory(folder / "folder.part");
  REQUIRE(mkfifo((folder / "pipe.part").c_str(), 0600) == 0);
  CHECK_THROWS_SAYING(FileError, AtomicFile(folder / "link"), "link.part: cannot write: Too many levels of symbolic links");
  CHECK_THROWS_SAYING(FileError, AtomicFile(folder / "folder"), "folder.part: cannot write: Is a directory");
  CHECK(in_child([&] {
          alarm(20);
          return wrong_throw<FileError>([&] { AtomicFile(folder / "pipe"); }, {"pipe.part: cannot write: expected a regular file"});
        }) == "");
  CHECK(contents_of(folder / "victim") == "victim");
  CHECK(fs::is_fifo(folder / "pipe.part"));
}

TEST_CASE("of two writers to one name the second is refused, until the first is done") {
  const TemporaryFolder folder;
  const auto refused = [&] {
    return wrong_throw<FileError>([&] { AtomicFile(folder / "file"); }, {(folder / "file").string() + somebody});
  };
  {
    AtomicFile first(folder / "file");
    first.write("first");
    CHECK(refused() == "");
    CHECK(in_child(refused) == "");
    AtomicFile(folder / "other").write("two names do not meet");
    first.commit();
    CHECK(contents_of(folder / "file") == "first");
  }
  CHECK(refused() == "nothing was thrown");
  CHECK(in_child(refused) == "nothing was thrown");
  save(folder / "file", "second");
  CHECK(contents_of(folder / "file") == "second");
}

TEST_CASE("a part that its last owner takes away as it is opened is made once more, and no further") {
  const TemporaryFolder folder;
  const std::string part = (folder / "file.part").string();
  CHECK(in_child([&] {
          faults.lost = part.c_str();
          faults.times_lost = 1;
          save(folder / "file", "contents");
          faults.times_lost = 2;
          return wrong_throw<FileError>([&] { AtomicFile(folder / "file"); }, {(folder / "file").string() + somebody});
        }) == "");
  CHECK(contents_of(folder / "file") == "contents");
}

TEST_CASE("a file system without locks is written to without") {
  const TemporaryFolder folder;
  CHECK(in_child([&] {
          faults.no_locks = true;
          save(folder / "file", "contents");
          return std::string("saved");
        }) == "saved");
  CHECK(contents_of(folder / "file") == "contents");
}

TEST_CASE("the part of a process that was killed is written over") {
  const TemporaryFolder folder;
  CHECK(in_child([&] {
          AtomicFile file(folder / "file");
          file.write(std::string(1000, 'x'));
          raise(SIGKILL);
          return std::string();
        }) == "ended by signal 9");
  CHECK(contents_of(folder / "file.part") == std::string(1000, 'x'));
  save(folder / "file", "contents");
  CHECK(contents_of(folder / "file") == "contents");
  CHECK(!fs::exists(folder / "file.part"));
}

TEST_CASE("a process killed at any moment leaves one of the two contents, whole") {
  const TemporaryFolder folder;
  const std::string a(300'000, 'a'), b(200'000, 'b');
  save(folder / "file", a);
  Rng rng(1);
  int half_done = 0, torn = 0;
  for (int i = 0; i < 50; ++i) {
    ChildProcess child([&]() -> std::string {
      for (;;) {
        save(folder / "file", b);
        save(folder / "file", a);
      }
    });
    usleep(static_cast<useconds_t>(rng.below(20'000)));
    child.kill();
    CHECK(child.wait() == "ended by signal 9");
    half_done += fs::exists(folder / "file.part");
    const std::string got = contents_of(folder / "file");
    torn += got != a && got != b;
  }
  CHECK(torn == 0);
  CHECK(half_done > 0);  // else nothing was put to the test
}

TEST_CASE("of many writers at once, each is refused or writes a whole file") {
  constexpr std::size_t size = 100'000;
  const TemporaryFolder folder;
  put(folder / "file", std::string(size, '-'));
  std::deque<ChildProcess> children;
  for (const char letter : {'a', 'b', 'c', 'd'}) {
    children.emplace_back([&folder, letter] {
      for (int saved = 0; saved < 20;) {
        try {
          save(folder / "file", std::string(size, letter));
          ++saved;
        } catch (const FileError& error) {
          if (std::string_view(error.what()).find(somebody) == std::string_view::npos) throw;
        }
      }
      return std::string("saved");
    });
  }
  int torn = 0;
  for (int i = 0; i < 500; ++i) {
    const std::string got = contents_of(folder / "file");
    torn += got.size() != size || got != std::string(size, got[0]);
  }
  CHECK(torn == 0);
  for (ChildProcess& child : children) CHECK(child.wait() == "saved");
  CHECK(!fs::exists(folder / "file.part"));
}

}  // namespace dylora::test
