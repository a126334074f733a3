#include <dylora/methods/lora_flow/flow.hpp>
#include <dylora/methods/lora_flow/gated_adapters.hpp>
#include <span>

#include "finetune/adapted_as.hpp"
#include "finetune/methods.hpp"
#include "finetune/methods/low_rank.hpp"
#include "gpt/flow_block.hpp"

namespace finetune {
namespace {

using Linear = dylora::Linear<float, GatedAdapters<float>>;

/// Two LoRAs are trained first, each on one half of the text, for three eighths of the steps. In the last quarter a gate for each block
/// learns on all of the text how much of which LoRA a token needs.
struct Flow : PlainMethod {
  static constexpr Index adapters = 2;

  gpt::Gpt<float> fresh;

  /// Of the LoRAs, which are frozen by the time that the gate is trained.
  Index trained_before() const { return adapters * parameter_count(fresh); }

  static Index steps_of_each(const Options& o) { return std::max<Index>(1, 3 * o.steps / 8); }
  Index steps(const Options& o) const { return std::max<Index>(1, o.steps - adapters * steps_of_each(o)); }

  template <class Model>
  void prepare(Model& model, const Options& o, const Task& task) {
    std::vector<gpt::Gpt<float>> trained;
    for (Index part = 0; part < adapters; ++part) {
      Options first = o;
      first.sampler = "fixed";
      first.steps = steps_of_each(o);
      first.seed = o.seed + 10 * static_cast<std::uint64_t>(part + 1);
      Task share = task;
      const auto size = static_cast<std::ptrdiff_t>(task.training.size()) / adapters;
      share.training.assign(task.training.begin() + part * size, task.training.begin() + (part + 1) * size);
      trained.push_back(fresh);
      LowRankMethod method;
      gpt::Gpt<float>::Cache cache;
      const Training training = train(trained.back(), method, first, {}, share, cache);
      if (!training.stopped.empty()) throw NonFiniteError(training.stopped);
    }
    for (std::size_t i = 0; i < model.blocks.size(); ++i) gather(model.blocks[i], trained, i);
  }

 private:
  static void gather(gpt::FlowBlock<float, Linear>& block, const std::vector<gpt::Gpt<float>>& trained, std::size_t i) {
    const auto of_all = [&](auto&& projection) {
      std::vector<LowRank<float>> all;
      for (const auto& model : trained) all.push_back(projection(model.blocks[i]).adapter);
      return GatedAdapters<float>(all);
    };
    block.attention.q.adapter = of_all([](const auto& from) -> const auto& { return from.attention.q; });
    block.attention.k.adapter = of_all([](const auto& from) -> const auto& { return from.attention.k; });
    block.attention.v.adapter = of_all([](const auto& from) -> const auto& { return from.attention.v; });
    block.attention.o.adapter = of_all([](const auto& from) -> const auto& { return from.attention.o; });
    block.fc.adapter = of_all([](const auto& from) -> const auto& { return from.fc; });
    block.proj.adapter = of_all([](const auto& from) -> const auto& { return from.proj; });
  }
};

}  // namespace

AnyModel adapt_by_flow(const text::BaseModel& base, const Options& o) {
  Rng rng(o.seed);
  auto fresh = gpt::adapted(base, adapter_options(o), rng, make_targets(o));
  auto model = gpt::with_projections<Linear>(base, [&](DenseWeight<float> weight, gpt::Place place) {
    const LowRank<float> none(weight.cols(), weight.rows(), adapter_options(o, place), rng);
    return Linear(std::move(weight), GatedAdapters<float>(std::vector<LowRank<float>>(Flow::adapters, none)));
  });
  return adapted_as(std::move(model), Flow{{}, std::move(fresh)});
}

}  // namespace finetune
