#include "dylora/layers/unfold.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/threads.hpp"
#include "support/throws.hpp"
#include "support/values.hpp"

namespace dylora::test {

inline const std::vector<UnfoldOptions> geometries{
    {.channels = 1, .image = {1, 1}},
    {.channels = 3, .image = {4, 5}, .kernel = {3, 2}},
    {.channels = 2, .image = {5, 7}, .kernel = {3, 3}, .padding = {1, 1}},
    {.channels = 3, .image = {7, 5}, .kernel = {2, 3}, .stride = {2, 3}, .padding = {1, 2}, .dilation = {3, 2}},
    {.channels = 2, .image = {3, 2}, .kernel = {2, 1}, .stride = {1, 2}, .padding = {4, 3}, .dilation = {2, 5}},  // most is padding
    {.channels = 2, .image = {6, 6}, .kernel = {1, 1}, .stride = {4, 5}},                                         // most is passed over
};

/// The value of the padded image that an element of a patch is, by its definition.
template <class S>
S element(const UnfoldOptions& o, const MatrixX<S>& images, Index image, Index channel, Index row, Index column) {
  if (row < 0 || row >= o.image.height || column < 0 || column >= o.image.width) return S(0);
  return images((channel * o.image.height + row) * o.image.width + column, image);
}

TEMPLATE_TEST_CASE("a patch is what the kernel sees at its position, and zero where it sees padding", "", float, double) {
  using S = TestType;
  for (const UnfoldOptions& o : geometries) {
    const Unfold unfold(o);
    const MatrixX<S> images = noise<S>(unfold.image_size(), 3, 1);
    const Index rows = unfold.patch_size(o.channels), count = 3 * unfold.positions();
    MatrixX<S> patches = all_nan<S>(rows, count), expected(rows, count);
    unfold.gather<S>(images, 0, o.channels, 0, patches);
    for (Index p = 0; p < count; ++p) {
      const Index within = p % unfold.positions();
      const Index top = within / unfold.output().width * o.stride.height - o.padding.height;
      const Index left = within % unfold.output().width * o.stride.width - o.padding.width;
      Index r = 0;
      for (Index c = 0; c < o.channels; ++c) {
        for (Index i = 0; i < o.kernel.height; ++i) {
          for (Index j = 0; j < o.kernel.width; ++j)
            expected(r++, p) = element(o, images, p / unfold.positions(), c, top + i * o.dilation.height, left + j * o.dilation.width);
        }
      }
    }
    CHECK(same_bits(patches, expected));
  }
}

TEST_CASE("the positions are those at which the dilated kernel fits into the padded image") {
  for (const UnfoldOptions& o : geometries) {
    const auto fit = [](Index image, Index kernel, Index stride, Index padding, Index dilation) {
      Index count = 0;
      for (Index first = -padding; first + dilation * (kernel - 1) < image + padding; first += stride) ++count;
      return count;
    };
    const Extent output = Unfold(o).output();
    CHECK(output.height == fit(o.image.height, o.kernel.height, o.stride.height, o.padding.height, o.dilation.height));
    CHECK(output.width == fit(o.image.width, o.kernel.width, o.stride.width, o.padding.width, o.dilation.width));
  }
}

TEMPLATE_TEST_CASE("patches of some channels at some positions are a block of all patches", "", float, double) {
  using S = TestType;
  for (const UnfoldOptions& o : geometries) {
    const Unfold unfold(o);
    const MatrixX<S> images = noise<S>(unfold.image_size(), 3, 1);
    const Index count = 3 * unfold.positions();
    MatrixX<S> all(unfold.patch_size(o.channels), count);
    unfold.gather<S>(images, 0, o.channels, 0, all);
    for (Index first = 0; first < o.channels; ++first) {
      const Index channels = o.channels - first, begin = count / 3, part = count / 2;
      MatrixX<S> patches = all_nan<S>(unfold.patch_size(channels) + 1, part);
      unfold.gather<S>(images, first, channels, begin, patches.topRows(patches.rows() - 1));
      CHECK(same_bits(MatrixX<S>(patches.topRows(patches.rows() - 1)),
                      MatrixX<S>(all.block(unfold.patch_size(first), begin, unfold.patch_size(channels), part))));
      CHECK(patches.bottomRows(1).array().isNaN().all());
    }
  }
}

TEST_CASE("add_scatter is the adjoint of gather") {
  for (const UnfoldOptions& o : geometries) {
    const Unfold unfold(o);
    const Index rows = unfold.patch_size(o.channels), count = 3 * unfold.positions();
    MatrixX<double> gather(rows * count, 3 * unfold.image_size()), scatter(3 * unfold.image_size(), rows * count);
    for (Index i = 0; i < gather.cols(); ++i) {
      MatrixX<double> images = MatrixX<double>::Zero(unfold.image_size(), 3), patches(rows, count);
      images.data()[i] = 1;
      unfold.gather<double>(images, 0, o.channels, 0, patches);
      gather.col(i) = patches.reshaped();
    }
    for (Index i = 0; i < scatter.cols(); ++i) {
      MatrixX<double> images = MatrixX<double>::Zero(unfold.image_size(), 3), patches = MatrixX<double>::Zero(rows, count);
      patches.data()[i] = 1;
      unfold.add_scatter<double>(patches, 0, o.channels, 0, images);
      scatter.col(i) = images.reshaped();
    }
    CHECK(same_bits(scatter, MatrixX<double>(gather.transpose())));
  }
}

TEMPLATE_TEST_CASE("add_scatter adds, with the same bits however the positions are divided", "", float, double) {
  using S = TestType;
  for (const UnfoldOptions& o : geometries) {
    const Unfold unfold(o);
    const Index count = 3 * unfold.positions();
    const MatrixX<S> patches = noise<S>(unfold.patch_size(o.channels), count, 2), before = noise<S>(unfold.image_size(), 3, 3);
    MatrixX<S> whole = before, divided = before, zero = MatrixX<S>::Zero(unfold.image_size(), 3);
    unfold.add_scatter<S>(patches, 0, o.channels, 0, whole);
    unfold.add_scatter<S>(patches, 0, o.channels, 0, zero);
    CHECK(gap(in_double(whole), in_double<S>(before + zero)) < rounding<S>);
    for (Index begin = 0; begin < count; begin += 2) {
      const Index part = std::min<Index>(2, count - begin);
      for (Index c = o.channels; c-- > 0;)
        unfold.add_scatter<S>(patches.block(unfold.patch_size(c), begin, unfold.patch_size(1), part), c, 1, begin, divided);
    }
    CHECK(same_bits(whole, divided));
  }
}

TEMPLATE_TEST_CASE("outputs are taken as columns of positions and put back", "", float, double) {
  using S = TestType;
  for (const UnfoldOptions& o : geometries) {
    const Unfold unfold(o);
    const Index P = unfold.positions(), channels = 4;
    const MatrixX<S> outputs = noise<S>(channels * P, 3, 1);
    MatrixX<S> expected(2, 3 * P), put = outputs;
    for (Index p = 0; p < 3 * P; ++p) {
      for (Index c = 0; c < 2; ++c) expected(c, p) = outputs((c + 1) * P + p % P, p / P);
    }
    for (const Index begin : {Index{0}, P - 1, P}) {
      const Index count = 3 * P - begin - (begin > 0 ? 1 : 0);
      MatrixX<S> values = all_nan<S>(2, count);
      unfold.take_output<S>(outputs, 1, begin, values);
      CHECK(same_bits(values, MatrixX<S>(expected.middleCols(begin, count))));
      put.middleRows(P, 2 * P).setConstant(nan<S>);
      unfold.put_output<S>(expected, 1, 0, put);
      unfold.put_output<S>(values, 1, begin, put);
      CHECK(same_bits(put, outputs));
    }
  }
}

TEMPLATE_TEST_CASE("patches and their adjoint have the same bits for any number of threads", "", float, double) {
  using S = TestType;
  const Unfold unfold({.channels = 7, .image = {60, 50}, .kernel = {3, 5}, .stride = {1, 2}, .padding = {2, 1}, .dilation = {2, 1}});
  const MatrixX<S> images = noise<S>(unfold.image_size(), 5, 1);
  const Index rows = unfold.patch_size(7), count = 5 * unfold.positions();
  const MatrixX<S> d_patches = noise<S>(rows, count, 2);
  const auto both = [&] {
    MatrixX<S> patches(rows, count), d_images = images;
    unfold.gather<S>(images, 0, 7, 0, patches);
    unfold.add_scatter<S>(d_patches, 0, 7, 0, d_images);
    MatrixX<S> values(3, count), outputs = MatrixX<S>::Zero(5 * unfold.positions(), 5);
    unfold.put_output<S>(d_patches.topRows(5), 0, 0, outputs);
    unfold.take_output<S>(outputs, 2, 0, values);
    return std::vector<MatrixX<S>>{patches, d_images, outputs, values};
  };
  const auto expected = both();
  for_each_threading(both, [&](const std::vector<MatrixX<S>>& got, const std::string& where) {
    INFO(where);
    for (std::size_t i = 0; i < expected.size(); ++i) CHECK(same_bits(got[i], expected[i]));
  });
}

TEST_CASE("an unfold refuses a geometry that is none and says what was expected and what came") {
  const auto make = [](UnfoldOptions options) { return Unfold(options).positions(); };
  using Invalid = std::invalid_argument;
  const Index huge = Index{1} << 60;
  CHECK_THROWS_SAYING(Invalid, make({.channels = 0}), "Unfold: channels", "[1, 1048576]", "got 0");
  CHECK_THROWS_SAYING(Invalid, make({.image = {0, 3}}), "Unfold: height of image", "got 0");
  CHECK_THROWS_SAYING(Invalid, make({.image = {3, huge}}), "Unfold: width of image", "got " + std::to_string(huge));
  CHECK_THROWS_SAYING(Invalid, make({.kernel = {1, -2}}), "Unfold: width of kernel", "got -2");
  CHECK_THROWS_SAYING(Invalid, make({.stride = {0, 1}}), "Unfold: height of stride", "got 0");
  CHECK_THROWS_SAYING(Invalid, make({.padding = {0, -1}}), "Unfold: width of padding", "[0, ", "got -1");
  CHECK_THROWS_SAYING(Invalid, make({.dilation = {0, 1}}), "Unfold: height of dilation", "got 0");
  CHECK_THROWS_SAYING(Invalid, make({.image = {9, 3}, .kernel = {3, 4}}), "Unfold: width of the dilated kernel", "[1, 3]", "got 4");
  CHECK_THROWS_SAYING(Invalid, make({.image = {9, 9}, .kernel = {3, 3}, .padding = {1, 1}, .dilation = {6, 1}}),
                      "Unfold: height of the dilated kernel", "[1, 11]", "got 13");
}

TEST_CASE("an unfold refuses matrices that do not fit and says what was expected and what came") {
  const Unfold unfold({.channels = 2, .image = {3, 4}, .kernel = {2, 2}});  // 6 positions
  MatrixX<float> images = noise<float>(24, 2, 1), patches(8, 12), short_images(23, 2), outputs(5 * 6, 2), values(2, 12);
  const auto gather = [&](auto&& x, Index first, Index channels, Index begin, auto&& to) {
    unfold.gather<float>(x, first, channels, begin, to);
  };
  CHECK_THROWS_SAYING(ShapeError, (gather(short_images, 0, 2, 0, patches), 0), "rows of the images", "expected 24", "got 23");
  CHECK_THROWS_SAYING(ShapeError, (gather(images, 0, 1, 0, patches), 0), "rows of the patches", "expected 4", "got 8");
  CHECK_THROWS_SAYING(std::invalid_argument, (gather(images, 0, 3, 0, patches), 0), "channels", "[1, 2]", "got 3");
  CHECK_THROWS_SAYING(std::invalid_argument, (gather(images, 1, 2, 0, patches), 0), "first channel", "[0, 0]", "got 1");
  CHECK_THROWS_SAYING(std::invalid_argument, (gather(images, 0, 2, 1, patches), 0), "first position", "[0, 0]", "got 1");
  CHECK_THROWS_SAYING(std::invalid_argument, (unfold.add_scatter<float>(patches, 0, 2, -1, images), 0), "first position", "got -1");
  CHECK_THROWS_SAYING(std::invalid_argument, (unfold.take_output<float>(outputs, 4, 0, values), 0), "first channel of the outputs",
                      "[0, 3]", "got 4");
  CHECK_THROWS_SAYING(std::invalid_argument, (unfold.put_output<float>(values, 0, 2, outputs), 0), "first position of the outputs",
                      "[0, 0]", "got 2");
}

}  // namespace dylora::test
