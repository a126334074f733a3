#include "dylora/io/checkpoint/checkpoint.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/adapters/dropout.hpp"
#include "dylora/adapters/low_rank.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/random.hpp"
#include "dylora/layers/attention/attention.hpp"
#include "dylora/layers/linear.hpp"
#include "dylora/ranks/plan.hpp"
#include "dylora/train/adamw.hpp"
#include "dylora/train/loss.hpp"
#include "dylora/train/schedule.hpp"
#include "dylora/train/sgd.hpp"
#include "dylora/train/train_step.hpp"
#include "support/catch.hpp"
#include "support/make.hpp"
#include "support/process.hpp"
#include "support/temporary_folder.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

namespace {

namespace fs = std::filesystem;

/// The same frozen weights always.
template <class M>
M with_base();
template <>
Linear<float, Dropout<LowRank<float>>> with_base() {
  return MakeLayer<Linear<float, Dropout<LowRank<float>>>>::make(1, 4);
}
template <>
Attention<double> with_base() {
  return MakeLayer<Attention<double>>::make(2, 4);
}

template <class T>
AdamW<T> make_optimizer(const T& model, Update update, AdamW<T>*) {
  return AdamW<T>(model, {.lr = 0.5, .weight_decay = 0.1, .max_norm = 0.5, .update = update});
}
template <class T>
Sgd<T> make_optimizer(const T& model, Update update, Sgd<T>*) {
  return Sgd<T>(model, {.lr = 0.5, .momentum = 0.9, .weight_decay = 0.1, .max_norm = 0.5, .update = update});
}

/// What an archive is told, but for the parts of one name.
template <class Archive>
struct Forgetful {
  Archive& archive;
  std::string forgotten;

  void operator()(std::string_view name, auto& value, const auto&... check) {
    if (name == forgotten) return;
    if constexpr (requires { value.state(*this); }) {
      value.state(*this);
    } else {
      archive(name, value, check...);
    }
  }
  void same(std::string_view, const auto&) {}
  template <class T>
  void parameters(std::string_view name, T& model) {
    if (name != forgotten) archive.parameters(name, model);
  }
  template <class T>
  void parameters(std::string_view name, typename T::Gradients& snapshot) {
    if (name != forgotten) archive.template parameters<T>(name, snapshot);
  }
};

/// A training run with everything that changes as it goes: random ranks and data, dropout, a warm-up and a cosine.
template <class M, class O>
struct Run {
  using S = typename M::Scalar;

  M model = with_base<M>();
  O optimizer;
  typename M::Gradients gradients = zeros_like(model), good = gradients;
  typename M::Cache cache;
  Rng data_rng, rank_rng;
  std::vector<double> losses;

  /// The seed decides all but the frozen weights; two runs of different seeds have nothing in common.
  Run(Update update, std::uint64_t seed)
      : optimizer(make_optimizer(model, update, static_cast<O*>(nullptr))), data_rng(seed + 1), rank_rng(seed + 2) {
    randomize<M>(model, seed);
    take_snapshot(model, good);
    if constexpr (requires { cache.adapter.rng; }) cache.adapter.rng = Rng(seed + 3);
  }

  void step(Index step) {
    const Schedule schedule(Decay::cosine, {.peak = 0.2, .steps = 20, .warmup_steps = 4, .final_fraction = 0.1});
    const FreshRanks plan(UniformRank(1, 4), 2);
    take_snapshot(model, good);
    optimizer.set_learning_rate(schedule(step));
    losses.push_back(train_step(model, optimizer, gradients, plan(step, rank_rng), [&](Index, RankSlice rank, double weight) {
      const MatrixX<S> x = random_uniform<S>(model.in_features(), 6, 1, data_rng), target = random_uniform<S>(6, 6, 1, data_rng);
      MatrixX<S> dy(6, 6);
      const double loss = mse<S>(model.forward(x, rank, cache), target, dy, weight);
      model.backward(dy, cache, gradients);
      return loss;
    }));
  }

  void state(auto& archive) {
    archive.parameters("model", model);
    archive("optimizer", optimizer);
    archive.template parameters<M>("good", good);
    archive("data_rng", data_rng);
    archive("rank_rng", rank_rng);
    if constexpr (requires { cache.adapter.rng; }) archive("dropout", *cache.adapter.rng);
    archive("losses", losses);
  }

