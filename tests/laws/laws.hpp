#ifndef DYLORA_TESTS_LAWS_LAWS_HPP
#define DYLORA_TESTS_LAWS_LAWS_HPP

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <string>

#include "dylora/core/batch_ranks.hpp"
#include "dylora/core/parameters.hpp"
#include "dylora/core/rank_slice.hpp"
#include "dylora/core/types.hpp"
#include "dylora/ranks/truncate.hpp"
#include "dylora/testing/gradient_check.hpp"
#include "support/catch.hpp"
#include "support/law.hpp"
#include "support/make.hpp"
#include "support/values.hpp"

/// What adapters and layers obey alike. A Case is what a law is shown on: c.subject of type T, c.x, c.dy, c.rank. What a forward and a
/// backward give for its x and dy is c.run(other, ranks) of another T, c.run() of its subject at its rank, and c.run_as<D>() of the same
/// with double scalars, of type D.
namespace dylora::test {

/// What a forward and a backward give, or add to zero.
template <class T>
struct Result {
  using S = typename T::Scalar;
  MatrixX<S> y, dx;
  typename T::Gradients gradients;

  bool operator==(const Result& other) const {
    return same_bits(y, other.y) && same_bits(dx, other.dx) && same_bits(values<T>(gradients), values<T>(other.gradients));
  }
};

template <class T>
void check_same_outputs(const Result<T>& one, const Result<T>& other) {
  CHECK(same_bits(one.y, other.y));
  CHECK(same_bits(one.dx, other.dx));
}

/// Of neighbouring samples [begin, begin + n).
template <class T>
void check_same_outputs(const Result<T>& one, const Result<T>& other, Index begin, Index n) {
  using S = typename T::Scalar;
  CHECK(same_bits(MatrixX<S>(one.y.middleCols(begin, n)), MatrixX<S>(other.y.middleCols(begin, n))));
  CHECK(same_bits(MatrixX<S>(one.dx.middleCols(begin, n)), MatrixX<S>(other.dx.middleCols(begin, n))));
}

template <class T>
void check_nothing_trained(const typename T::Gradients& gradients) {
  for (const std::string& trained : trained_components<T>(gradients)) CHECK(trained.find('1') == std::string::npos);
}

/// In double held to differences; in float, to the same of double scalars, of type InDouble.
template <class InDouble, class Case>
void check_backward_is_derivative(const Case& c) {
  using T = typename Case::Subject;
  if constexpr (std::same_as<typename T::Scalar, double>) {
    Rng rng(4);
    const GradientReport report = check_gradients(c.subject, c.x, c.rank, rng, fresh_cache<T>());
    INFO(report.where);
    CHECK(report.entries == c.x.size() + parameter_count(c.subject));
    CHECK(report.error < 1e-6);
  } else {
    const auto got = c.run();
    const auto exact = c.template run_as<InDouble>();
    CHECK(gap(in_double(got.y), exact.y) < rounding<float>);
    CHECK(gap(in_double(got.dx), exact.dx) < rounding<float>);
    CHECK(gap(values<T>(got.gradients).template cast<double>(), values<InDouble>(exact.gradients)) < rounding<float>);
  }
}

/// At the rank b of the case, the subject is `truncated`, which has its first b components alone.
template <class Case>
void check_rank_is_truncation(const Case& c, const typename Case::Subject& truncated) {
  using T = typename Case::Subject;
  const auto whole = c.run(), part = c.run(truncated, c.rank);
  check_same_outputs(whole, part);
  CHECK(same_bits(component_values<T>(whole.gradients, 0, c.rank.active), component_values<T>(part.gradients, 0)));
  CHECK(same_bits(shared_values<T>(whole.gradients), shared_values<T>(part.gradients)));
}

/// Returns the subject with NaN past the rank of the case.
template <class Case>
typename Case::Subject check_unread_past_rank(const Case& c) {
  using T = typename Case::Subject;
  const auto clean = c.run();
  T poisoned = c.subject;
  fill_components<T>(poisoned, nan<typename T::Scalar>, c.rank.active);
  CHECK(c.run(poisoned, c.rank) == clean);
  CHECK(clean.y.allFinite());
  CHECK(component_values<T>(clean.gradients, c.rank.active).isZero(0));
  return poisoned;
}

template <class Case>
void check_frozen_prefix(const Case& c) {
  using T = typename Case::Subject;
  const Index b = c.rank.active, t = c.rank.trainable_from;
  const auto frozen = c.run(), nested = c.run(c.subject, b);
  check_same_outputs(frozen, nested);
  CHECK(component_values<T>(frozen.gradients, 0, t).isZero(0));
  CHECK(same_bits(component_values<T>(frozen.gradients, t, b), component_values<T>(nested.gradients, t, b)));
  CHECK(same_bits(shared_values<T>(frozen.gradients), shared_values<T>(nested.gradients)));
}

/// Returns what it gives frozen up to its rank.
template <class Case>
Result<typename Case::Subject> check_frozen_up_to_rank(const Case& c) {
  using T = typename Case::Subject;
  const Index b = c.rank.active;
  auto frozen = c.run(c.subject, BatchRanks(b, b));
  const auto nested = c.run(c.subject, b);
  check_same_outputs(frozen, nested);
  CHECK(component_values<T>(frozen.gradients, 0).isZero(0));
  CHECK(same_bits(shared_values<T>(frozen.gradients), shared_values<T>(nested.gradients)));
  check_nothing_trained<T>(frozen.gradients);
  return frozen;
}

/// Calls also(cut, left) for each number of components: the subject cut to them, and what the rank of the case leaves of them.
template <class Case, class Also>
void check_cut(const Case& c, Also&& also) {
  using T = typename Case::Subject;
  if (!has_components(c.subject)) return;
  for (Index components = 0; components <= law_rank; ++components) {
    T cut = c.subject;
    truncate(cut, components);
    CHECK(cut.max_rank() == c.subject.max_rank());
    const Index b = std::min(c.rank.active, components), t = std::min(c.rank.trainable_from, components);
    const RankSlice left = b == 0 ? RankSlice::none() : RankSlice(b, t);
    const auto got = c.run(cut, c.rank), whole = c.run(c.subject, left);
    check_same_outputs(got, whole);
    CHECK(same_bits(component_values<T>(got.gradients, 0), component_values<T>(whole.gradients, 0, components)));
    CHECK(same_bits(shared_values<T>(got.gradients), shared_values<T>(whole.gradients)));
    const auto noted = trained_components<T>(got.gradients), expected = trained_components<T>(whole.gradients);
    for (std::size_t i = 0; i < noted.size(); ++i) CHECK(noted[i] == expected[i].substr(0, static_cast<std::size_t>(components)));
    also(cut, left);
  }
}

/// `mixed` is what one call gave for a batch, `apart` what its parts gave one after another.
template <class T>
void check_batch_is_its_parts(const Result<T>& mixed, const Result<T>& apart) {
  check_same_outputs(mixed, apart);
  CHECK(same_bits(values<T>(mixed.gradients), values<T>(apart.gradients)));
  CHECK(trained_components<T>(mixed.gradients) == trained_components<T>(apart.gradients));
}

}  // namespace dylora::test

#endif
