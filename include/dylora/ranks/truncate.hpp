#ifndef DYLORA_RANKS_TRUNCATE_HPP
#define DYLORA_RANKS_TRUNCATE_HPP

#include <algorithm>
#include <cstddef>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/error.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"

/// The adapters of a model by name, and cutting each to a rank of its own. Nested components make that possible without training again: any
/// prefix of any adapter is an adapter.
///
///     for (const AdapterRank& adapter : adapter_ranks(model)) std::cout << adapter.name << ' ' << adapter.rank << '\n';
///     truncate_each(model, {8, 2, 0, 5});   // the first adapter keeps 8 components, the second 2, the third none, the fourth 5
///     model.forward(x, 8);                  // each adapter uses what it has
///
/// Parameters with a rank axis that follow each other under one name up to the last dot make an adapter.
namespace dylora {

struct AdapterRank {
  std::string name;      ///< as in the names of its parameters: "h.0.attn.q_proj"; empty for an adapter by itself
  Index rank;            ///< the components it has
  Index component_size;  ///< the parameters of one component: in + out for a LowRank

  bool operator==(const AdapterRank&) const = default;
};

namespace detail {

/// Calls f(i, name, parameter, member...) for each parameter with a rank axis, where i counts the adapters.
template <class F, class T, class... Beside>
void zip_adapters(F&& f, T& trained, Beside&... beside) {
  std::size_t count = 0;
  std::string current;
  for_each_parameter(
      [&](Parameter parameter, auto&... members) {
        if (parameter.rank_axis == RankAxis::none) return;
        const std::size_t dot = parameter.name.rfind('.');
        const std::string_view name = dot == std::string_view::npos ? "" : parameter.name.substr(0, dot);
        if (count == 0 || name != current) ++count;
        current = name;
        f(count - 1, name, parameter, members...);
      },
      trained, beside...);
}

/// Each adapter's parameters become the first ranks[i] components of those in `from`, which may be the same object.
template <class T, class From>
void assign_components(T& trained, const From& from, const std::vector<Index>& ranks) {
  zip_adapters([&](std::size_t i, std::string_view, Parameter parameter, auto& p,
                   const auto& source) { p = component_block(parameter.rank_axis, source, 0, ranks[i]).eval(); },
               trained, from);
}

}  // namespace detail

/// The adapters of `trained`, in the order of its traversal.
/// Throws ShapeError, naming the adapter, if its parameters disagree about the number of components.
template <class T>
std::vector<AdapterRank> adapter_ranks(const T& trained) {
  std::vector<AdapterRank> adapters;
  detail::zip_adapters(
      [&](std::size_t i, std::string_view name, Parameter parameter, const auto& p) {
        const Index components = detail::component_count(parameter.rank_axis, p);
        if (i == adapters.size()) adapters.push_back({std::string(name), components, 0});
        require_equal(components, adapters[i].rank, std::string(parameter.name) + ": components, against the rest of its adapter");
        adapters[i].component_size += parameter.rank_axis == RankAxis::rows ? p.cols() : p.rows();
      },
      trained);
  return adapters;
}

/// Cuts each adapter to its first ranks[i] components, in the order of adapter_ranks; 0 leaves nothing of it. The model takes the same
/// ranks as before: at rank b each adapter computes what it did at the smaller of b and what it was cut to. Gradients and optimisers made
/// before no longer fit. Throws std::invalid_argument, with nothing cut, unless there is a rank in [0, its rank] for each adapter.
template <class T>
void truncate_each(T& trained, const std::vector<Index>& ranks) {
  const std::vector<AdapterRank> adapters = adapter_ranks(trained);
  if (ranks.size() != adapters.size()) {
    throw std::invalid_argument("truncate_each: expected a rank for each of " + std::to_string(adapters.size()) + " adapters, got " +
                                std::to_string(ranks.size()));
  }
  for (std::size_t i = 0; i < ranks.size(); ++i)
    require_in_range(ranks[i], 0, adapters[i].rank, "truncate_each: rank of adapter \"" + adapters[i].name + '"');
  detail::assign_components(trained, trained, ranks);
}

/// Cuts every adapter to `rank` components; those that have no more stay as they are. Throws std::invalid_argument if rank < 0.
template <class T>
void truncate(T& trained, Index rank) {
  require_in_range(rank, 0, std::numeric_limits<Index>::max(), "truncate: rank");
  std::vector<Index> ranks;
  for (const AdapterRank& adapter : adapter_ranks(trained)) ranks.push_back(std::min(rank, adapter.rank));
  truncate_each(trained, ranks);
}

}  // namespace dylora

#endif
