#include "golden/golden.hpp"

TEST_CASE("A golden file or a name in it that does not exist is named", "[golden]") {
  CHECK_THROWS_WITH(golden::File("absent.txt"), "golden: cannot open " DYLORA_GOLDEN_DIR "/absent.txt");
  CHECK_THROWS_WITH(golden::File("linear.txt")["absent"], "golden: linear.txt has no 'absent'");
}

TEST_CASE("Agreement is relative to the largest element, and exact where the golden element is zero", "[golden]") {
  const dylora::MatrixX<double> expected{{4, 0}, {-2, 1}};
  CHECK(golden::error(expected, expected) == 0);
  CHECK(golden::error(dylora::MatrixX<double>{{4, 0}, {-2, 2}}, expected) == 0.25);
  CHECK(golden::error(dylora::MatrixX<double>{{4, 1e-300}, {-2, 1}}, expected) > 1);
  CHECK(golden::error(dylora::MatrixX<double>{{4, 0}, {NAN, 1}}, expected) > 1);
}
