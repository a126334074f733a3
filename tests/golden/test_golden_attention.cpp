#include "golden/golden.hpp"

using namespace dylora;

namespace {

template <class Projection>
Projection read_projection(const golden::File& file, const std::string& name) {
  using S = typename Projection::Scalar;
  DenseWeight<S> base(file.matrix<S>(name + ".weight"), file.matrix<S>(name + ".bias"));
  if constexpr (std::same_as<Projection, Linear<S>>) {
    return {std::move(base), {file.matrix<S>(name + ".lora_A"), file.matrix<S>(name + ".lora_B"), {.alpha = file.number("alpha")}}};
  } else {
    return Projection(std::move(base));
  }
}

/// With adapters on q and v; k and o are as `KeyOutput` says.
template <class S, class KeyOutput>
void check_attention(const golden::File& file, AttentionOptions options, const std::string& adapted) {
  using Layer = Attention<S, Linear<S>, KeyOutput, Linear<S>, KeyOutput>;
  const std::string model = std::to_string(options.key_value_heads) + '/';
  const Layer layer(read_projection<Linear<S>>(file, model + "q_proj"), read_projection<KeyOutput>(file, model + "k_proj"),
                    read_projection<Linear<S>>(file, model + "v_proj"), read_projection<KeyOutput>(file, model + "o_proj"), options);
  std::vector<std::pair<std::string, Index>> cases = {{"short", 1}, {"short", 3}};
  if (options.key_value_heads == 2 && adapted == "qkvo") cases.emplace_back("long", 2);
  for (const auto& [batch, rank] : cases) {
    const auto x = file.matrix<S>(batch + "/x"), dy = file.matrix<S>(batch + "/dy");
    const Sequences sequences(file.integers(batch + "/lengths"));
    const std::string at_rank = model + (options.causal ? "causal/" : "full/") + adapted + '/' + batch + '/' + std::to_string(rank);
    golden::check_at_rank(layer, rank, file, at_rank, dy, x, sequences);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("Attention computes what PyTorch does: grouped heads, ragged sequences, any subset adapted", "[golden]", float, double) {
  using S = TestType;
  const golden::File file("attention.txt");
  for (const Index key_value_heads : {4, 2, 1}) {
    for (const bool causal : {true, false}) {
      const AttentionOptions options{.heads = 4, .key_value_heads = key_value_heads, .causal = causal};
      check_attention<S, Linear<S>>(file, options, "qkvo");
      check_attention<S, FrozenLinear<S>>(file, options, "qv");
    }
  }
}