  std::string bytes(Index step) {
    return checkpoint_bytes(step, [&](auto& archive) { state(archive); });
  }
  Index read(const std::string& bytes, const std::string& forgotten = "") {
    return read_checkpoint(std::as_bytes(std::span(bytes)), "file", [&](auto& archive) {
      Forgetful<std::remove_reference_t<decltype(archive)>> forgetful{archive, forgotten};
      forgotten.empty() ? state(archive) : state(forgetful);
    });
  }
};

using Layer = Linear<float, Dropout<LowRank<float>>>;
using Small = Run<Layer, AdamW<Layer>>;

/// The description of a run that Checkpoints takes.
auto described(auto& run) {
  return [&run](auto& archive) { run.state(archive); };
}

/// The files in a folder and what is in them.
std::map<std::string, std::string> files(const fs::path& folder) {
  std::map<std::string, std::string> found;
  for (const auto& entry : fs::directory_iterator(folder)) {
    found[entry.path().filename().string()] = entry.is_regular_file() ? contents_of(entry.path()) : "not a file";
  }
  return found;
}

std::set<std::string> names_in(const fs::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.insert(entry.path().filename().string());
  return names;
}

/// The oldest checkpoint: the one that goes when the next two are in place.
std::string oldest_in(const fs::path& folder) {
  const auto names = names_in(folder);
  return *names.lower_bound("checkpoint-");
}

void damage(const fs::path& path) {
  std::string bytes = contents_of(path);
  bytes[bytes.size() - 20] = static_cast<char>(bytes[bytes.size() - 20] ^ 16);
  put(path, bytes);
}

const std::string ten = "checkpoint-000000010.safetensors", twenty = "checkpoint-000000020.safetensors",
                  thirty = "checkpoint-000000030.safetensors", lock = "checkpoints.lock";

/// A folder with checkpoints at steps 10 and 20, where `count` was 1 and 2.
void make_two(const fs::path& folder) {
  Checkpoints checkpoints(folder);
  for (Index count = 1; count <= 2; ++count) checkpoints.save(10 * count, [&](auto& archive) { archive("count", count); });
}

/// What a run says that goes on from what is in a folder: the count it finds, and the step.
std::string resumed(const fs::path& folder) {
  Index count = -1;
  Checkpoints checkpoints(folder);
  const auto loaded = checkpoints.load([&](auto& archive) { archive("count", count); });
  return loaded ? "count " + std::to_string(count) + " at " + std::to_string(loaded->step) : "nothing";
}

}  // namespace

TEMPLATE_TEST_CASE("a run stopped at any step goes on as the one that was not, bit for bit", "", (Run<Layer, AdamW<Layer>>),
                   (Run<Layer, Sgd<Layer>>), (Run<Attention<double>, AdamW<Attention<double>>>),
                   (Run<Attention<double>, Sgd<Attention<double>>>)) {
  constexpr Index steps = 12;
  for (const Update update : {Update::active_only, Update::dense}) {
    TestType straight(update, 1);
    std::vector<std::string> saved{straight.bytes(0)};
    for (Index step = 0; step < steps; ++step) {
      straight.step(step);
      saved.push_back(straight.bytes(step + 1));
    }
    for (Index stopped = 0; stopped <= steps; ++stopped) {
      TestType other(update, 100 + static_cast<std::uint64_t>(stopped));
      for (Index step = 0; step < stopped % 3; ++step) other.step(step);  // it may have been in use
      CHECK(other.bytes(stopped) != saved[static_cast<std::size_t>(stopped)]);
      REQUIRE(other.read(saved[static_cast<std::size_t>(stopped)]) == stopped);
      for (Index step = stopped; step < steps; ++step) {
        other.step(step);
        CHECK((other.bytes(step + 1) == saved[static_cast<std::size_t>(step) + 1]));
      }
      CHECK(same_bits(values<decltype(other.model)>(other.model), values<decltype(other.model)>(straight.model)));
      CHECK(other.optimizer.steps() == straight.optimizer.steps());
      CHECK(other.optimizer.options().lr == straight.optimizer.options().lr);
    }
  }
}

