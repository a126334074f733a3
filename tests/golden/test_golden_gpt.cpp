#include "golden/golden.hpp"
#include "gpt/gpt.hpp"

using namespace dylora;

namespace {

/// A parameter, or its gradient, in PyTorch's orientation: its embeddings and its head have a row per token, ours a column.
const auto stored = [](Parameter parameter, const auto& m) {
  const bool per_token = parameter.name == "wte.weight" || parameter.name == "wpe.weight" || parameter.name == "lm_head.weight";
  using Stored = MatrixX<typename std::decay_t<decltype(m)>::Scalar>;
  return per_token ? Stored(m.transpose()) : Stored(m);
};

template <class T>
void read_parameters(const golden::File& file, T& model) {
  for_each_parameter(
      [&](Parameter parameter, auto& p) {
        if (p.size() > 0) p = stored(parameter, file.matrix<typename T::Scalar>(std::string(parameter.name)));
      },
      model);
}

template <class S>
auto read_base(const golden::File& file, bool tied) {
  Rng rng(0);
  auto base = gpt::random_gpt<S>({.vocabulary = 11, .context = 8, .width = 12, .layers = 2, .heads = 3, .tied = tied}, rng);
  read_parameters(file, base);
  return base;
}

template <class T>
void check_gradients(const typename T::Gradients& gradients, const golden::File& file, const std::string& prefix) {
  using S = typename T::Scalar;
  Index checked = 0;
  for_each_parameter<T>(
      [&](Parameter parameter, const auto& gradient) {
        if (gradient.size() == 0) return;  // no adapter there, or a tied head
        ++checked;
        if (parameter.name.ends_with("k_proj.bias")) {  // adds the same to all scores of a query: no gradient but rounding errors
          CHECK(gradient.norm() <= golden::tolerance<S>);
        } else {
          golden::check(stored(parameter, gradient), file, prefix + std::string(parameter.name));
        }
      },
      gradients);
  CHECK(checked == file.count(prefix));
}

/// Logits, loss and gradients of the golden batch.
template <class T>
void check_model(const T& model, RankSlice rank, const golden::File& batch, const golden::File& file, const std::string& at_rank,
                 const std::string& mode) {
  using S = typename T::Scalar;
  typename T::Cache cache;
  typename T::Workspace workspace;
  auto gradients = zeros_like(model);
  model.forward(batch.integers("tokens"), Sequences(batch.integers("lengths")), rank, cache);
  const MatrixX<S> logits = cache.logits.view();
  golden::check(logits, file, at_rank + "/logits");
  const auto loss = cross_entropy(logits, batch.integers("targets"));
  golden::check_number<S>(loss.value, file, at_rank + "/loss");
  model.backward(loss.gradient, cache, gradients, workspace);
  check_gradients<T>(gradients, file, at_rank + mode);
}

}  // namespace

TEMPLATE_TEST_CASE("The GPT computes what PyTorch does with adapters at any rank, nested and frozen", "[golden]", float, double) {
  using S = TestType;
  const golden::File file("gpt.txt");
  const std::pair<std::string, gpt::Targets> adapted[] = {{"all", {}}, {"qv", {.k = false, .o = false, .mlp = false}}};
  for (const bool tied : {true, false}) {
    for (const auto& [name, targets] : adapted) {
      Rng rng(0);
      auto model = gpt::adapted(read_base<S>(file, tied), {.max_rank = 4, .alpha = file.number("alpha")}, rng, targets);
      read_parameters(file, model);
      for (const Index rank : {1, 2, 4}) {
        const std::string at_rank = (tied ? "tied/" : "untied/") + name + '/' + std::to_string(rank);
        check_model(model, rank, file, file, at_rank, "/nested/");
        check_model(model, {rank, rank - 1}, file, file, at_rank, "/frozen/");
      }
    }
  }
}

TEMPLATE_TEST_CASE("The GPT's own parameters have PyTorch's gradients", "[golden]", float, double) {
  const golden::File parameters("gpt.txt"), file("gpt_base.txt");
  for (const bool tied : {true, false}) {
    const std::string name = tied ? "tied" : "untied";
    check_model(read_base<TestType>(parameters, tied), RankSlice::none(), parameters, file, name, "/gradients/");
  }
}

TEMPLATE_TEST_CASE("The GPT generates token by token what PyTorch computes at once", "[golden]", float, double) {
  using S = TestType;
  const golden::File file("gpt.txt");
  Rng rng(0);
  auto model = gpt::adapted(read_base<S>(file, true), {.max_rank = 4, .alpha = file.number("alpha")}, rng);
  read_parameters(file, model);
  const auto tokens = file.integers("tokens");
  std::vector<KeyValueCache<S>> past;
  MatrixX<S> logits(11, 8);
  for (Index i = 0; i < 8; ++i) logits.col(i) = model.extend({&tokens[static_cast<std::size_t>(i)], 1}, 2, past);
  CHECK(golden::error(logits, file["tied/all/2/logits"].leftCols(8)) <= golden::tolerance<S>);
}
