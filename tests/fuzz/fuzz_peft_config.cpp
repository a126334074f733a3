#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "dylora/io/peft/config.hpp"
#include "dylora/io/peft/reader.hpp"

/// A config is refused, or it says a rank and a scale for whatever module (unless its patterns are refused), and means the same once it is
/// written.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace dylora;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto require = [](bool condition) {
    if (!condition) std::abort();
  };
  try {
    PeftConfig config = parse_peft_config(text, "file");
    const detail::PeftPatterns<Index> ranks(config.rank_pattern, "rank_pattern");
    const detail::PeftPatterns<double> alphas(config.alpha_pattern, "alpha_pattern");
    for (const char* module : {"transformer.h.0.attn.c_attn", "h.11.mlp.fc", "q_proj"}) {
      try {
        require(ranks.find(module, config.r) >= 1);
        const double alpha = alphas.find(module, config.lora_alpha);
        require(alpha != 0 && std::isfinite(alpha));
      } catch (const FormatError&) {}
    }
    for (const auto& [key, rank] : config.rank_pattern) {
      const PeftPattern exact(PeftPattern::exactly(key));
      require(!exact.unsupported().empty() || exact.matches(key));
    }
    config.notes.clear();
    std::sort(config.target_modules.begin(), config.target_modules.end());
    require(parse_peft_config(peft_config_text(config), "file") == config);
  } catch (const FormatError&) {}
  return 0;
}
