#include "golden/golden.hpp"

using namespace dylora;

namespace {

template <class Optimizer, class S>
void check_training(const golden::File& file, const std::string& name, Optimizer optimizer, Linear<S> layer) {
  const auto x = file.matrix<S>("x"), target = file.matrix<S>("target");
  const std::string schedule = name.substr(0, name.find('/'));
  const auto micro_batches = file.matrix<Index>(schedule + "/micro_batches");  // each row: the step, and its RankSlice
  auto gradients = zeros_like(layer);
  typename Linear<S>::Cache cache;
  MatrixX<S> dy(target.rows(), target.cols());
  for (Index row = 0; row < micro_batches.rows();) {
    const Index step = micro_batches(row, 0), size = (micro_batches.col(0).array() == step).count();
    set_zero(layer, gradients);
    for (const Index end = row + size; row < end; ++row) {
      const RankSlice rank(micro_batches(row, 1), micro_batches(row, 2));
      mse<S>(layer.forward(x, rank, cache), target, dy, 1 / static_cast<double>(size));
      layer.backward(dy, cache, gradients);
    }
    optimizer.step(layer, gradients);
    const std::string after = name + '/' + std::to_string(step);
    if (step == 1 || step == 2 || step == 10 || step == 20) {
      golden::check(layer.adapter.A, file, after + "/lora_A");
      golden::check(layer.adapter.B, file, after + "/lora_B");
    }
  }
  CHECK(optimizer.steps() == 20);
}

}  // namespace

TEMPLATE_TEST_CASE("AdamW and Sgd follow PyTorch for 20 steps at changing ranks, active_only and dense", "[golden]", float, double) {
  using S = TestType;
  const golden::File file("optimizers.txt");
  const Linear<S> layer({file.matrix<S>("weight"), file.matrix<S>("bias")},
                        {file.matrix<S>("lora_A"), file.matrix<S>("lora_B"), {.alpha = file.number("alpha")}});
  const auto option = [&](const char* name) { return file.number(name); };
  for (const std::string schedule : {"nested", "frozen", "accumulated"}) {
    for (const auto& [mode, update] : {std::pair("active_only", Update::active_only), std::pair("dense", Update::dense)}) {
      const AdamW adamw(layer, {.lr = option("lr"),
                                .beta1 = option("beta1"),
                                .beta2 = option("beta2"),
                                .eps = option("eps"),
                                .weight_decay = option("weight_decay"),
                                .max_norm = option("max_norm"),
                                .update = update});
      check_training(file, schedule + "/adamw/" + mode, adamw, layer);
      const Sgd sgd(layer, {.lr = option("lr"),
                            .momentum = option("momentum"),
                            .weight_decay = option("weight_decay"),
                            .max_norm = option("max_norm"),
                            .update = update});
      check_training(file, schedule + "/sgd/" + mode, sgd, layer);
    }
  }
}

TEMPLATE_TEST_CASE("Gradients are clipped as PyTorch clips them, also where the limit is the norm itself", "[golden]", float, double) {
  using S = TestType;
  const golden::File file("optimizers.txt");
  const auto gradient = file.matrix<S>("clip/gradient");
  for (const std::string norm : {"above", "at", "below"}) {
    LowRank<S> adapter(RowMatrix<S>::Zero(gradient.rows(), gradient.cols()), MatrixX<S>::Zero(3, gradient.rows()), {});
    auto gradients = zeros_like(adapter);
    gradients.A = gradient;
    gradients.A.components.insert(adapter.max_rank());
    Sgd optimizer(adapter, {.lr = 1, .max_norm = file.number("clip/" + norm + "/max_norm")});
    optimizer.step(adapter, gradients);
    golden::check(-adapter.A, file, "clip/" + norm + "/clipped");
  }
}
