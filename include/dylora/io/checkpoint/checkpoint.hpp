#ifndef DYLORA_IO_CHECKPOINT_CHECKPOINT_HPP
#define DYLORA_IO_CHECKPOINT_CHECKPOINT_HPP

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <filesystem>
#include <functional>
#include <limits>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/bytes/atomic_file.hpp"
#include "dylora/io/bytes/locked_file.hpp"
#include "dylora/io/bytes/mapped_file.hpp"
#include "dylora/io/checkpoint/file.hpp"

namespace dylora {

struct CheckpointsOptions {
  Index keep = 2;  ///< how many of the newest stay
};

/// What a run went on from.
struct LoadedCheckpoint {
  Index step;
  std::filesystem::path path;
  std::vector<std::string> refused;  ///< why newer ones were not taken: a message for each that is damaged
};

/// The checkpoints of one training run in a folder of its own. A run that is stopped, or killed, goes on as if it had not been, bit for
/// bit, if its description of its state (CheckpointArchive) holds all that changes.
///
///     const auto state = [&](auto& archive) {
///       archive.parameters("model", model);
///       archive("optimizer", optimizer);
///       archive("rng", rng);
///       archive.same("batch", options.batch);
///     };
///     Checkpoints checkpoints("run");
///     const auto loaded = checkpoints.load(state);
///     for (Index step = loaded ? loaded->step : 0; step < steps; ++step) {
///       …
///       if ((step + 1) % 100 == 0) checkpoints.save(step + 1, state);   // run/checkpoint-000000100.safetensors
///     }
///
/// The folder belongs to one Checkpoints at a time, of whatever process, by the lock of the file checkpoints.lock in it. Files with names
/// of other kinds are left alone.
class Checkpoints {
 public:
  /// Makes the folder if there is none. Throws FileError if it cannot be written or if another Checkpoints has it, and, before anything is
  /// made, std::invalid_argument if `keep` is less than 1.
  explicit Checkpoints(std::filesystem::path folder, CheckpointsOptions options = {})
      : options_(checked(options)), folder_(made(std::move(folder))), lock_((folder_ / "checkpoints.lock").string()) {
    to_be_loaded_ = !steps().empty();
  }

  const std::filesystem::path& folder() const { return folder_; }

  /// Whether the folder has no checkpoint.
  bool empty() const { return steps().empty(); }

  /// Gives `state` what the newest checkpoint holds that is not damaged; none if there is no checkpoint. Throws, with nothing changed,
  /// FormatError if all are damaged or if that one is of a run that was set up differently, and FileError if one cannot be read.
  template <class State>
  std::optional<LoadedCheckpoint> load(State&& state) {
    std::vector<std::string> refused;
    std::set<Index> refused_steps;
    for (const Index step : steps()) {
      const MappedFile file(path_of(step));
      try {
        detail::require_whole_checkpoint(file.bytes(), file.name());
      } catch (const FormatError& error) {
        refused.push_back(error.what());
        refused_steps.insert(step);
        continue;
      }
      const auto contents = detail::parse_whole_checkpoint(file.bytes(), file.name());
      if (contents.step != step) {
        throw FormatError(file.name() + ": expected step " + std::to_string(step) + ", as its name says, got " +
                          std::to_string(contents.step));
      }
      CheckpointArchive::read(contents.file, file.name(), state);
      newest_ = step;
      refused_ = std::move(refused_steps);
      to_be_loaded_ = false;
      return LoadedCheckpoint{step, file.name(), std::move(refused)};
    }
    if (refused.empty()) return std::nullopt;
    std::string list;
    for (const std::string& reason : refused) list += "\n  " + reason;
    throw FormatError(folder_.string() + ": expected a checkpoint that is whole, got none:" + list);
  }

