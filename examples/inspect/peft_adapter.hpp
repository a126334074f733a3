#ifndef DYLORA_EXAMPLES_INSPECT_PEFT_ADAPTER_HPP
#define DYLORA_EXAMPLES_INSPECT_PEFT_ADAPTER_HPP

#include <array>
#include <cstdio>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/peft/config.hpp"
#include "dylora/io/peft/reader.hpp"
#include "dylora/io/peft/tensors.hpp"
#include "dylora/io/safetensors/safetensors.hpp"

namespace inspect {

using dylora::Index;

/// With up to six digits, as people write it.
inline std::string number(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%g", value);
  return text.data();
}

/// A PEFT folder without a model for it: its modules with the features that the tensors have, each read when it is asked for.
class PeftAdapter {
 public:
  struct Shape {
    Index in_features, out_features, rank;
  };
  using Factors = dylora::PeftAdapter<double>;

  /// Throws FileError or FormatError.
  explicit PeftAdapter(const std::filesystem::path& folder) : reader_(folder) {
    for (const auto& [name, pair] : reader_.tensors().modules) {
      const Index in = pair.A == nullptr ? 0 : pair.A->shape[1], out = pair.B == nullptr ? 0 : pair.B->shape[0];
      modules_[name] = {in, out, pair.A == nullptr ? 0 : pair.A->shape[0]};
    }
  }

  const dylora::SafetensorsFile& weights() const { return reader_.weights(); }
  const dylora::PeftConfig& config() const { return reader_.config(); }
  const std::map<std::string, Shape>& modules() const { return modules_; }

  /// The factors of one of `modules`. Throws FormatError if they do not fit each other or the config.
  Factors take(const std::string& module) {
    const Shape& shape = modules_.at(module);
    return *reader_.take<double>(module, shape.in_features, shape.out_features);
  }

  /// Of which numbers the scale was made.
  std::string scale_source(const Factors& taken) const {
    const Index rank = taken.factors.A.rows();
    const std::string r = std::to_string(rank) + (rank == config().r ? "" : " (rank_pattern)");
    return "lora_alpha " + number(taken.alpha) + (taken.alpha == config().lora_alpha ? "" : " (alpha_pattern)") +
           (config().use_rslora ? " / sqrt of r " + r + ", use_rslora" : " / r " + r);
  }

  std::vector<std::string> notes() const {
    std::vector<std::string> notes = reader_.notes();
    for (const std::string& name : reader_.tensors().others)
      notes.push_back("tensor " + dylora::in_quotes(name) + " is no factor of a pair");
    return notes;
  }

 private:
  dylora::PeftFolder reader_;
  std::map<std::string, Shape> modules_;
};

}  // namespace inspect

#endif
