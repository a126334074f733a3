#ifndef DYLORA_EXAMPLES_TEXT_CORPUS_HPP
#define DYLORA_EXAMPLES_TEXT_CORPUS_HPP

#include <algorithm>
#include <cstdint>
#include <dylora/dylora.hpp>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

/// Real text as bytes, and batches of windows into it.
namespace text {

using dylora::Index;

struct Corpus {
  std::string training, validation;
  std::size_t files = 0;

  std::size_t bytes() const { return training.size() + validation.size(); }
};

inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream bytes;
  if (!in || !(bytes << in.rdbuf())) throw std::runtime_error("cannot read " + path.string() + " (missing, not readable, or empty)");
  return std::move(bytes).str();
}

/// The regular files at and below `paths`, each once however many links lead to it, in an order that does not depend on the file system.
/// Throws std::runtime_error for a path that does not exist.
inline std::vector<std::filesystem::path> files_below(const std::vector<std::string>& paths) {
  namespace fs = std::filesystem;
  std::set<fs::path> found;
  for (const std::string& path : paths) {
    std::error_code error;
    if (fs::is_regular_file(path, error)) {
      found.insert(fs::canonical(path));
    } else if (fs::is_directory(path, error)) {
      for (const auto& entry : fs::recursive_directory_iterator(path, fs::directory_options::skip_permission_denied)) {
        if (entry.is_regular_file(error)) found.insert(fs::canonical(entry.path()));
      }
    } else {
      throw std::runtime_error("cannot read " + path + ": expected a file or a folder, found neither");
    }
  }
  return {found.begin(), found.end()};
}

/// All text at and below `paths`; the last tenth of each file is set apart for validation. Files with a zero byte are not text and are
/// passed over. Throws std::runtime_error if a file cannot be read, or if either part is too short for one window of context + 1 bytes.
inline Corpus read_corpus(const std::vector<std::string>& paths, Index context) {
  Corpus corpus;
  std::size_t not_text = 0;
  for (const auto& path : files_below(paths)) {
    if (std::filesystem::file_size(path) == 0) continue;
    const std::string bytes = read_file(path);
    if (bytes.find('\0') != std::string::npos) {
      ++not_text;
      continue;
    }
    const std::size_t cut = bytes.size() - bytes.size() / 10;
    corpus.training.append(bytes, 0, cut);
    corpus.validation.append(bytes, cut);
    ++corpus.files;
  }
  const auto needed = static_cast<std::size_t>(context) + 1;
  if (corpus.training.size() < needed || corpus.validation.size() < needed) {
    std::string names;
    for (const std::string& path : paths) names += ' ' + path;
    throw std::runtime_error(
        "too little text in" + names + ": expected at least " + std::to_string(10 * needed) + " bytes for a context of " +
        std::to_string(context) + ", got " + std::to_string(corpus.bytes()) +
        (not_text > 0 ? " (passed over: " + std::to_string(not_text) + " files with zero bytes, which are not text)" : ""));
  }
  return corpus;
}

/// What there is to adapt to on any machine: the licence texts that every Debian system carries, elsewhere `fallback`.
inline std::vector<std::string> default_text(const std::string& fallback) {
  const std::string system = "/usr/share/common-licenses";
  return {std::filesystem::is_directory(system) ? system : fallback};
}

/// FNV-1a, to recognise what a file was made from.
inline std::uint64_t checksum(const char* bytes, std::size_t size, std::uint64_t hash = 0xcbf29ce484222325u) {
  for (std::size_t i = 0; i < size; ++i) hash = (hash ^ static_cast<unsigned char>(bytes[i])) * 0x100000001b3u;
  return hash;
}

/// Text as tokens, for a model whose tokens are not bytes.
using Tokens = std::vector<std::int32_t>;

inline Index token(char byte) { return static_cast<unsigned char>(byte); }
inline Index token(std::int32_t id) { return id; }

/// Windows of equal length: the tokens, and for each the one that follows it.
struct Batch {
  std::vector<Index> tokens, targets;
  dylora::Sequences sequences;
};

/// The windows that begin at the given places of a text, bytes or Tokens.
template <class Text>
void fill_batch(const Text& text, const std::vector<std::size_t>& begins, Index context, Batch& batch) {
  batch.tokens.clear();
  batch.targets.clear();
  for (const std::size_t begin : begins) {
    for (std::size_t i = begin; i < begin + static_cast<std::size_t>(context); ++i) {
      batch.tokens.push_back(token(text[i]));
      batch.targets.push_back(token(text[i + 1]));
    }
  }
  batch.sequences = dylora::Sequences::equal(static_cast<Index>(begins.size()), context);
}

/// `count` windows at random places.
template <class Text>
void random_batch(const Text& text, Index count, Index context, dylora::Rng& rng, Batch& batch) {
  std::vector<std::size_t> begins(static_cast<std::size_t>(count));
  const Index places = static_cast<Index>(text.size()) - context;
  for (std::size_t& begin : begins) begin = static_cast<std::size_t>(rng.below(places));
  fill_batch(text, begins, context, batch);
}

/// At most `count` windows spread evenly over all of the text, as batches of at most `batch_size`: the same at every call.
template <class Text>
std::vector<Batch> spread_batches(const Text& text, Index count, Index batch_size, Index context) {
  const Index places = static_cast<Index>(text.size()) - context;
  count = std::min(count, std::max<Index>(1, places / context));
  std::vector<Batch> batches;
  for (Index first = 0; first < count; first += batch_size) {
    std::vector<std::size_t> begins;
    for (Index i = first; i < std::min(count, first + batch_size); ++i) begins.push_back(static_cast<std::size_t>(places * i / count));
    fill_batch(text, begins, context, batches.emplace_back());
  }
  return batches;
}

}  // namespace text

#endif