  /// Writes the state after so many steps and returns the file, which appears whole or not at all. Before, it removes what killed processes
  /// left half-written; after, those that load refused and those before the newest `keep` up to this step. Checkpoints of later steps,
  /// which somebody else has put there, stay, and so does what cannot be removed.
  ///
  /// Throws, with the checkpoints as they were, NonFiniteError if a number of the state is a NaN or an infinity; FileError if the file
  /// cannot be written, and if there are checkpoints that nobody has loaded, since they would be lost; std::invalid_argument if the step is
  /// before the last that was loaded or saved.
  template <class State>
  std::filesystem::path save(Index step, State&& state) {
    require_in_range(step, newest_, std::numeric_limits<Index>::max(), "Checkpoints: step");
    if (to_be_loaded_) {
      throw FileError(folder_.string() + ": expected a folder without checkpoints, or a run that loads them before it saves its own, got " +
                      std::to_string(steps().size()));
    }
    const std::filesystem::path path = path_of(step);
    const std::string bytes = checkpoint_bytes(step, state);
    remove_parts();
    AtomicFile file(path);
    file.write(bytes);
    file.commit();
    newest_ = step;
    refused_.erase(step);
    remove_superseded();
    return path;
  }

 private:
  static constexpr std::string_view beginning = "checkpoint-", ending = ".safetensors";

  static CheckpointsOptions checked(CheckpointsOptions options) {
    require_in_range(options.keep, 1, std::numeric_limits<Index>::max(), "Checkpoints: keep");
    return options;
  }

  /// The folder, made if there is none, with those that it is in, so that they stay if the power fails.
  static std::filesystem::path made(std::filesystem::path folder) {
    std::error_code error, ignored;
    std::vector<std::filesystem::path> parents;  // of what is to be made
    for (auto missing = folder; !missing.empty() && !std::filesystem::exists(missing, ignored); missing = missing.parent_path()) {
      parents.push_back(missing.has_parent_path() ? missing.parent_path() : ".");
    }
    std::filesystem::create_directories(folder, error);
    if (error) throw FileError(folder.string() + ": cannot make the folder: " + error.message());
    for (const auto& parent : parents) detail::sync_folder(parent);
    return folder;
  }

  static std::string name_of(Index step) {
    constexpr std::size_t width = 9;
    const std::string digits = std::to_string(step);
    return std::string(beginning) + std::string(width - std::min(width, digits.size()), '0') + digits + std::string(ending);
  }

  /// The step whose file has that name, if one has.
  static std::optional<Index> step_of(std::string_view name) {
    if (!name.starts_with(beginning)) return std::nullopt;
    Index step = 0;
    std::from_chars(name.data() + beginning.size(), name.data() + name.size(), step);
    return step >= 0 && name_of(step) == name ? std::optional(step) : std::nullopt;
  }

  std::filesystem::path path_of(Index step) const { return folder_ / name_of(step); }

  /// The steps that have a file whose name goes on with `more`, the newest first.
  std::vector<Index> steps(std::string_view more, std::error_code& error) const {
    std::vector<Index> found;
    for (std::filesystem::directory_iterator entry(folder_, error), end; !error && entry != end; entry.increment(error)) {
      const std::string name = entry->path().filename().string();
      if (!name.ends_with(more)) continue;
      const auto step = step_of(std::string_view(name).substr(0, name.size() - more.size()));
      std::error_code ignored;
      if (step && entry->is_regular_file(ignored)) found.push_back(*step);
    }
    std::sort(found.begin(), found.end(), std::greater<>());
    return found;
  }

  std::vector<Index> steps() const {
    std::error_code error;
    std::vector<Index> found = steps("", error);
    if (error) throw FileError(folder_.string() + ": cannot read the folder: " + error.message());
    return found;
  }

  /// The new one is in place: whatever goes wrong here, nothing is lost.
  void remove_superseded() {
    std::error_code ignored;
    Index kept = 0;
    for (const Index step : steps("", ignored)) {
      if (refused_.contains(step) || (step <= newest_ && ++kept > options_.keep)) std::filesystem::remove(path_of(step), ignored);
    }
  }

  /// What killed processes left takes room, and the disk may be nearly full.
  void remove_parts() {
    std::error_code ignored;
    for (const Index step : steps(".part", ignored)) std::filesystem::remove(path_of(step).string() + ".part", ignored);
  }

  CheckpointsOptions options_;
  std::filesystem::path folder_;
  detail::LockedFile lock_;
  Index newest_ = 0;  // of those loaded or saved
  std::set<Index> refused_;
  bool to_be_loaded_ = false;
};

}  // namespace dylora

#endif
