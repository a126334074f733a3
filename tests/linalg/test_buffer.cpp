#include "dylora/linalg/buffer.hpp"

#include "support/catch.hpp"
#include "support/values.hpp"

namespace dylora::test {

TEST_CASE("a buffer takes memory only when a shape needs more than any before") {
  Buffer<float> buffer;
  CHECK(buffer.rows() == 0);
  CHECK(buffer.view().size() == 0);
  const float* memory = buffer.resize(8, 16).data();
  for (const auto& [rows, cols] : {std::pair<Index, Index>{3, 5}, {1, 1}, {16, 8}, {0, 4}, {128, 1}, {8, 16}}) {
    CHECK(buffer.resize(rows, cols).data() == memory);
    CHECK(buffer.rows() == rows);
    CHECK(buffer.cols() == cols);
  }
  (void)buffer.resize(8, 17);
  memory = buffer.view().data();
  CHECK(buffer.resize(17, 8).data() == memory);
}

TEST_CASE("a buffer is contiguous by columns in every shape") {
  Buffer<float> buffer;
  auto view = buffer.resize(3, 2);
  view << 1, 4, 2, 5, 3, 6;
  for (Index i = 0; i < 6; ++i) CHECK(view.data()[i] == static_cast<float>(i + 1));
}

TEST_CASE("a buffer takes over shape and elements") {
  Buffer<float> buffer;
  for (const Index cols : {5, 2, 7}) {
    const MatrixX<float> source = noise<float>(4, cols, 1);
    buffer.assign(source);
    CHECK(same_bits(MatrixX<float>(buffer.view()), source));
    CHECK(same_bits(MatrixX<float>(std::as_const(buffer).view()), source));
  }
}

TEST_CASE("a copy of a buffer has memory of its own") {
  Buffer<float> buffer;
  buffer.assign(noise<float>(4, 3, 1));
  Buffer<float> copy = buffer;
  copy.view().setZero();
  CHECK(same_bits(MatrixX<float>(buffer.view()), noise<float>(4, 3, 1)));
}

}  // namespace dylora::test
