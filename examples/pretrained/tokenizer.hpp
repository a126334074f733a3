#ifndef DYLORA_EXAMPLES_PRETRAINED_TOKENIZER_HPP
#define DYLORA_EXAMPLES_PRETRAINED_TOKENIZER_HPP

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <queue>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/bytes/json.hpp"
#include "dylora/io/bytes/mapped_file.hpp"
#include "pretrained/byte_alphabet.hpp"
#include "pretrained/pre_tokens.hpp"

namespace pretrained {

using dylora::FormatError;
using dylora::Index;

/// GPT-2's tokens: byte pairs, merged in a learned order within the pre-tokens of a text (Radford et al., 2019; Sennrich et al., 2016).
///
/// Any bytes are text, well-formed UTF-8 or not, and decode(encode(text)) = text. Const and without hidden state: threads may share one.
class Tokenizer {
 public:
  /// From the contents of vocab.json, an object of tokens and their ids, and of merges.txt, a line for each merge in the order of their
  /// ranks. The names are what messages begin with.
  ///
  /// Throws FormatError, naming the key or line, unless the ids of n tokens are 0 to n - 1, every byte has a token, every token is written
  /// in GPT-2's byte alphabet, and every merge is of two tokens into a third and occurs once. Tokens that no merge makes are allowed: GPT-2
  /// has one, "<|endoftext|>".
  Tokenizer(std::string_view vocabulary, std::string_view merges, const std::string& vocabulary_name = "vocab.json",
            const std::string& merges_name = "merges.txt") {
    const nlohmann::json ids = dylora::parse_json(vocabulary, vocabulary_name);
    read_vocabulary(ids, vocabulary_name);
    read_merges(merges, ids, merges_name);
  }

  /// From vocab.json and merges.txt in this folder. Throws FileError if one cannot be read, else as above.
  static Tokenizer from_folder(const std::filesystem::path& folder) {
    const dylora::MappedFile vocabulary(folder / "vocab.json"), merges(folder / "merges.txt");
    return {vocabulary.text(), merges.text(), vocabulary.name(), merges.name()};
  }

  /// The number of tokens.
  Index size() const { return static_cast<Index>(tokens_.size()); }

  /// The token that GPT-2 was shown between two documents, if there is one.
  std::optional<Index> end_of_text() const { return end_of_text_; }

  /// The tokens of a text. "<|endoftext|>" is text like any other here, and several tokens, since it is several pre-tokens: the token of
  /// that name is never among them. Costs O(n log n) steps for a pre-token of n bytes, whatever they are.
  std::vector<Index> encode(std::string_view text) const {
    std::vector<Index> ids;
    Workspace workspace;
    while (!text.empty()) {
      const std::string_view pre_token = first_pre_token(text);
      append_tokens(pre_token, workspace, ids);
      text.remove_prefix(pre_token.size());
    }
    return ids;
  }

  /// The bytes of these tokens, one after the other; parts of a character may be missing at either end.
  /// Throws std::invalid_argument for a token outside the vocabulary.
  std::string decode(std::span<const Index> ids) const {
    std::string text;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      dylora::require_in_range(ids[i], 0, size() - 1, "Tokenizer::decode: token " + std::to_string(i));
      text += tokens_[static_cast<std::size_t>(ids[i])];
    }
    return text;
  }

 private:
  struct Merge {
    Index left, right, result;
  };

  /// A token of the pre-token at work and its neighbours, -1 where it has none. Each is where its first byte is.
  struct Symbol {
    Index token;  // -1: has become part of the one before it
    Index previous, next;
  };

  /// What encoding allocates, kept from one pre-token to the next.
  struct Workspace {
    using Candidate = std::pair<Index, Index>;  // rank of the merge, place of its left symbol
    std::vector<Symbol> symbols;
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates;
    std::vector<Index> round;  // places

    Symbol& at(Index place) { return symbols[static_cast<std::size_t>(place)]; }
  };

