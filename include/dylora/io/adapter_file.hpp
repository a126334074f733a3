#ifndef DYLORA_IO_ADAPTER_FILE_HPP
#define DYLORA_IO_ADAPTER_FILE_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "dylora/adapters/adapter.hpp"
#include "dylora/adapters/factors.hpp"
#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/io/load_report.hpp"
#include "dylora/io/portable_adapters.hpp"

/// Adapters in a file of any format: one way to load them and one to save them. Both check everything first, so that an error leaves the
/// model and the files as they were.
///
/// A format says which modules of a model it has a place for, and what its files call them:
///
///     struct Format {
///       std::string_view caller;                        // "load_peft": what messages begin with
///       template <class T, class F>
///       void for_each_module(T& model, F&& f) const;    // f(place, module); throws for a module that the files have no place for
///     };
///
/// where a place is an AdapterPlace, and a module is an AdapterModule or has what that has. What a file says of a module is a FileAdapter.
/// Each of the three may have more in it.
namespace dylora {

/// What a file has for one module.
template <std::floating_point S>
struct FileAdapter {
  LowRankFactors<S> factors;
  double alpha = 0;  ///< as the file has it; factors.scale is what follows from it
};

namespace detail {

/// The key in a file's metadata under which it names the modules that have no component and thus no tensors: they are not missing.
inline constexpr const char* rank_0_key = "dylora.rank_0";

/// Values for the parts of a model, which take them when all are known to fit, and not before.
class Assignments {
 public:
  /// `to` must still be there when it is assigned to.
  template <class Value>
  void add(Value& to, std::type_identity_t<Value> value) {
    assignments_.push_back([&to, value = std::move(value)]() mutable { to = std::move(value); });
  }

  /// Once, since the values are moved.
  void assign() {
    for (const auto& assign : assignments_) assign();
  }

 private:
  std::vector<std::function<void()>> assignments_;
};

/// Where a file has the adapter of a module.
struct AdapterPlace {
  std::string module;   // as messages name it
  std::string in_file;  // as the file does

  std::string subject() const { return "module " + in_quotes(module); }
};

template <PortableAdapter A>
A with_factors(A adapter, LowRankFactors<typename A::Scalar> factors) {
  adapter.set_factors(std::move(factors));
  return adapter;
}

/// Returns the scale of `changed` with all its components, 0 without any.
template <PortableAdapter A>
double add_adapter(Assignments& assignments, A& adapter, A changed) {
  const double scale = changed.components() > 0 ? changed.factors(changed.max_rank()).scale : 0;
  assignments.add(adapter, std::move(changed));
  return scale;
}

/// A module that is one adapter: what a file gets from it, and gives it.
template <class A>
class AdapterModule {
 public:
  using Scalar = typename A::Scalar;

  explicit AdapterModule(A& adapter) : adapter_(adapter) {}

  Index in_features() const { return adapter_.in_features(); }
  Index out_features() const { return adapter_.out_features(); }
  Index max_rank() const { return adapter_.max_rank(); }
  Index components() const { return adapter_.components(); }

  FileAdapter<Scalar> values(Index rank) const { return {adapter_.factors(rank)}; }

  /// Makes the values ready and changes nothing yet. Returns the scale of the adapter that will have them. Throws std::invalid_argument if
  /// there can be no such adapter.
  double prepare(FileAdapter<Scalar> values, Assignments& assignments) const {
    return add_adapter(assignments, adapter_, with_factors(adapter_, std::move(values.factors)));
  }

