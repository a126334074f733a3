#ifndef DYLORA_EXAMPLES_FINETUNE_TASK_HPP
#define DYLORA_EXAMPLES_FINETUNE_TASK_HPP

#include <cstdint>
#include <dylora/dylora.hpp>
#include <dylora/io/bytes/checksum.hpp>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "pretrained/tokenizer.hpp"
#include "text/corpus.hpp"

/// What a model is adapted to, in its own tokens.
namespace finetune {

using dylora::Index;

/// Tokens that are bytes.
struct Bytes {
  std::vector<Index> encode(std::string_view text) const {
    std::vector<Index> tokens;
    for (const char c : text) tokens.push_back(text::token(c));
    return tokens;
  }
  std::string decode(const std::vector<Index>& tokens) const {
    std::string bytes;
    for (const Index token : tokens) bytes += static_cast<char>(token);
    return bytes;
  }
};

struct Task {
  text::Tokens training, validation;
  double bytes_per_token = 1;  // of the validation text
  std::string identity;        // of the tokens to train on, and of the base: what a checkpoint must have been made from
};

/// Throws std::runtime_error if there are too few tokens for one window.
template <class Vocabulary>
Task make_task(const text::Corpus& corpus, const Vocabulary& vocabulary, Index context) {
  Task task;
  const auto encode = [&](const std::string& text, text::Tokens& tokens) {
    for (const Index token : vocabulary.encode(text)) tokens.push_back(static_cast<std::int32_t>(token));
    if (static_cast<Index>(tokens.size()) <= context) {
      throw std::runtime_error("too little text: expected more than " + std::to_string(context) +
                               " tokens to train on and to validate with, got " + std::to_string(tokens.size()));
    }
  };
  encode(corpus.training, task.training);
  encode(corpus.validation, task.validation);
  task.bytes_per_token = static_cast<double>(corpus.validation.size()) / static_cast<double>(task.validation.size());
  task.identity = dylora::hexadecimal(dylora::checksum(std::as_bytes(std::span(task.training))));
  return task;
}

}  // namespace finetune

#endif
