#include "dylora/io/bytes/mapped_file.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <cstddef>
#include <filesystem>
#include <string>
#include <utility>

#include "support/catch.hpp"
#include "support/process.hpp"
#include "support/temporary_folder.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

std::string refusal(const std::filesystem::path& path, std::string_view reason) {
  return wrong_throw<FileError>([&] { MappedFile{path}; }, {path.string() + ": cannot read: ", reason});
}

}  // namespace

TEST_CASE("a mapped file has the bytes and the name of the file") {
  const TemporaryFolder folder;
  const std::string pages = std::string(100'000, 'p') + '\0' + "end";
  put(folder / "file", pages);
  put(folder / "empty", "");
  const MappedFile file(folder / "file"), empty(folder / "empty");
  CHECK(file.name() == (folder / "file").string());
  CHECK(file.text() == pages);
  CHECK(file.bytes().size() == pages.size());
  CHECK(empty.bytes().empty());
  CHECK(empty.text().empty());
}

TEST_CASE("the bytes stay when the file is renamed, replaced or removed") {
  const TemporaryFolder folder;
  const std::string before(50'000, 'b'), after(10, 'a');
  put(folder / "removed", before);
  put(folder / "replaced", before);
  put(folder / "new", after);
  const MappedFile removed(folder / "removed"), replaced(folder / "replaced");
  std::filesystem::remove(folder / "removed");
  std::filesystem::rename(folder / "new", folder / "replaced");
  CHECK(removed.text() == before);
  CHECK(replaced.text() == before);
  CHECK(MappedFile(folder / "replaced").text() == after);
}

TEST_CASE("a mapping can be moved") {
  const TemporaryFolder folder;
  put(folder / "a", "aaa");
  put(folder / "b", "b");
  MappedFile a(folder / "a"), b(folder / "b");
  const std::byte* where = a.bytes().data();
  MappedFile moved(std::move(a));
  CHECK(moved.bytes().data() == where);
  b = std::move(moved);
  CHECK(b.bytes().data() == where);
  CHECK(b.text() == "aaa");
  CHECK(b.name() == (folder / "a").string());
}

TEST_CASE("a symbolic link is followed") {
  const TemporaryFolder folder;
  put(folder / "blob", "contents");
  std::filesystem::create_symlink("blob", folder / "link");
  std::filesystem::create_symlink("nothing", folder / "dangling");
  CHECK(MappedFile(folder / "link").text() == "contents");
  CHECK(refusal(folder / "dangling", "No such file or directory") == "");
}

TEST_CASE("what is no file that can be read is refused with the path and the reason") {
  const TemporaryFolder folder;
  put(folder / "file", "");
  CHECK(refusal(folder / "missing", "No such file or directory") == "");
  CHECK(refusal(folder / "file/below", "Not a directory") == "");
  CHECK(refusal(folder.path(), "expected a regular file, found a folder or a device") == "");
  CHECK(refusal("/dev/null", "expected a regular file, found a folder or a device") == "");
}

TEST_CASE("a pipe is refused at once, not waited for") {
  const TemporaryFolder folder;
  REQUIRE(mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK(in_child([&] {
          alarm(20);
          return refusal(folder / "pipe", "expected a regular file, found a folder or a device");
        }) == "");
}

TEST_CASE("a file that may not be read is refused") {
  const TemporaryFolder folder;
  std::filesystem::permissions(folder.path(), std::filesystem::perms::all);
  put(folder / "secret", "secret");
  std::filesystem::permissions(folder / "secret", std::filesystem::perms::none);
  CHECK(in_child([&] {
          drop_privileges();
          return refusal(folder / "secret", "Permission denied");
        }) == "");
}

}  // namespace dylora::test
