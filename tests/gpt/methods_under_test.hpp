#ifndef DYLORA_TESTS_GPT_METHODS_UNDER_TEST_HPP
#define DYLORA_TESTS_GPT_METHODS_UNDER_TEST_HPP

#include <cmath>
#include <dylora/layers/embedding.hpp>
#include <dylora/methods/dora/dora_linear.hpp>
#include <dylora/methods/lora_flow/gated_adapters.hpp>
#include <dylora/methods/multilora.hpp>
#include <dylora/methods/reslora/link.hpp>
#include <string>
#include <utility>
#include <vector>

#include "dylora/methods/dora/options.hpp"
#include "dylora/methods/lora_flow/flow.hpp"
#include "dylora/methods/reslora/shortcut.hpp"
#include "dylora/testing/gradient_check.hpp"
#include "gpt/flow_block.hpp"
#include "gpt/gpt.hpp"
#include "support/values.hpp"
#include "text/training.hpp"

/// A tiny GPT, adapted by each method that needs something of the model besides its projections, and how its gradients are checked.
namespace dylora::test {

inline constexpr Index vocabulary = 11, context = 8, width = 8, highest_rank = 3;
inline constexpr LowRankOptions low_rank_options{.max_rank = highest_rank, .alpha = 2};

using BaseGpt = gpt::Gpt<double, gpt::DenseLinear<double>>;

/// Every trained value moved from where it starts, as training does.
template <class T>
void train_at_random(T& model, std::uint64_t seed) {
  Rng rng(seed);
  for_each_entry<T>(model, [&](Index, double& entry) { entry += rng.uniform() - 0.5; });
}

inline BaseGpt base_gpt(bool tied = true) {
  Rng rng(1);
  BaseGpt base =
      gpt::random_gpt<double>({.vocabulary = vocabulary, .context = context, .width = width, .layers = 2, .heads = 2, .tied = tied}, rng);
  train_at_random(base, 2);
  return base;
}

// The methods: `make` gives the base with fresh adapters, `extends` says whether generation can go on from keys and values.

/// A method that is a layer in the place of every projection.
template <class Projection, bool extends_>
struct ByProjection {
  using Linear = Projection;
  using Model = gpt::Gpt<double, Linear>;
  static constexpr bool extends = extends_;

  /// f(weight, place, rng) for each projection of the base.
  template <class F>
  static Model replaced(const BaseGpt& base, std::uint64_t seed, F&& f) {
    Rng rng(seed);
    return gpt::with_projections<Linear>(base,
                                         [&](DenseWeight<double> weight, gpt::Place place) { return f(std::move(weight), place, rng); });
  }
};

/// LoRA-Flow, of two LoRAs with different ranks.
struct Flow : ByProjection<Linear<double, GatedAdapters<double>>, false> {
  static Model make(const BaseGpt& base) {
    return replaced(base, 3, [](DenseWeight<double> weight, gpt::Place, Rng& rng) {
      const auto lora = [&](Index rank) {
        auto A = random_uniform<double, RowMatrix<double>>(rank, weight.cols(), 0.5, rng);
        return LowRank<double>(std::move(A), random_uniform<double>(weight.rows(), rank, 0.5, rng), low_rank_options);
      };
      const std::vector<LowRank<double>> loras{lora(highest_rank), lora(highest_rank - 1)};
      return Linear(std::move(weight), GatedAdapters<double>(loras));
    });
  }
};

/// A GPT whose token embedding has an adapter of its own.
template <class Linear>
using EmbeddingGpt = gpt::Gpt<double, Linear, Attention<double, Linear>, Embedding<double>>;

template <class Linear>
EmbeddingGpt<Linear> with_embedding(gpt::Gpt<double, Linear> model, LowRankOptions options) {
  Rng rng(4);
  return {model.config,
          Embedding<double>(model.token_embedding, options, rng),
          model.position_embedding,
          std::move(model.blocks),
          model.final_norm,
          model.head};
}

struct AdaptedEmbedding {
  using Model = EmbeddingGpt<FrozenLinear<double>>;
  static constexpr bool extends = true;

  static Model make(const BaseGpt& base) {
    const auto freeze = [](DenseWeight<double> weight, gpt::Place) { return FrozenLinear<double>(std::move(weight)); };
    return with_embedding(gpt::with_projections<FrozenLinear<double>>(base, freeze), low_rank_options);
  }
};

template <Shortcut shortcut>
struct Residual : ByProjection<ResidualLink<double, shortcut>, false> {
  using Link = ResidualLink<double, shortcut>;

