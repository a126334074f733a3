#include "dylora/testing/gradient_check.hpp"

#include <cmath>
#include <string>

#include "dylora/ranks/truncate.hpp"
#include "support/catch.hpp"
#include "support/law.hpp"
#include "support/make.hpp"

namespace dylora::test {

namespace {

enum class Fault {
  none,
  assigns_A,
  assigns_dx,
  forgets_scale,
  wrong_sign_in_one,
  touches_inactive,
  touches_frozen,
  gives_nan,
  forgets_to_note,
  notes_too_much
};

/// A low-rank adapter whose backward is wrong in one way.
template <Fault fault>
struct Faulty : LowRank<double> {
  using typename LowRank<double>::Cache;
  using typename LowRank<double>::Gradients;
  using typename LowRank<double>::Workspace;
  using Ref = ConstMatrixRef<double>;

  void add_backward(Ref x, Ref dy, const Cache& cache, Gradients& gradients, Workspace& workspace, MatrixRef<double> dx) const {
    RankSlice rank = RankSlice::none();
    cache.ranks.for_each_run(dy.cols(), [&](Index, Index, RankSlice only) { rank = only; });
    const Index b = rank.active, t = rank.trainable_from;
    if (fault == Fault::assigns_A) gradients.A.middleRows(t, b - t).setZero();
    if (fault == Fault::assigns_dx) dx.setZero();
    const RowMatrix<double> before = gradients.A;
    LowRank<double>::add_backward(x, dy, cache, gradients, workspace, dx);
    if (fault == Fault::forgets_scale) gradients.A.middleRows(t, b - t) += (1 / scale(b) - 1) * (gradients.A - before).middleRows(t, b - t);
    if (fault == Fault::wrong_sign_in_one) gradients.B(2, b - 1) *= -1;
    if (fault == Fault::touches_inactive) gradients.B(1, 4) += 1e-9;
    if (fault == Fault::touches_frozen) gradients.A(0, 3) += 1e-9;
    if (fault == Fault::gives_nan) gradients.A(t, 2) = nan<double>;
    if (fault == Fault::forgets_to_note) gradients.B.components.clear();
    if (fault == Fault::notes_too_much) gradients.A.components.insert(5);
  }
};

template <Fault fault>
GradientReport check(RankSlice rank = {3, 1}) {
  Faulty<fault> adapter{make_adapter<LowRank<double>>(7, 6, 5, 1)};
  randomize<Faulty<fault>>(adapter, 2);
  Rng rng(3);
  return check_gradients(adapter, noise<double>(7, 4, 4), rank, rng);
}

bool is_at(const GradientReport& report, const std::string& place) { return report.where.rfind(place, 0) == 0; }

/// The fault is one that no size excuses, and is found at this place.
template <Fault fault>
void check_forbidden(const std::string& place) {
  const GradientReport report = check<fault>();
  CHECK(std::isinf(report.error));
  CHECK(is_at(report, place));
}

/// A layer that adds to the dx which it is to overwrite.
struct AddsDx : Linear<double> {
  using Linear<double>::backward;
  void backward(ConstMatrixRef<double> dy, const Cache& cache, Gradients& gradients, Workspace& workspace, MatrixRef<double> dx) const {
    const MatrixX<double> before = dx;
    Linear<double>::backward(dy, cache, gradients, workspace, dx);
    dx += before;
  }
};

}  // namespace

TEST_CASE("a right backward passes at every entry") {
  const GradientReport report = check<Fault::none>();
  CHECK(report.error < 1e-7);
  CHECK(report.entries == 7 * 4 + 5 * 7 + 6 * 5);
}

TEST_CASE("a backward that assigns instead of adding is reported") {
  CHECK(check<Fault::assigns_A>().error > 0.01);
  CHECK(is_at(check<Fault::assigns_A>(), "lora_A("));
  CHECK(check<Fault::assigns_dx>().error > 0.01);
  CHECK(is_at(check<Fault::assigns_dx>(), "x("));
}

TEST_CASE("a wrong factor is reported and so is a single wrong entry") {
  CHECK(check<Fault::forgets_scale>({4, 1}).error > 0.1);  // alpha / 4 is not 1
  CHECK(is_at(check<Fault::forgets_scale>({4, 1}), "lora_A("));
  CHECK(check<Fault::wrong_sign_in_one>().error > 0.1);
  CHECK(is_at(check<Fault::wrong_sign_in_one>(), "lora_B(2, 2): backward"));
}

TEST_CASE("touching a component outside of the slice is reported however little") {
  check_forbidden<Fault::touches_inactive>("lora_B (not trained)(1, 4)");
  check_forbidden<Fault::touches_frozen>("lora_A (not trained)(0, 3)");
}

TEST_CASE("a slice that trains nothing is held to it") {
  CHECK(check<Fault::none>({3, 3}).error < 1e-7);
  CHECK(check<Fault::none>({3, 3}).entries == 7 * 4 + 5 * 7 + 6 * 5);
  CHECK(check<Fault::assigns_dx>({3, 3}).error > 0.01);
  CHECK(std::isinf(check<Fault::touches_frozen>({3, 3}).error));
  CHECK(std::isinf(check<Fault::notes_too_much>({3, 3}).error));
}

TEST_CASE("an adapter that was cut is checked at ranks above what it has") {
  auto adapter = make_adapter<LowRank<double>>(7, 6, 5, 1);
  randomize<LowRank<double>>(adapter, 2);
  truncate(adapter, 2);
  Rng rng(3);
  const GradientReport report = check_gradients(adapter, noise<double>(7, 4, 4), {4, 1}, rng);
  CHECK(report.error < 1e-7);
  CHECK(report.entries == 7 * 4 + 2 * 7 + 6 * 2);
}

TEST_CASE("a NaN is reported") { check_forbidden<Fault::gives_nan>("lora_A(1, 2): backward nan"); }

TEST_CASE("components that are noted wrongly are reported") {
  check_forbidden<Fault::forgets_to_note>("lora_B: component 1 was trained and not noted");
  check_forbidden<Fault::notes_too_much>("lora_A: component 0 was noted and not trained");
}

TEST_CASE("a check without a rank is one at every rank, nested and frozen, and says at which one the gap is") {
  Rng rng(3);
  auto adapter = make_adapter<LowRank<double>>(7, 6, 5, 1);
  randomize<LowRank<double>>(adapter, 2);
  const GradientReport right = check_gradients(adapter, noise<double>(7, 4, 4), rng);
  CHECK(right.error < 1e-6);
  CHECK(right.entries == 10 * (7 * 4 + 5 * 7 + 6 * 5));
  CHECK(is_at(right, "rank "));
  const GradientReport frozen = check_gradients(Faulty<Fault::touches_frozen>{adapter}, noise<double>(7, 4, 4), rng);
  CHECK(std::isinf(frozen.error));
  CHECK(is_at(frozen, "rank 2, trainable from 1: lora_A (not trained)(0, 3)"));
  const Linear<double> layer = MakeLayer<Linear<double>>::make(1, law_rank);
  CHECK(check_gradients(layer, noise<double>(7, 4, 4), rng).error < 1e-6);
  CHECK(is_at(check_gradients(AddsDx{layer}, noise<double>(7, 4, 4), rng), "rank "));
}

TEST_CASE("a layer that adds to dx is reported") {
  const Linear<double> right = MakeLayer<Linear<double>>::make(1, law_rank);
  Rng rng(3);
  CHECK(check_gradients(right, noise<double>(7, 4, 4), 3, rng).error < 1e-7);
  const GradientReport report = check_gradients(AddsDx{right}, noise<double>(7, 4, 4), 3, rng);
  CHECK(report.error > 0.01);
  CHECK(is_at(report, "x("));
}

TEST_CASE("an attention can be checked over several sequences") {
  auto attention = MakeLayer<Attention<double>>::make(0, law_rank);
  randomize<Attention<double>>(attention, 2);
  Rng rng(3);
  const MatrixX<double> x = noise<double>(7, 6, 4);
  CHECK(check_gradients(attention, x, {4, 2}, rng, {}, Sequences({4, 2})).error < 1e-6);
  CHECK(check_gradients(attention, x, {4, 2}, rng).error < 1e-6);
}

}  // namespace dylora::test
