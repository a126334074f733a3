// One trained layer, several threads, a rank each: no locks, no modes, no copies of the weights.

#include <dylora/dylora.hpp>
#include <iostream>
#include <thread>
#include <vector>

int main() {
  using namespace dylora;
  Rng rng(42);
  constexpr Index width = 64, tokens = 48;
  const auto weight = [&] { return random_uniform<float>(width, width, 0.2, rng); };
  const auto adapter = [&] {  // as training would leave it: B is no longer zero
    LowRank<float> trained(width, width, {.max_rank = 8}, rng);
    trained.B = random_uniform<float>(width, 8, 0.05, rng);
    return trained;
  };
  auto Wq = weight(), Wk = weight(), Wv = weight(), Wo = weight();
  auto q = adapter(), k = adapter(), v = adapter(), o = adapter();
  const Attention<float> attention({Wq, q}, {Wk, k}, {Wv, v}, {Wo, o}, {.heads = 4});
  const MatrixX<float> x = random_uniform<float>(width, tokens, 1, rng);

  // Each request brings its own rank and keeps its own key/value cache; the layer is shared and const.
  const std::vector<Index> ranks{1, 2, 4, 8};
  std::vector<MatrixX<float>> answers(ranks.size());
  std::vector<std::thread> requests;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    requests.emplace_back([&, i] {
      KeyValueCache<float> past;
      answers[i] = attention.extend(x.leftCols(tokens / 2), ranks[i], past);  // the prompt at once, then a token at a time
      for (Index t = tokens / 2; t < tokens; ++t) answers[i] = attention.extend(x.col(t), ranks[i], past);
    });
  }
  for (std::thread& request : requests) request.join();

  bool same = true;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    const MatrixX<float> alone = attention.forward(x, ranks[i]);
    same = same && answers[i] == alone.rightCols(1);
    std::cout << "rank " << ranks[i] << "  last token " << answers[i].norm() << '\n';
  }
  std::cout << (same ? "each equal, bit for bit, to one forward over the whole sequence\n"
                     : "the answers differ from a forward over the whole sequence\n");

  // Or all requests in one batch, each sequence at its own rank: the frozen weights are read once for all of them.
  MatrixX<float> batch(width, 4 * tokens);
  for (Index i = 0; i < 4; ++i) batch.middleCols(i * tokens, tokens) = x;
  const Sequences sequences = Sequences::equal(4, tokens);
  const MatrixX<float> together = attention.forward(batch, sequences, BatchRanks::per_sequence(sequences, {1, 2, 4, 8}));
  for (Index i = 0; i < 4; ++i) same = same && together.col((i + 1) * tokens - 1) == answers[static_cast<std::size_t>(i)];
  std::cout << (same ? "and to the same sequence in a batch of all ranks\n" : "a batch of all ranks gives other answers\n");
  return same ? 0 : 1;
}