TEST_CASE("a run that is given back all but one part of its state goes another way") {
  const auto goes_the_same_way = [](auto run, auto other, const std::string& forgotten) {
    for (Index step = 0; step < 5; ++step) run.step(step);
    // Written by what forgets too, so that the file has no more than is asked for.
    const std::string bytes = checkpoint_bytes(5, [&](auto& archive) {
      Forgetful<std::remove_reference_t<decltype(archive)>> forgetful{archive, forgotten};
      run.state(forgetful);
    });
    other.read(bytes, forgotten);
    for (Index step = 5; step < 9; ++step) {
      run.step(step);
      other.step(step);
    }
    return same_bits(values<Layer>(run.model), values<Layer>(other.model));
  };
  const Small run(Update::active_only, 1), other(Update::active_only, 2);
  CHECK(goes_the_same_way(run, other, "nothing"));
  for (const char* part : {"model", "optimizer", "data_rng", "rank_rng", "dropout", "m", "v", "counters"}) {
    INFO(part);
    CHECK_FALSE(goes_the_same_way(run, other, part));
  }
  CHECK_FALSE(goes_the_same_way(Run<Layer, Sgd<Layer>>(Update::dense, 1), Run<Layer, Sgd<Layer>>(Update::dense, 2), "u"));
}

