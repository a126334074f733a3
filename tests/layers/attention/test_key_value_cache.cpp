#include "dylora/layers/attention/key_value_cache.hpp"

#include "support/catch.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

TEST_CASE("a key value cache holds what was appended in order") {
  const MatrixX<float> keys = noise<float>(6, 40, 1), values = noise<float>(4, 40, 2);
  KeyValueCache<float> cache;
  CHECK(cache.length() == 0);
  for (Index begin = 0, count = 1; begin < 40; begin += count, count = std::min<Index>(count + 2, 40 - begin)) {
    cache.append(keys.middleCols(begin, count), values.middleCols(begin, count));
    CHECK(cache.length() == begin + count);
    CHECK(same_bits(MatrixX<float>(cache.keys()), MatrixX<float>(keys.leftCols(begin + count))));
    CHECK(same_bits(MatrixX<float>(cache.values()), MatrixX<float>(values.leftCols(begin + count))));
  }
}

TEST_CASE("a truncated key value cache goes on from what is left") {
  const MatrixX<float> keys = noise<float>(6, 10, 1), values = noise<float>(4, 10, 2);
  KeyValueCache<float> cache;
  cache.append(keys, values);
  cache.truncate(3);
  CHECK(cache.length() == 3);
  cache.append(keys.rightCols(2), values.rightCols(2));
  MatrixX<float> expected(6, 5);
  expected << keys.leftCols(3), keys.rightCols(2);
  CHECK(same_bits(MatrixX<float>(cache.keys()), expected));
  cache.truncate(0);
  CHECK(cache.length() == 0);
}

TEST_CASE("an emptied key value cache takes other features") {
  KeyValueCache<float> cache;
  cache.append(noise<float>(6, 10, 1), noise<float>(4, 10, 2));
  cache.truncate(0);
  const MatrixX<float> keys = noise<float>(8, 2, 3), values = noise<float>(7, 2, 4);
  cache.append(keys, values);
  CHECK(same_bits(MatrixX<float>(cache.keys()), keys));
  CHECK(same_bits(MatrixX<float>(cache.values()), values));
}

TEST_CASE("a copied key value cache branches") {
  KeyValueCache<float> cache;
  cache.append(noise<float>(6, 3, 1), noise<float>(6, 3, 2));
  KeyValueCache<float> branch = cache;
  branch.append(noise<float>(6, 1, 3), noise<float>(6, 1, 4));
  CHECK(cache.length() == 3);
  CHECK(branch.length() == 4);
  CHECK(same_bits(MatrixX<float>(cache.keys()), noise<float>(6, 3, 1)));
}

TEST_CASE("a key value cache refuses what does not fit and stays as it was") {
  KeyValueCache<float> cache;
  CHECK_THROWS_SAYING(ShapeError, cache.append(noise<float>(6, 3, 1), noise<float>(4, 2, 2)), "KeyValueCache: tokens in values",
                      "expected 3", "got 2");
  cache.append(noise<float>(6, 3, 1), noise<float>(4, 3, 2));
  CHECK_THROWS_SAYING(ShapeError, cache.append(noise<float>(5, 1, 1), noise<float>(4, 1, 2)), "KeyValueCache: features of keys",
                      "expected 6", "got 5");
  CHECK_THROWS_SAYING(ShapeError, cache.append(noise<float>(6, 1, 1), noise<float>(5, 1, 2)), "KeyValueCache: features of values",
                      "expected 4", "got 5");
  CHECK_THROWS_SAYING(std::invalid_argument, cache.truncate(4), "KeyValueCache::truncate: length", "[0, 3]", "got 4");
  CHECK_THROWS_SAYING(std::invalid_argument, cache.truncate(-1), "KeyValueCache::truncate: length", "got -1");
  CHECK(cache.length() == 3);
  CHECK(same_bits(MatrixX<float>(cache.keys()), noise<float>(6, 3, 1)));
}

}  // namespace dylora::test
