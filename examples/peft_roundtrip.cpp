// Train once, save as PEFT at three ranks, load each into a fresh layer: the same outputs, bit for bit.

#include <dylora/dylora.hpp>
#include <dylora/io/peft/peft.hpp>
#include <filesystem>
#include <iomanip>
#include <iostream>
#include <random>
#include <set>
#include <string>
#include <system_error>

namespace fs = std::filesystem;

/// A folder for this run: the one named on the command line, which stays, or one of its own.
struct Folder {
  fs::path path;
  bool temporary;

  explicit Folder(const char* name)
      : path(name ? name : fs::temp_directory_path() / ("dylora_" + std::to_string(std::random_device()()))), temporary(name == nullptr) {}
  ~Folder() {
    std::error_code ignored;
    if (temporary) fs::remove_all(path, ignored);
  }
};

int main(int argc, char** argv) try {
  using namespace dylora;
  Rng rng(42);
  const MatrixX<float> W = random_uniform<float>(48, 64, 0.5, rng);
  const MatrixX<float> U = random_uniform<float>(48, 6, 0.5, rng), V = random_uniform<float>(6, 64, 0.5, rng);
  const MatrixX<float> x = random_uniform<float>(64, 256, 0.5, rng), target = (W + U * V) * x;

  Linear<float> layer(W, {.max_rank = 8, .alpha = 8}, rng);
  auto gradients = zeros_like(layer);
  Linear<float>::Cache cache;
  AdamW optimizer(layer, {.lr = 5e-3});
  const UniformRank sample_rank{1, 8};
  for (int step = 0; step < 500; ++step) {
    const RankSlice rank = sample_rank(rng);
    const auto loss = mse(layer.forward(x, rank, cache), target);
    set_zero(layer, gradients);
    layer.backward(loss.gradient, cache, gradients);
    optimizer.step(layer, gradients);
  }

  // A layer by itself has no name in a model: the prefix says which module of the wrapped model it is.
  const Folder folder(argc > 1 ? argv[1] : nullptr);
  bool same = true;
  std::cout << "rank   scale   bytes       mse   largest difference\n";
  for (const Index rank : {1, 4, 8}) {
    const fs::path saved = folder.path / ("rank_" + std::to_string(rank));
    save_peft(saved, layer, rank, {.prefix = "model.proj"});

    Linear<float> fresh(W, {.max_rank = 2}, rng);  // of another rank: the file's counts
    const LoadReport report = load_peft(saved, fresh, {.prefix = "model.proj"});
    const MatrixX<float> expected = layer.forward(x, rank), got = fresh.forward(x, fresh.max_rank());
    const float difference = (got - expected).cwiseAbs().maxCoeff();
    same = same && difference == 0 && report.adapters.size() == 1 && report.adapters.front().rank == rank;
    std::cout << std::setw(4) << rank << std::setw(8) << report.adapters.front().scale << std::setw(8)
              << fs::file_size(saved / "adapter_model.safetensors") << std::setw(10) << mse(got, target).value << std::setw(21)
              << difference << '\n';
  }
  for (const auto& entry : fs::directory_iterator(folder.path / "rank_8"))
    std::cout << "rank_8/" << entry.path().filename().string() << '\n';
  std::cout << (same ? "each equal to the layer they came from\n" : "they differ from the layer they came from\n");
  return same ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << "peft_roundtrip: " << error.what() << '\n';
  return 1;
}
