#ifndef DYLORA_IO_LOAD_REPORT_HPP
#define DYLORA_IO_LOAD_REPORT_HPP

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"

/// What a reader or a writer of adapter files did: nothing about scales or names happens in silence.
namespace dylora {

/// One adapter at the rank at which a file has it: Δ = scale · B · A.
struct AdapterScale {
  std::string name;  ///< the module's path in the file
  Index rank = 0;    ///< 0 for a module that the file leaves without an adapter
  double alpha = 0;  ///< as the file has it
  double scale = 0;  ///< as the adapter uses it

  bool operator==(const AdapterScale&) const = default;
};

struct LoadReport {
  std::vector<AdapterScale> adapters;          ///< those that were set, in the order of the model
  std::vector<std::string> missing_modules;    ///< modules with components that the file says nothing about; they are as they were
  std::vector<std::string> unmatched_tensors;  ///< what the file has for no adapter of the model; left out
  std::vector<std::string> notes;              ///< what was assumed, ignored or changed on the way
};

namespace detail {

/// The first ten, and how many more there are.
inline std::string listed(const std::vector<std::string>& names) {
  constexpr std::size_t most = 10;
  std::string text;
  for (std::size_t i = 0; i < std::min(names.size(), most); ++i) text += (i == 0 ? "" : ", ") + in_quotes(names[i]);
  return names.size() > most ? text + " and " + std::to_string(names.size() - most) + " more" : text;
}

/// Throws FormatError beginning with `file`, with both lists, unless the report is of a file and a model that have the same adapters. A
/// module without any component is the same as none: if the file says nothing about it, it is not missing.
inline void require_complete(const LoadReport& report, const std::string& file) {
  if (report.missing_modules.empty() && report.unmatched_tensors.empty()) return;
  std::string message = file + ": expected the adapters of the model, no fewer and no others";
  if (!report.missing_modules.empty()) message += "; modules of the model that got nothing: " + listed(report.missing_modules);
  if (!report.unmatched_tensors.empty()) message += "; tensors that belong to no module of the model: " + listed(report.unmatched_tensors);
  throw FormatError(message + (report.adapters.empty() ? " (nothing fits: are the names right, and the prefix?)" : ""));
}

}  // namespace detail

}  // namespace dylora

#endif