  static gpt::Gpt<double, Link> make(const BaseGpt& base) {
    return Residual::replaced(base, 5, [](DenseWeight<double> weight, gpt::Place place, Rng& rng) {
      return Link(std::move(weight), {.adapter = low_rank_options, .position = place.block}, rng);
    });
  }
};
using ResidualInput = Residual<Shortcut::input>;
using ResidualBlock = Residual<Shortcut::block>;
using ResidualMiddle = Residual<Shortcut::middle>;

/// With the gradient that differences have, which goes through the norms.
struct Dora : ByProjection<DoraLinear<double>, true> {
  static Model make(const BaseGpt& base) {
    return replaced(base, 6, [](DenseWeight<double> weight, gpt::Place, Rng& rng) {
      return Linear(std::move(weight), {.adapter = low_rank_options, .norm_gradient = NormGradient::exact}, rng);
    });
  }
};

struct Multi : ByProjection<Linear<double, MultiLora<double>>, true> {
  static Model make(const BaseGpt& base) {
    return replaced(base, 7, [](DenseWeight<double> weight, gpt::Place, Rng& rng) {
      return Linear(std::move(weight), {.max_rank = highest_rank, .modules = 2, .alpha = 2}, rng);
    });
  }
};

template <class Method>
typename Method::Model trained(bool tied = true) {
  auto model = Method::make(base_gpt(tied));
  train_at_random(model, 8);
  return model;
}

/// Sequences of different lengths, where tokens come again and some never come; the targets are any.
inline text::Batch some_batch(const std::vector<Index>& lengths, std::uint64_t seed) {
  text::Batch batch{{}, {}, Sequences(lengths)};
  Rng rng(seed);
  for (Index i = 0; i < batch.sequences.tokens(); ++i) {
    batch.tokens.push_back(rng.below(vocabulary - 2));
    batch.targets.push_back(rng.below(vocabulary));
  }
  return batch;
}

template <class Model>
MatrixX<double> logits(const Model& model, const text::Batch& batch, const BatchRanks& ranks) {
  typename Model::Cache cache;
  model.forward(batch.tokens, batch.sequences, ranks, cache);
  return cache.logits.view();
}

/// The mean of −log softmax(logits)[target] over all tokens, from its definition.
template <class Model>
double mean_cross_entropy(const Model& model, const text::Batch& batch, const BatchRanks& ranks, typename Model::Cache& cache) {
  model.forward(batch.tokens, batch.sequences, ranks, cache);
  const auto columns = cache.logits.view();
  double sum = 0;
  for (Index i = 0; i < columns.cols(); ++i) {
    sum += std::log(columns.col(i).array().exp().sum()) - columns(batch.targets[static_cast<std::size_t>(i)], i);
  }
  return sum / static_cast<double>(columns.cols());
}

/// Compares gradients with central differences of fourth order of the mean cross-entropy, entry by entry; `learning` are the components
/// that learn in any sequence, and do so in each that they take part in.
template <class Model>
GradientReport compare_with_differences(Model model, const typename Model::Gradients& gradients, const text::Batch& batch,
                                        const BatchRanks& ranks, RankSlice learning) {
  constexpr double step = 1e-3;
  typename Model::Cache cache;
  const auto loss_at = [&](double& entry, double value) {
    const double kept = std::exchange(entry, value), loss = mean_cross_entropy(model, batch, ranks, cache);
    entry = kept;
    return loss;
  };
  const auto difference = [&](double& entry) {
    const double near = loss_at(entry, entry + step) - loss_at(entry, entry - step);
    const double far = loss_at(entry, entry + 2 * step) - loss_at(entry, entry - 2 * step);
    return (8 * near - far) / (12 * step);
  };
  detail::GradientComparison comparison;
  for_each_parameter(
      [&](Parameter parameter, auto& p, const auto& gradient) {
        const std::string name(parameter.name);
        if (parameter.rank_axis != RankAxis::none) comparison.require_noted(name, gradient.components, learning);
        const double floor = 0.01 * gradient.cwiseAbs().maxCoeff();
        for (Index j = 0; j < p.cols(); ++j) {
          for (Index i = 0; i < p.rows(); ++i) {
            const Index component = parameter.rank_axis == RankAxis::rows ? i : j;
            if (parameter.rank_axis != RankAxis::none && (component < learning.trainable_from || component >= learning.active)) {
              comparison.require_untouched(name, i, j, gradient(i, j));
            } else {
              comparison.compare(name, i, j, gradient(i, j), difference(p(i, j)), floor);
            }
          }
        }
      },
      model, gradients);
  return comparison.report;
}

}  // namespace dylora::test

#endif
