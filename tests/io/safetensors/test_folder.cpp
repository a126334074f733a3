#include "dylora/io/safetensors/folder.hpp"

#include <cstddef>
#include <filesystem>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "io/malformed_safetensors.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"
#include "support/throws.hpp"

namespace dylora::test {

namespace {

using nlohmann::json;

const std::string index_name = "model.safetensors.index.json";

/// A safetensors file of one float for each of these names.
void put_tensors(const std::filesystem::path& path, const std::map<std::string, float>& values) {
  std::vector<TensorView> tensors;
  for (const auto& [name, value] : values) tensors.push_back({name, DType::F32, {1}, std::as_bytes(std::span(&value, 1))});
  save_safetensors(path, tensors);
}

void put_index(const TemporaryFolder& folder, const json& weight_map) {
  put(folder / index_name, json{{"metadata", {{"total_size", 8}}}, {"weight_map", weight_map}}.dump());
}

/// Two shards, and the index that says so.
struct Shards : TemporaryFolder {
  Shards() {
    put_tensors(*this / "a.safetensors", {{"one", 1.0F}, {"two", 2.0F}});
    put_tensors(*this / "b.safetensors", {{"three", 3.0F}});
    put_index(*this, {{"one", "a.safetensors"}, {"three", "b.safetensors"}, {"two", "a.safetensors"}});
  }
};

float value_of(const SafetensorsFolder& model, std::string_view name) {
  const TensorView* tensor = model.find(name);
  REQUIRE(tensor != nullptr);
  float value = 0;
  copy_elements(*tensor, &value, model.name());
  return value;
}

auto parsed(const std::string& text) { return parse_safetensors_index(text, "an index"); }

/// How many this process has; 0 where the system does not say.
std::size_t open_files() {
  if (!std::filesystem::exists("/proc/self/fd")) return 0;
  const std::filesystem::directory_iterator files("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(files), end(files)));
}

}  // namespace

TEST_CASE("a model is one file, or the shards that its index names") {
  const TemporaryFolder whole;
  put_tensors(whole / "model.safetensors", {{"one", 1.0F}, {"two", 2.0F}, {"three", 3.0F}});
  const Shards shards;
  for (const auto& [path, files] : {std::pair(whole.path(), std::size_t{1}), std::pair(shards.path(), std::size_t{2})}) {
    const SafetensorsFolder model(path);
    CHECK(model.name() == path.string());
    CHECK(model.files().size() == files);
    CHECK(model.bytes() == 3 * sizeof(float));
    CHECK(value_of(model, "one") == 1);
    CHECK(value_of(model, "two") == 2);
    CHECK(value_of(model, "three") == 3);
    CHECK(model.find("four") == nullptr);
    CHECK(model.find("") == nullptr);
  }
}

TEST_CASE("a folder's tensors stay where they are mapped when it is moved, and when its files are removed") {
  Shards shards;
  SafetensorsFolder model(shards.path());
  const std::byte* before = model.find("three")->bytes.data();
  for (const char* file : {"a.safetensors", "b.safetensors"}) std::filesystem::remove(shards / file);
  const SafetensorsFolder moved = std::move(model);
  CHECK(moved.find("three")->bytes.data() == before);
  CHECK(value_of(moved, "three") == 3);
}

TEST_CASE("where there are both, the whole file is taken, and the index is not looked at") {
  const Shards folder;
  put_tensors(folder / "model.safetensors", {{"one", 7.0F}});
  put(folder / index_name, "no index");
  const SafetensorsFolder model(folder.path());
  CHECK(value_of(model, "one") == 7);
  CHECK(model.find("three") == nullptr);
  CHECK(model.files().size() == 1);
}

TEST_CASE("an index without a map of names is refused") {
  CHECK(parsed(R"({"weight_map": {"t": "model-00001-of-00002.safetensors"}})").at("t") == "model-00001-of-00002.safetensors");
  for (const char* text : {"[]", "3", "null", R"("weight_map")", R"([{"weight_map": {"t": "f"}}])", "{}", R"({"weight_map": {}})",
                           R"({"weight_map": null})", R"({"weight_map": []})", R"({"weight_map": ["t"]})", R"({"weight_map": "f"})"}) {
    INFO(text);
    CHECK_THROWS_SAYING(FormatError, parsed(text), "an index: expected an object with a weight_map that is not empty");
  }
  CHECK_THROWS_SAYING(FormatError, parsed(""), "an index: byte 0: expected JSON");
  CHECK_THROWS_SAYING(FormatError, parsed(R"({"weight_map": {"t": "f", "t": "g"}})"), "an index: key \"t\": expected once");
}

TEST_CASE("an index can name a file beside it and no other") {
  const std::pair<json, std::string> cases[] = {{"", R"("")"},
                                                {".", R"(".")"},
                                                {"..", R"("..")"},
                                                {"../x", R"("../x")"},
                                                {"/abs", R"("/abs")"},
                                                {"a/b", R"("a/b")"},
                                                {"a/", R"("a/")"},
                                                {"a\\b", R"("a\b")"},
                                                {"C:x", R"("C:x")"},
                                                {".hidden", R"(".hidden")"},
                                                {"~", R"("~")"},
                                                {"a\nb", R"("a\x0ab")"},
                                                {std::string("a\0b", 3), R"("a\x00b")"},
                                                {"a\x7f", R"("a\x7f")"},
                                                {"a\x1b[2J", R"("a\x1b[2J")"},
                                                {"\xe2\x80\xae", R"("\xe2\x80\xae")"},
                                                {"a b", R"("a b")"},
                                                {"%2e%2e/x", R"("%2e%2e/x")"},
                                                {"http://x", R"("http://x")"},
                                                {nullptr, "null"},
                                                {3, "number"},
                                                {true, "boolean"},
                                                {json::array({"f"}), "array"},
                                                {json{{"f", "f"}}, "object"}};
  const TemporaryFolder folder;
  for (const auto& [file, shown] : cases) {
    INFO(file);
    put_index(folder, {{"a", "f.safetensors"}, {"t", file}});
    const std::string message = (folder / index_name).string() + ": weight_map: tensor \"t\": expected the name of a file beside this one";
    CHECK_THROWS_SAYING(FormatError, SafetensorsFolder(folder.path()), message, "got " + shown);
  }
}

TEST_CASE("an index and its shards must agree") {
  const Shards folder;
  const json good = {{"one", "a.safetensors"}, {"three", "b.safetensors"}, {"two", "a.safetensors"}};
  const std::string index = (folder / index_name).string(), a = (folder / "a.safetensors").string(),
                    b = (folder / "b.safetensors").string();
  const auto with = [&](const json& patch) {
    json changed = good;
    changed.merge_patch(patch);
    put_index(folder, changed);
    return SafetensorsFolder(folder.path());
  };
  CHECK(with(json::object()).files().size() == 2);
  CHECK_THROWS_SAYING(FormatError, with({{"one", "b.safetensors"}}),
                      index + ": weight_map: tensor \"one\": expected in b.safetensors, which does not hold it");
  CHECK_THROWS_SAYING(FormatError, with({{"four", "a.safetensors"}}),
                      index + ": weight_map: tensor \"four\": expected in a.safetensors, which does not hold it");
  CHECK_THROWS_SAYING(FormatError, with({{"two", nullptr}}), a + ": tensor \"two\": expected in the index, got none");
  CHECK_THROWS_SAYING(FileError, with({{"four", "c.safetensors"}}), (folder / "c.safetensors").string() + ": cannot read");
  CHECK_THROWS_SAYING(FormatError, with({{"four", index_name}}), index + ": ");

  put_tensors(b, {{"one", 1.0F}, {"three", 3.0F}});
  CHECK_THROWS_SAYING(FormatError, with(json::object()), b + ": tensor \"one\": expected once in the model, got it in " + a + " too");
}

TEST_CASE("an index of more than 1000 shards is refused before the first is opened") {
  const TemporaryFolder folder;
  json map;
  for (int i = 0; i < 1000; ++i) map["t" + std::to_string(i)] = "f" + std::to_string(i);
  put_index(folder, map);
  CHECK_THROWS_SAYING(FileError, SafetensorsFolder(folder.path()), (folder / "f0").string() + ": cannot read");
  map["t1000"] = "f1000";  // none of them is there: to open one would be a FileError
  put_index(folder, map);
  CHECK_THROWS_SAYING(FormatError, SafetensorsFolder(folder.path()), index_name + ": expected at most 1000 shards, got 1001");
}

TEST_CASE("an index has at most 16 MiB") {
  const TemporaryFolder folder;
  put(folder / index_name, std::string((std::size_t{16} << 20) + 1, ' '));
  CHECK_THROWS_SAYING(FormatError, SafetensorsFolder(folder.path()),
                      index_name + ": expected at most 16777216 bytes of JSON, got 16777217");
}

TEST_CASE("a thousand shards are no more open files than one") {
  const TemporaryFolder folder;
  json map;
  for (int i = 0; i < 1000; ++i) {
    const std::string name = std::to_string(i);
    put(folder / name, safetensors_bytes("{" + described(name, R"("F32")", "[1]", "[0,4]") + "}", 4));
    map[name] = name;
  }
  put_index(folder, map);
  const std::size_t before = open_files();
  const SafetensorsFolder model(folder.path());
  CHECK(open_files() == before);
  CHECK(model.files().size() == 1000);
  CHECK(value_of(model, "0") == 0);
  CHECK(value_of(model, "999") == 0);
}

TEST_CASE("a folder that holds no model, or cannot be looked into, is a FileError with its name") {
  const TemporaryFolder folder;
  const auto refused = [&](const std::filesystem::path& path) { return SafetensorsFolder(path); };
  CHECK_THROWS_SAYING(FileError, refused(folder.path()), folder.path().string() + ": cannot read: expected model.safetensors or ",
                      "found neither");
  CHECK_THROWS_SAYING(FileError, refused(folder / "missing"), (folder / "missing").string() + ": cannot read", "found neither");
  put(folder / "file", "");
  CHECK_THROWS_SAYING(FileError, refused(folder / "file"), (folder / "file").string() + ": cannot read", "found neither");
  CHECK_THROWS_SAYING(FileError, refused(folder / std::string(1000, 'x')), std::string(1000, 'x') + "/model.safetensors: cannot read");
  std::filesystem::create_directory(folder / "model.safetensors");
  CHECK_THROWS_SAYING(FileError, refused(folder.path()), "model.safetensors: cannot read: expected a regular file");
}

}  // namespace dylora::test
