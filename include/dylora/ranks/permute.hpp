#ifndef DYLORA_RANKS_PERMUTE_HPP
#define DYLORA_RANKS_PERMUTE_HPP

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "dylora/core/parameters.hpp"
#include "dylora/core/types.hpp"
#include "dylora/ranks/truncate.hpp"

namespace dylora {

/// Components change places: component i of adapter k becomes what orders[k][i] was, in all of its parameters together, in the order of
/// adapter_ranks. The function of each adapter with all its components stays what it was, up to rounding; that at lower ranks becomes
/// another. What optimisers keep about components no longer belongs to them; start a fresh one. Throws std::invalid_argument, with nothing
/// changed, unless there is a permutation for each adapter.
template <class T>
void permute_components(T& trained, const std::vector<std::vector<Index>>& orders) {
  const std::vector<AdapterRank> adapters = adapter_ranks(trained);
  if (orders.size() != adapters.size()) {
    throw std::invalid_argument("permute_components: expected an order for each of " + std::to_string(adapters.size()) + " adapters, got " +
                                std::to_string(orders.size()));
  }
  for (std::size_t k = 0; k < orders.size(); ++k) {
    std::vector<Index> all(static_cast<std::size_t>(adapters[k].rank));
    std::iota(all.begin(), all.end(), Index{0});
    if (!std::is_permutation(orders[k].begin(), orders[k].end(), all.begin(), all.end())) {
      throw std::invalid_argument("permute_components: adapter " + adapters[k].name + ": expected each of its " +
                                  std::to_string(adapters[k].rank) + " components once, got another order");
    }
  }
  detail::zip_adapters(
      [&](std::size_t k, std::string_view, Parameter parameter, auto& p) {
        const auto before = p.eval();
        for (std::size_t i = 0; i < orders[k].size(); ++i) {
          const Index to = static_cast<Index>(i), from = orders[k][i];
          detail::component_block(parameter.rank_axis, p, to, to + 1) =
              detail::component_block(parameter.rank_axis, before, from, from + 1);
        }
      },
      trained);
}

}  // namespace dylora

#endif