TEST_CASE("a run killed fifty times, while saving too, arrives where the one that never was does") {
  const TemporaryFolder folder;
  std::vector<double> ballast(20'000, 0.5);  // so that most of the time goes into writing
  const auto with_ballast = [&](Small& run) {
    return [&](auto& archive) {
      run.state(archive);
      archive("ballast", ballast);
    };
  };
  Small straight(Update::active_only, 1), arrived(Update::active_only, 2);
  Checkpoints(folder.path()).save(0, with_ballast(straight));
  Rng delay(1);
  Index killed_writing = 0;
  for (std::uint64_t kills = 0; kills < 50 || (killed_writing == 0 && kills < 1000); ++kills) {
    const std::string last = oldest_in(folder.path());
    ChildProcess child([&] {
      Small run(Update::active_only, 100 + kills);
      Checkpoints checkpoints(folder.path());
      const auto loaded = checkpoints.load(with_ballast(run));
      if (!loaded || !loaded->refused.empty()) return std::string("nothing to go on from");
      for (Index step = loaded->step;; ++step) {
        run.step(step);
        checkpoints.save(step + 1, with_ballast(run));
      }
    });
    // Half of them get somewhere first, however slow the machine is.
    for (int waited = 0; kills % 2 == 0 && waited < 100'000 && names_in(folder.path()).contains(last); ++waited) usleep(200);
    usleep(static_cast<useconds_t>(delay.below(15'000)));
    child.kill();
    REQUIRE(child.wait() == "ended by signal 9");
    for (const std::string& name : names_in(folder.path())) killed_writing += name.ends_with(".part");
  }
  Checkpoints checkpoints(folder.path());
  const auto loaded = checkpoints.load(with_ballast(arrived));
  REQUIRE(loaded);
  CHECK(loaded->refused.empty());
  CHECK(killed_writing > 0);  // else nothing was put to the test
  CHECK(loaded->step >= 25);
  for (Index step = 0; step < loaded->step; ++step) straight.step(step);
  CHECK((arrived.bytes(0) == straight.bytes(0)));
}

TEST_CASE("a folder without checkpoints loads nothing and changes nothing") {
  const TemporaryFolder folder;
  Index count = 3;
  Checkpoints checkpoints(folder / "a" / "b");
  CHECK_FALSE(checkpoints.load([&](auto& archive) { archive("count", count); }));
  CHECK(count == 3);
  CHECK(checkpoints.folder() == folder / "a" / "b");
  CHECK(names_in(folder / "a" / "b") == std::set<std::string>{lock});
}

TEST_CASE("the newest checkpoint is loaded, and as many are kept as was said") {
  for (const Index keep : {1, 2, 3}) {
    const TemporaryFolder folder;
    Index count = 0;
    const auto state = [&](auto& archive) { archive("count", count); };
    for (Index step = 8; step < 13; ++step) {
      Checkpoints checkpoints(folder.path(), {.keep = keep});
      const auto loaded = checkpoints.load(state);
      CHECK(loaded.has_value() == (step > 8));
      if (loaded) {
        CHECK(loaded->step == step - 1);
        CHECK(loaded->path.filename() ==
              "checkpoint-" + std::string(step > 10 ? "0000000" : "00000000") + std::to_string(step - 1) + ".safetensors");
        CHECK(loaded->refused.empty());
        CHECK(count == step - 1);
      }
      count = step;
      CHECK(checkpoints.save(step, state).parent_path() == folder.path());
      CHECK(names_in(folder.path()).size() == 1 + static_cast<std::size_t>(std::min(keep, step - 7)));
    }
    CHECK(names_in(folder.path()).contains("checkpoint-000000012.safetensors"));
  }
  const TemporaryFolder folder;
  CHECK_THROWS_SAYING(std::invalid_argument, Checkpoints(folder / "run", {.keep = 0}), "Checkpoints: keep", "got 0");
  CHECK(names_in(folder.path()).empty());
}

TEST_CASE("a checkpoint of a later step that somebody put there takes the place of none, and stays") {
  const TemporaryFolder folder, other;
  make_two(other.path());
  for (const Index keep : {1, 2}) {
    Index count = 5;
    const auto state = [&](auto& archive) { archive("count", count); };
    fs::create_directory(folder / std::to_string(keep));
    Checkpoints checkpoints(folder / std::to_string(keep), {.keep = keep});
    checkpoints.save(5, state);
    fs::copy(other / twenty, checkpoints.folder() / twenty);
    std::set<std::string> expected{lock, twenty, "checkpoint-000000007.safetensors"};
    if (keep == 2) expected.insert("checkpoint-000000006.safetensors");
    checkpoints.save(6, state);
    CHECK(checkpoints.save(7, state).filename() == "checkpoint-000000007.safetensors");
    CHECK(names_in(checkpoints.folder()) == expected);
    CHECK(contents_of(checkpoints.folder() / twenty) == contents_of(other / twenty));
    checkpoints.save(20, state);  // its own turn
    checkpoints.save(30, state);
    CHECK(names_in(checkpoints.folder()) ==
          (keep == 1 ? std::set<std::string>{lock, thirty} : std::set<std::string>{lock, twenty, thirty}));
  }
}

TEST_CASE("steps of any size are files in their order") {
  const TemporaryFolder folder;
  Index count = 0;
  const auto state = [&](auto& archive) { archive("count", count); };
  Checkpoints checkpoints(folder.path());
  for (const Index step : {Index{0}, Index{999'999'999}, Index{1'000'000'000}, std::numeric_limits<Index>::max()}) {
    count = step;
    checkpoints.save(step, state);
    CHECK(checkpoints.load(state)->step == step);
    CHECK(count == step);
  }
  CHECK(names_in(folder.path()) ==
        std::set<std::string>{lock, "checkpoint-1000000000.safetensors", "checkpoint-9223372036854775807.safetensors"});
}

TEST_CASE("a damaged checkpoint is refused with the reason, and the one before it is loaded") {
  const TemporaryFolder folder;
  make_two(folder.path());
  damage(folder / twenty);
  const auto before = files(folder.path());
  Index count = -1;
  const auto state = [&](auto& archive) { archive("count", count); };
  {
    Checkpoints checkpoints(folder.path());
    const auto loaded = checkpoints.load(state);
    REQUIRE(loaded);
    CHECK(count == 1);
    CHECK(loaded->step == 10);
    CHECK(loaded->path == folder / ten);
    REQUIRE(loaded->refused.size() == 1);
    CHECK(loaded->refused[0].starts_with((folder / twenty).string() + ": expected bytes with the checksum "));
    CHECK(files(folder.path()) == before);  // until there is another
    count = 7;
    checkpoints.save(15, state);
    CHECK(names_in(folder.path()) == std::set<std::string>{lock, ten, "checkpoint-000000015.safetensors"});
  }
  CHECK(resumed(folder.path()) == "count 7 at 15");
}

TEST_CASE("the step of a damaged checkpoint may be reached again") {
  const TemporaryFolder folder;
  make_two(folder.path());
  put(folder / twenty, "");
  Index count = -1;
  const auto state = [&](auto& archive) { archive("count", count); };
  {
    Checkpoints checkpoints(folder.path());
    CHECK(checkpoints.load(state)->refused[0].ends_with(": expected the beginning of a checkpoint, got other bytes, or too few"));
    count = 2;
    checkpoints.save(20, state);
    CHECK(names_in(folder.path()) == std::set<std::string>{lock, ten, twenty});
    checkpoints.save(20, state);  // once more, as when a run is asked to stop
    CHECK(names_in(folder.path()) == std::set<std::string>{lock, ten, twenty});
  }
  CHECK(resumed(folder.path()) == "count 2 at 20");
}

TEST_CASE("where every checkpoint is damaged none is loaded and none is lost") {
  const TemporaryFolder folder;
  make_two(folder.path());
  damage(folder / ten);
  damage(folder / twenty);
  const auto before = files(folder.path());
  Index count = -1;
  const auto state = [&](auto& archive) { archive("count", count); };
  Checkpoints checkpoints(folder.path());
  CHECK_THROWS_SAYING(FormatError, checkpoints.load(state),
                      folder.path().string() + ": expected a checkpoint that is whole, got none:\n  " + (folder / twenty).string(),
                      "\n  " + (folder / ten).string());
  CHECK(count == -1);
  CHECK_THROWS_SAYING(FileError, checkpoints.save(30, state), folder.path().string(), "got 2");
  CHECK(files(folder.path()) == before);
}

TEST_CASE("a run that is set up differently is refused, though an older checkpoint may fit") {
  const TemporaryFolder folder;
  Index count = 1, batch = 32;
  const auto state = [&](auto& archive) {
    archive("count", count);
    archive.same("batch", batch);
  };
  {
    Checkpoints checkpoints(folder.path());
    checkpoints.save(10, state);
    batch = 64;
    count = 2;
    checkpoints.save(20, state);
  }
  const auto before = files(folder.path());
  batch = 32;
  count = 5;
  Checkpoints checkpoints(folder.path());
  CHECK_THROWS_SAYING(FormatError, checkpoints.load(state),
                      (folder / twenty).string() +
                          ": expected a checkpoint of this run, got one that differs:\n  batch: the checkpoint has 64, this run 32");
  CHECK(count == 5);
  CHECK_THROWS_SAYING(FileError, checkpoints.save(30, state), folder.path().string());
  CHECK(files(folder.path()) == before);
  batch = 64;
  CHECK(checkpoints.load(state)->step == 20);
  CHECK(count == 2);
}

TEST_CASE("checkpoints that nobody has loaded are not written over") {
  const TemporaryFolder folder;
  make_two(folder.path());
  const auto before = files(folder.path());
  Index count = 9;
  Checkpoints checkpoints(folder.path());
  CHECK_THROWS_SAYING(
      FileError, checkpoints.save(30, [&](auto& archive) { archive("count", count); }),
      folder.path().string() + ": expected a folder without checkpoints, or a run that loads them before it saves its own, got 2");
  CHECK(files(folder.path()) == before);
}

TEST_CASE("a run does not go back") {
  const TemporaryFolder folder, empty;
  make_two(folder.path());
  const auto before = files(folder.path());
  Index count = 9;
  const auto state = [&](auto& archive) { archive("count", count); };
  Checkpoints checkpoints(folder.path());
  checkpoints.load(state);
  CHECK_THROWS_SAYING(std::invalid_argument, checkpoints.save(19, state), "Checkpoints: step", "[20, ", "got 19");
  CHECK_THROWS_SAYING(std::invalid_argument, Checkpoints(empty.path()).save(-1, state), "Checkpoints: step", "[0, ", "got -1");
  CHECK(files(folder.path()) == before);
  checkpoints.save(30, state);
  CHECK_THROWS_SAYING(std::invalid_argument, checkpoints.save(29, state), "[30, ", "got 29");
}

TEST_CASE("a checkpoint of another step than its name says is refused") {
  const TemporaryFolder folder;
  make_two(folder.path());
  fs::copy(folder / ten, folder / thirty);
  CHECK_THROWS_SAYING(FormatError, resumed(folder.path()), (folder / thirty).string() + ": expected step 30, as its name says, got 10");
}

TEST_CASE("files of other names are left alone") {
  const TemporaryFolder folder;
  const std::vector<std::string> others{"model.safetensors",
                                        "checkpoint-1.safetensors",
                                        "checkpoint-0000000001.safetensors",
                                        "checkpoint--00000001.safetensors",
                                        "checkpoint-+00000001.safetensors",
                                        "checkpoint-.safetensors",
                                        "checkpoint-99999999999999999999.safetensors",
                                        "checkpoint-000000001.safetensors.bak",
                                        "checkpoint-000000001.safetensors.part.part",
                                        "checkpoint-00000000a.safetensors",
                                        "a.part",
                                        "Checkpoint-000000001.safetensors"};
  for (const std::string& name : others) put(folder / name, name);
  fs::create_directory(folder / "checkpoint-000000001.safetensors");
  fs::create_directory(folder / "checkpoint-000000002.safetensors.part");
  CHECK(resumed(folder.path()) == "nothing");
  auto expected = names_in(folder.path());
  make_two(folder.path());
  CHECK(resumed(folder.path()) == "count 2 at 20");
  expected.insert({ten, twenty});
  CHECK(names_in(folder.path()) == expected);
  for (const std::string& name : others) CHECK(contents_of(folder / name) == name);
}

TEST_CASE("what killed processes left half-written goes before the next is written") {
  const TemporaryFolder folder;
  make_two(folder.path());
  put(folder / (thirty + ".part"), contents_of(folder / twenty).substr(0, 100));
  put(folder / (ten + ".part"), "");
  Index count = 3;
  const auto state = [&](auto& archive) { archive("count", count); };
  Checkpoints checkpoints(folder.path());
  CHECK(checkpoints.load(state)->step == 20);
  CHECK(names_in(folder.path()).size() == 5);
  CHECK(in_child([&] {
          std::signal(SIGXFSZ, SIG_IGN);
          const rlimit limit{0, 0};
          if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return std::string("cannot set a limit");
          return wrong_throw<FileError>([&] { checkpoints.save(40, state); }, {"cannot write: File too large"});
        }) == "");
  CHECK(names_in(folder.path()) == std::set<std::string>{lock, ten, twenty});
  checkpoints.save(30, state);
  CHECK(names_in(folder.path()) == std::set<std::string>{lock, twenty, thirty});
}

TEST_CASE("a folder belongs to one at a time, until that ends, however it ends") {
  const TemporaryFolder folder;
  const auto refused = [&] {
    return wrong_throw<FileError>([&] { Checkpoints{folder.path()}; },
                                  {(folder / lock).string() + ": cannot write: somebody else is writing it"});
  };
  {
    const Checkpoints first(folder.path());
    CHECK(refused() == "");
    CHECK(in_child(refused) == "");
    Checkpoints{folder / "other"};
  }
  CHECK(in_child(refused) == "nothing was thrown");
  ChildProcess killed([&] {
    const Checkpoints checkpoints(folder.path());
    put(folder / "ready", "");
    for (;;) pause();
    return std::string();
  });
  while (!fs::exists(folder / "ready")) usleep(1000);
  CHECK(refused() == "");
  killed.kill();
  killed.wait();
  CHECK(refused() == "nothing was thrown");
}

TEST_CASE("a state that is not finite is not saved, and the last that was can be loaded") {
  const TemporaryFolder folder;
  Small run(Update::active_only, 1);
  Checkpoints checkpoints(folder.path());
  run.step(0);
  checkpoints.save(1, described(run));
  const auto before = files(folder.path());
  const std::string good = run.bytes(1);
  run.model.adapter.inner.B(2, 1) = nan<float>;
  CHECK_THROWS_SAYING(NonFiniteError, checkpoints.save(2, described(run)), "checkpoint: model.lora_B: expected finite numbers");
  CHECK(files(folder.path()) == before);
  CHECK(checkpoints.load(described(run))->step == 1);
  CHECK((run.bytes(1) == good));
  run.good.adapter.inner.A(0, 0) = std::numeric_limits<float>::infinity();
  CHECK_THROWS_SAYING(NonFiniteError, checkpoints.save(2, described(run)), "checkpoint: good.lora_A: expected finite numbers");
  CHECK(files(folder.path()) == before);
}

TEST_CASE("a full disk leaves the checkpoints as they were, and is said") {
  const TemporaryFolder folder;
  make_two(folder.path());
  const auto before = files(folder.path());
  CHECK(in_child([&] {
          std::signal(SIGXFSZ, SIG_IGN);
          const rlimit limit{2000, 2000};
          if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return std::string("cannot set a limit");
          Index count = 0;
          std::vector<double> many;
          Checkpoints checkpoints(folder.path());
          checkpoints.load([&](auto& archive) { archive("count", count); });
          many.assign(1000, 1.0);
          return wrong_throw<FileError>([&] { checkpoints.save(30, [&](auto& archive) { archive("many", many); }); },
                                        {(folder / thirty).string() + ".part: cannot write: File too large"});
        }) == "");
  CHECK(files(folder.path()) == before);
  CHECK(resumed(folder.path()) == "count 2 at 20");
}

TEST_CASE("a folder that may not be written to is said, and its checkpoints stay") {
  const TemporaryFolder folder;
  make_two(folder.path());
  const auto before = files(folder.path());
  const auto all_may = [&](fs::perms perms) { fs::permissions(folder.path(), perms | fs::perms::owner_exec | fs::perms::others_exec); };
  const fs::perms reading = fs::perms::owner_read | fs::perms::others_read;
  fs::permissions(folder / lock, fs::perms::all);
  for (const char* file : {ten.c_str(), twenty.c_str()}) fs::permissions(folder / file, reading);
  all_may(reading);
  CHECK(in_child([&] {
          drop_privileges();
          Index count = 0;
          const auto state = [&](auto& archive) { archive("count", count); };
          Checkpoints checkpoints(folder.path());
          if (checkpoints.load(state)->step != 20 || count != 2) return std::string("not loaded");
          return wrong_throw<FileError>([&] { checkpoints.save(30, state); },
                                        {(folder / thirty).string() + ".part: cannot write: Permission denied"});
        }) == "");
  fs::permissions(folder / lock, fs::perms::owner_read);
  CHECK(in_child([&] {
          drop_privileges();
          return wrong_throw<FileError>([&] { Checkpoints{folder.path()}; },
                                        {(folder / lock).string() + ": cannot write: Permission denied"}) +
                 wrong_throw<FileError>([&] { Checkpoints{folder / "new"}; },
                                        {(folder / "new").string() + ": cannot make the folder: Permission denied"});
        }) == "");
  fs::permissions(folder / lock, fs::perms::owner_all);
  all_may(reading | fs::perms::owner_write);
  CHECK(files(folder.path()) == before);
  CHECK(resumed(folder.path()) == "count 2 at 20");
}

TEST_CASE("a checkpoint that cannot be read is said, not skipped") {
  const TemporaryFolder folder;
  make_two(folder.path());
  fs::permissions(folder.path(), fs::perms::all);
  fs::permissions(folder / lock, fs::perms::all);
  fs::permissions(folder / twenty, fs::perms::none);
  CHECK(in_child([&] {
          drop_privileges();
          return wrong_throw<FileError>([&] { resumed(folder.path()); }, {(folder / twenty).string() + ": cannot read: Permission denied"});
        }) == "");
}

TEST_CASE("a folder that vanishes is said, and its checkpoints load where it is found again") {
  const TemporaryFolder folder;
  Index count = 1;
  const auto state = [&](auto& archive) { archive("count", count); };
  {
    Checkpoints checkpoints(folder / "run");
    checkpoints.save(10, state);
    fs::rename(folder / "run", folder / "moved");
    CHECK_THROWS_SAYING(FileError, checkpoints.save(20, state),
                        (folder / "run" / twenty).string() + ".part: cannot write: No such file or directory");
    CHECK_THROWS_SAYING(FileError, checkpoints.load(state),
                        (folder / "run").string() + ": cannot read the folder: No such file or directory");
    CHECK_FALSE(fs::exists(folder / "run"));
  }
  CHECK(resumed(folder / "moved") == "count 1 at 10");
  put(folder / "file", "file");
  CHECK_THROWS_SAYING(FileError, Checkpoints(folder / "file"), (folder / "file").string());
  CHECK(contents_of(folder / "file") == "file");
}

TEST_CASE("every checkpoint of one state has the same bytes, whatever ran before") {
  const TemporaryFolder folder;
  Small run(Update::active_only, 1), other(Update::active_only, 2);
  Checkpoints one(folder / "one"), two(folder / "two");
  for (Index step = 0; step < 6; ++step) {
    run.step(step);
    if (step % 2 == 0) one.save(step + 1, described(run));
  }
  one.save(6, described(run));
  two.save(0, described(other));
  other.read(contents_of(folder / "one" / "checkpoint-000000005.safetensors"));
  other.step(5);
  two.save(6, described(other));
  CHECK((contents_of(folder / "one" / "checkpoint-000000006.safetensors") ==
         contents_of(folder / "two" / "checkpoint-000000006.safetensors")));
}

}  // namespace dylora::test
