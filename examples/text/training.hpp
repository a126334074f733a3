#ifndef DYLORA_EXAMPLES_TEXT_TRAINING_HPP
#define DYLORA_EXAMPLES_TEXT_TRAINING_HPP

#include <algorithm>
#include <cmath>
#include <dylora/dylora.hpp>
#include <span>
#include <string>
#include <vector>

#include "gpt/gpt.hpp"
#include "text/corpus.hpp"

/// A Gpt on batches of text: one loss with its gradients, the loss over many batches, and text that continues a prompt.
namespace text {

/// The next-token loss of one batch at `rank`; adds its gradients times `weight`.
/// Throws NonFiniteError naming the layer whose output first ceased to be finite.
template <class Model>
double loss_and_gradients(const Model& model, const Batch& batch, dylora::RankSlice rank, double weight, typename Model::Cache& cache,
                          typename Model::Gradients& gradients, typename Model::Workspace& workspace) {
  using S = typename Model::Scalar;
  model.forward(batch.tokens, batch.sequences, rank, cache);
  auto logits = cache.logits.view();
  const double loss = dylora::cross_entropy<S>(logits, batch.targets, logits, {.weight = weight});
  if (!std::isfinite(loss)) {
    throw dylora::NonFiniteError("output of " + model.first_non_finite(cache) + ": expected finite numbers, got a NaN or an infinity");
  }
  model.backward(logits, cache, gradients, workspace);
  return loss;
}

/// The same with the batch divided into groups of windows, each at its rank and with its weight, in one forward and one backward. Returns
/// the mean over the groups by their weights.
template <class Model>
double loss_and_gradients(const Model& model, const Batch& batch, const std::vector<dylora::RankGroup>& groups,
                          typename Model::Cache& cache, typename Model::Gradients& gradients, typename Model::Workspace& workspace) {
  using S = typename Model::Scalar;
  model.forward(batch.tokens, batch.sequences, dylora::batch_ranks(groups, batch.sequences), cache);
  auto logits = cache.logits.view();
  const double loss = dylora::weighted_loss(groups, batch.sequences, [&](Index begin, Index count, double weight) {
    auto part = logits.middleCols(begin, count);
    const auto targets = std::span(batch.targets).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count));
    return dylora::cross_entropy<S>(part, targets, part, {.weight = weight});
  });
  if (!std::isfinite(loss)) {
    throw dylora::NonFiniteError("output of " + model.first_non_finite(cache) + ": expected finite numbers, got a NaN or an infinity");
  }
  model.backward(logits, cache, gradients, workspace);
  return loss;
}

/// The mean next-token loss over `batches` at `rank`, in nats.
template <class Model>
double mean_loss(const Model& model, const std::vector<Batch>& batches, dylora::RankSlice rank, typename Model::Cache& cache) {
  using S = typename Model::Scalar;
  double sum = 0, count = 0;
  for (const Batch& batch : batches) {
    model.forward(batch.tokens, batch.sequences, rank, cache);
    auto logits = cache.logits.view();
    const auto tokens = static_cast<double>(batch.tokens.size());
    sum += tokens * dylora::cross_entropy<S>(logits, batch.targets, logits);
    count += tokens;
  }
  return sum / count;
}

/// The next-token loss at every rank up to `highest`, rank 0 the model without its adapters: each batch at all of them, weighted by its
/// tokens.
template <class Model>
dylora::RankCurve rank_curve(const Model& model, const std::vector<Batch>& batches, Index highest, typename Model::Cache& cache) {
  std::vector<double> tokens;
  for (const Batch& batch : batches) tokens.push_back(static_cast<double>(batch.tokens.size()));
  const auto loss = [&](dylora::RankSlice rank, Index i) { return mean_loss(model, {batches[static_cast<std::size_t>(i)]}, rank, cache); };
  return dylora::evaluate_ranks(0, highest, static_cast<Index>(batches.size()), loss, tokens);
}

namespace detail {

/// The logits after the last of `seen`, whose first `read` tokens are in `past`; where a model cannot go on from its past, all is read
/// again.
template <class Model>
auto next_logits(const Model& model, const std::vector<Index>& seen, std::size_t read, dylora::RankSlice rank,
                 std::vector<dylora::KeyValueCache<typename Model::Scalar>>& past) {
  using S = typename Model::Scalar;
  if constexpr (Model::extends) {
    const dylora::MatrixX<S> logits = model.extend(std::span<const Index>(seen).subspan(read), rank, past);
    return dylora::VectorX<S>(logits.col(logits.cols() - 1));
  } else {
    typename Model::Cache cache;
    model.forward(seen, dylora::Sequences({static_cast<Index>(seen.size())}), rank, cache);
    return dylora::VectorX<S>(cache.logits.view().col(static_cast<Index>(seen.size()) - 1));
  }
}

}  // namespace detail

/// `length` tokens that continue those of `prompt` (at least one), drawn at `temperature` from the model at `rank`, one at a time over a
/// key/value cache. When the context is full, generation goes on from its second half.
template <class Model>
std::vector<Index> continue_text(const Model& model, const std::vector<Index>& prompt, Index length, double temperature,
                                 dylora::RankSlice rank, dylora::Rng& rng) {
  std::vector<Index> written, seen = prompt;
  std::vector<dylora::KeyValueCache<typename Model::Scalar>> past;
  std::size_t read = 0;
  while (static_cast<Index>(written.size()) < length) {
    if (static_cast<Index>(seen.size()) > model.config.context) {
      seen.erase(seen.begin(), seen.end() - std::max<Index>(1, model.config.context / 2));
      past.clear();
      read = 0;
    }
    const Eigen::ArrayXd last = detail::next_logits(model, seen, read, rank, past).template cast<double>().array();
    read = seen.size();
    const Eigen::ArrayXd weights = ((last - last.maxCoeff()) / temperature).exp();
    double drawn = rng.uniform() * weights.sum();
    Index token = 0;
    while (token + 1 < weights.size() && (drawn -= weights[token]) >= 0) ++token;
    seen.push_back(token);
    written.push_back(token);
  }
  return written;
}

}  // namespace text

#endif