  void read_vocabulary(const nlohmann::json& ids, const std::string& name) {
    if (!ids.is_object()) throw FormatError(name + ": expected an object of tokens and their ids, got " + ids.type_name());
    tokens_.resize(ids.size());
    for (const auto& entry : ids.items()) {
      const std::string& key = entry.key();
      const nlohmann::json& id = entry.value();
      const auto fail = [&](const std::string& expected) { throw FormatError(name + ": key " + dylora::in_quotes(key) + ": " + expected); };
      auto bytes = bytes_of(key);
      if (!bytes || bytes->empty()) fail("expected characters of GPT-2's byte alphabet, at least one");
      if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= tokens_.size()) {
        fail("expected an id in [0, " + std::to_string(tokens_.size() - 1) + "], got " + dylora::in_quotes(id.dump()));
      }
      std::string& token = tokens_[id.get<std::size_t>()];
      if (!token.empty()) fail("expected an id of its own, got " + id.dump() + ", which another token has as well");
      token = std::move(*bytes);
      if (key == "<|endoftext|>") end_of_text_ = id.get<Index>();
    }
    byte_tokens_.fill(-1);
    for (std::size_t id = 0; id < tokens_.size(); ++id) {
      if (tokens_[id].size() == 1) byte_tokens_[static_cast<unsigned char>(tokens_[id][0])] = static_cast<Index>(id);
    }
    if (const auto absent = std::find(byte_tokens_.begin(), byte_tokens_.end(), -1); absent != byte_tokens_.end()) {
      throw FormatError(name + ": expected a token for every byte, got none for byte " + std::to_string(absent - byte_tokens_.begin()));
    }
  }

  void read_merges(std::string_view text, const nlohmann::json& ids, const std::string& name) {
    for (Index line_number = 1; !text.empty(); ++line_number) {
      std::string_view line = text.substr(0, text.find('\n'));
      text.remove_prefix(std::min(line.size() + 1, text.size()));
      if (line.ends_with('\r')) line.remove_suffix(1);
      if (line_number == 1 && line.starts_with("#version:")) continue;
      if (line.empty() && text.empty()) break;
      const auto fail = [&](const std::string& expected) {
        throw FormatError(name + ": line " + std::to_string(line_number) + ": expected " + expected);
      };
      const std::size_t space = line.find(' ');
      if (space == 0 || space >= line.size() - 1 || line.find(' ', space + 1) != line.npos) {
        fail("two symbols separated by one space, got " + dylora::in_quotes(line));
      }
      const auto id_of = [&](std::string symbol) {
        const auto found = ids.find(symbol);
        if (found == ids.end()) fail("tokens of the vocabulary that make another, got " + dylora::in_quotes(symbol) + ", which is none");
        return found->get<Index>();
      };
      const std::string left(line.substr(0, space)), right(line.substr(space + 1));
      const Merge merge{id_of(left), id_of(right), id_of(left + right)};
      const auto [known, is_new] = ranks_.try_emplace({merge.left, merge.right}, static_cast<Index>(merges_.size()));
      if (!is_new) fail("a merge of its own, got " + dylora::in_quotes(line) + " a second time");
      merges_.push_back(merge);
    }
  }

  /// Merges the bytes of a pre-token as far as it goes: round after round, of all pairs of neighbours those of the lowest rank become one,
  /// from left to right.
  void append_tokens(std::string_view pre_token, Workspace& work, std::vector<Index>& ids) const {
    const auto n = static_cast<Index>(pre_token.size());
    work.symbols.clear();
    for (Index i = 0; i < n; ++i) {
      const auto byte = static_cast<unsigned char>(pre_token[static_cast<std::size_t>(i)]);
      work.symbols.push_back({byte_tokens_[byte], i - 1, i + 1 < n ? i + 1 : -1});
    }
    for (Index i = 0; i < n; ++i) add_candidate(i, work);
    while (!work.candidates.empty()) {
      const Index rank = work.candidates.top().first;
      work.round.clear();
      for (; !work.candidates.empty() && work.candidates.top().first == rank; work.candidates.pop()) {
        work.round.push_back(work.candidates.top().second);
      }
      // The whole round, even if a pair with a token that it makes ranks lower.
      for (const Index place : work.round) merge(merges_[static_cast<std::size_t>(rank)], place, work);
    }
    for (Index place = 0; place >= 0; place = work.at(place).next) ids.push_back(work.at(place).token);
  }

  /// Notes that the symbol at `place` and the next one can be merged, if they can.
  void add_candidate(Index place, Workspace& work) const {
    if (place < 0 || work.at(place).next < 0) return;
    const auto found = ranks_.find({work.at(place).token, work.at(work.at(place).next).token});
    if (found != ranks_.end()) work.candidates.emplace(found->second, place);
  }

  /// Merges the symbol at `place` with the next one, unless they are no longer what they were when this was noted.
  void merge(const Merge& merge, Index place, Workspace& work) const {
    Symbol& left = work.at(place);
    if (left.token != merge.left || left.next < 0 || work.at(left.next).token != merge.right) return;
    Symbol& right = work.at(left.next);
    left.token = merge.result;
    left.next = right.next;
    right.token = -1;
    if (left.next >= 0) work.at(left.next).previous = place;
    add_candidate(left.previous, work);
    add_candidate(place, work);
  }

  std::vector<std::string> tokens_;                 // by id
  std::array<Index, 256> byte_tokens_;              // the id of each byte's token
  std::vector<Merge> merges_;                       // by rank
  std::map<std::pair<Index, Index>, Index> ranks_;  // of merges, by what they merge
  std::optional<Index> end_of_text_;
};

}  // namespace pretrained

#endif