 private:
  A& adapter_;
};

/// call(), whose std::invalid_argument begins with `subject`.
template <class Call>
auto naming(const std::string& subject, Call&& call) {
  try {
    return call();
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(subject + ": " + error.what());
  }
}

/// Throws, beginning with `what`, for a scale at which an adapter of S does nothing or no good: std::invalid_argument if it is 0 as an S,
/// NonFiniteError if it is not finite as one.
template <std::floating_point S>
void require_scale(double scale, const std::string& what) {
  const S held = static_cast<S>(scale);
  if (!std::isfinite(held)) throw NonFiniteError(what + ": expected a finite scale, got one that is not, in its type of numbers");
  if (held == 0) throw std::invalid_argument(what + ": expected a scale other than 0, got one that is 0 in its type of numbers");
}

/// Sets the model's adapters to those of `file`, a reader with name(), unmatched() and notes(): take(place, module) is what it has for a
/// module, or none. Each takes the rank of the file as its max_rank, and the file's scale.
///
/// With nothing changed, throws what take throws; std::invalid_argument, naming the module, for an adapter that cannot have such factors;
/// and if `strict`, FormatError with both lists, when the model and the file do not have the same adapters.
template <class Format, class File, class T, class Take>
LoadReport load_adapters(const Format& format, const File& file, T& model, bool strict, Take&& take) {
  LoadReport report;
  Assignments assignments;
  format.for_each_module(model, [&](const auto& place, const auto& module) {
    auto found = take(place, module);
    if (!found && module.components() > 0) report.missing_modules.push_back(place.module);
    if (!found) return;
    AdapterScale& adapter = report.adapters.emplace_back(AdapterScale{place.in_file, found->factors.A.rows(), found->alpha});
    const std::string subject = std::string(format.caller) + ": " + place.subject();
    adapter.scale = naming(subject, [&] { return module.prepare(std::move(*found), assignments); });
  });
  report.unmatched_tensors = file.unmatched();
  report.notes = file.notes();
  if (strict) require_complete(report, file.name());
  assignments.assign();
  return report;
}

/// Calls collect(place, module, values) for each module of the model with what it is at its rank, the next of `ranks`; at rank 0 it has no
/// component. Whoever saves writes nothing before this returns, since a later module may be refused.
///
/// Throws std::invalid_argument unless there is a rank in [0, its components] for each, for trained parameters outside of the adapters, for
/// a scale of 0, and if no module has a component; NonFiniteError for a scale that is not finite.
template <class Format, class T, class Collect>
void for_each_module_at(const Format& format, const T& model, const std::vector<Index>& ranks, Collect&& collect) {
  const std::string caller(format.caller);
  require_only_adapters(model, caller);
  std::size_t count = 0;
  format.for_each_module(model, [&](const auto&, const auto&) { ++count; });
  if (ranks.size() != count)
    throw std::invalid_argument(caller + ": expected a rank for each of " + std::to_string(count) + " adapters, got " +
                                std::to_string(ranks.size()));
  bool any = false;
  auto next = ranks.begin();
  format.for_each_module(model, [&]<class Module>(const auto& place, const Module& module) {
    const std::string subject = caller + ": " + place.subject();
    const Index rank = *next++;
    require_in_range(rank, 0, module.components(), subject + ": rank");
    auto values = naming(subject, [&] { return module.values(rank); });
    const bool has_components = values.factors.A.rows() > 0;
    if (has_components) require_scale<typename Module::Scalar>(values.factors.scale, subject);
    any = any || has_components;
    collect(place, module, std::move(values));
  });
  if (!any) throw std::invalid_argument(caller + ": expected a model with an adapter that has a component, got none");
}

/// The same rank for each module of the model; for those that have fewer components, as many as they have. Throws std::invalid_argument for
/// a rank outside [1, the largest max_rank].
template <class Format, class T>
std::vector<Index> same_rank(const Format& format, const T& model, Index rank) {
  Index largest = 1;
  std::vector<Index> ranks;
  format.for_each_module(model, [&](const auto&, const auto& module) {
    largest = std::max(largest, module.max_rank());
    ranks.push_back(std::min(rank, module.components()));
  });
  require_in_range(rank, 1, largest, std::string(format.caller) + ": rank");
  return ranks;
}

}  // namespace detail

}  // namespace dylora

#endif
