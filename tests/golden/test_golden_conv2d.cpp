#include "dylora/layers/conv2d.hpp"
#include "dylora/layers/loralib_conv2d.hpp"
#include "golden/golden.hpp"

using namespace dylora;

namespace {

template <class S>
Conv2d<S> read_layer(const golden::File& file, const std::string& name) {
  const auto extent = [&](const char* option) {
    const auto sides = file.integers(name + '/' + option);
    return Extent{sides.at(0), sides.at(1)};
  };
  const auto weight = file.matrix<S>(name + "/weight"), bias = file.matrix<S>(name + "/bias");
  const Index groups = file.count(name + "/groups") == 0 ? 1 : file.integers(name + "/groups").at(0), rows = weight.rows() / groups;
  const Extent kernel = extent("kernel");
  std::vector<Linear<S>> projections;
  for (Index group = 0; group < groups; ++group) {
    const std::string prefix = name + '/' + (groups == 1 ? "" : std::to_string(group) + '.');
    projections.push_back({{weight.middleRows(group * rows, rows), bias.middleRows(group * rows, rows)},
                           {file.matrix<S>(prefix + "lora_A"), file.matrix<S>(prefix + "lora_B"), {.alpha = file.number("alpha")}}});
  }
  return {Unfold({.channels = weight.cols() / (kernel.height * kernel.width) * groups,
                  .image = extent("image"),
                  .kernel = kernel,
                  .stride = extent("stride"),
                  .padding = extent("padding"),
                  .dilation = extent("dilation")}),
          std::move(projections)};
}

}  // namespace

TEMPLATE_TEST_CASE("Conv2d computes what PyTorch does at every rank, nested and frozen", "[golden]", float, double) {
  using S = TestType;
  const golden::File file("conv2d.txt");
  for (const std::string name : {"strided", "dilated", "grouped", "pointwise"}) {
    const Conv2d<S> conv = read_layer<S>(file, name);
    const auto x = file.matrix<S>(name + "/x"), dy = file.matrix<S>(name + "/dy");
    golden::check_at_every_rank(conv, file, name, dy, x);
    for (Index rank = 1; rank <= conv.max_rank(); ++rank) {
      golden::check(conv.merged(rank).forward(x, RankSlice::none()), file, name + '/' + std::to_string(rank) + "/y");
    }
  }
}

TEMPLATE_TEST_CASE("LoralibConv2d merges what PyTorch does at every rank", "[golden]", float, double) {
  using S = TestType;
  const golden::File file("conv2d.txt");
  for (const Index groups : {1, 2}) {
    const std::string name = "loralib/" + std::to_string(groups) + '/';
    const LoralibConv2d<S> adapter(file.matrix<S>(name + "lora_A"), file.matrix<S>(name + "lora_B"),
                                   {.kernel = 2, .groups = groups, .alpha = file.number("alpha")});
    REQUIRE(adapter.max_rank() == 2);
    for (Index rank = 1; rank <= 2; ++rank) {
      golden::check(adapter.merged(file.matrix<S>(name + "weight"), rank).W, file, name + std::to_string(rank) + "/merged");
    }
  }
}
