#ifndef DYLORA_LAYERS_UNFOLD_HPP
#define DYLORA_LAYERS_UNFOLD_HPP

#include <algorithm>
#include <concepts>
#include <string>
#include <type_traits>

#include "dylora/core/error.hpp"
#include "dylora/core/types.hpp"
#include "dylora/linalg/parallel.hpp"

namespace dylora {

/// A size, a step or a margin in two dimensions.
struct Extent {
  Index height = 1;
  Index width = 1;

  bool operator==(const Extent&) const = default;
};

/// How a kernel walks over an image, in PyTorch's terms.
struct UnfoldOptions {
  Index channels = 1;       ///< of the image
  Extent image = {};        ///< its size, without padding
  Extent kernel = {};       ///< the size of the kernel
  Extent stride = {};       ///< from one position to the next
  Extent padding = {0, 0};  ///< how many zeros there are around the image, on each side
  Extent dilation = {};     ///< from one element of the kernel to the next
};

/// im2col and its adjoint: the patches of images that a kernel sees, a column for each position.
///
///     const Unfold unfold({.channels = 3, .image = {32, 32}, .kernel = {3, 3}, .padding = {1, 1}});
///     unfold.gather<float>(images, 0, 3, 0, patches);            // patches 27 × (1024 · images)
///     unfold.add_scatter<float>(d_patches, 0, 3, 0, d_images);   // the adjoint
///
/// An image is a column of channels · height · width values: channel by channel, and each channel row by row (PyTorch's C × H × W). A patch
/// is channels · kernel height · kernel width values in that order too, the order of PyTorch's convolution weights. Position p of an image
/// is row p / output().width and column p mod output().width of the output; positions go on from one image of a batch to the next.
///
/// All patches together are larger than the images as often as the kernel has elements, so they are made for some positions, and some
/// channels, at a time.
class Unfold {
 public:
  /// Throws std::invalid_argument unless every size and step is in [1, 2²⁰], every padding in [0, 2²⁰], and the kernel fits into the padded
  /// image.
  explicit Unfold(UnfoldOptions options) : options_(options) {
    require_in_range(options.channels, 1, largest, "Unfold: channels");
    require(options.image, 1, "image");
    require(options.kernel, 1, "kernel");
    require(options.stride, 1, "stride");
    require(options.padding, 0, "padding");
    require(options.dilation, 1, "dilation");
    output_ = {steps(&Extent::height, "height"), steps(&Extent::width, "width")};
  }

  const UnfoldOptions& options() const { return options_; }
  Extent output() const { return output_; }                                    ///< one element for each position
  Index positions() const { return output_.height * output_.width; }           ///< of one image
  Index image_size() const { return options_.channels * channel_size(); }      ///< rows of the images
  Index patch_size(Index channels) const { return channels * kernel_size(); }  ///< rows of the patches of so many channels

  /// patches = those of channels [first_channel, first_channel + channels) at the positions [begin, begin + patches.cols()).
  ///
  /// images image_size() × n; patches patch_size(channels) × positions, overwritten. Throws ShapeError or
  /// std::invalid_argument if something does not fit.
  template <std::floating_point S>
  void gather(ConstMatrixRef<S> images, Index first_channel, Index channels, Index begin, MatrixRef<S> patches) const {
    check(images.rows(), images.cols(), first_channel, channels, begin, patches.rows(), patches.cols());
    const Index width = options_.kernel.width, step = options_.dilation.width;
    for_each_range(patches.cols(), 1, static_cast<double>(patches.size()), [&](Index from, Index to) {
      for (Index p = from; p < to; ++p) {
        S* patch = patches.data() + p * patches.outerStride();
        const Corner corner = corner_of(begin + p);
        const S* channel = images.data() + corner.image * images.outerStride() + first_channel * channel_size();
        for (Index c = 0; c < channels; ++c, channel += channel_size()) {
          for_each_kernel_row(corner, [&](Index first, Index low, Index high) {
            std::fill(patch, patch + low, S(0));
            for (Index j = low; j < high; ++j) patch[j] = channel[first + j * step];
            std::fill(patch + high, patch + width, S(0));
            patch += width;
          });
        }
      }
    });
  }

  /// The adjoint of gather: adds each element of the patches to the element of images that it came from, in the order of the positions.
  /// patches as gather writes them; images added to. The bits depend neither on the number of threads nor on how the positions are divided
  /// into calls. Throws as gather does.
  template <std::floating_point S>
  void add_scatter(ConstMatrixRef<S> patches, Index first_channel, Index channels, Index begin, MatrixRef<S> images) const {
    check(images.rows(), images.cols(), first_channel, channels, begin, patches.rows(), patches.cols());
    const Index width = options_.kernel.width, step = options_.dilation.width;
    for_each_range(channels, 1, static_cast<double>(patches.size()), [&](Index from, Index to) {  // a thread owns its channels
      for (Index p = 0; p < patches.cols(); ++p) {
        const S* patch = patches.data() + p * patches.outerStride() + from * kernel_size();
        const Corner corner = corner_of(begin + p);
        S* channel = images.data() + corner.image * images.outerStride() + (first_channel + from) * channel_size();
        for (Index c = from; c < to; ++c, channel += channel_size()) {
          for_each_kernel_row(corner, [&](Index first, Index low, Index high) {
            for (Index j = low; j < high; ++j) channel[first + j * step] += patch[j];
            patch += width;
          });
        }
      }
    });
  }

  /// values = channels [first_channel, first_channel + values.rows()) of the outputs at the positions [begin, begin + values.cols()), a
  /// column for each position: what a product with patches gives. outputs (channels · positions()) × n; values overwritten. Throws as
  /// gather does.
  template <std::floating_point S>
  void take_output(ConstMatrixRef<S> outputs, Index first_channel, Index begin, MatrixRef<S> values) const {
    for_each_stretch<S>(outputs, first_channel, begin, values, [](const auto& of_image, auto&& columns) { columns = of_image; });
  }

  /// The inverse of take_output: those elements of the outputs become the values.
  template <std::floating_point S>
  void put_output(ConstMatrixRef<S> values, Index first_channel, Index begin, MatrixRef<S> outputs) const {
    for_each_stretch<S>(outputs, first_channel, begin, values, [](auto&& of_image, const auto& columns) { of_image = columns; });
  }

 private:
  static constexpr Index largest = Index{1} << 20;  // so that no product of three sizes overflows

  /// Where a kernel lies: its first element, on the image or on padding, and its columns [low, high) that are on the image.
  struct Corner {
    Index image, row, column, low, high;
  };

  Corner corner_of(Index position) const {
    const Index within = position % positions();
    const Index row = within / output_.width * options_.stride.height - options_.padding.height;
    const Index column = within % output_.width * options_.stride.width - options_.padding.width;
    const auto first_from = [&](Index edge) {  // the first column of the kernel that is at column `edge` of the image or further
      const Index distance = edge - column, step = options_.dilation.width;
      return distance <= 0 ? Index{0} : std::min(options_.kernel.width, (distance + step - 1) / step);
    };
    return {position / positions(), row, column, first_from(0), first_from(options_.image.width)};
  }

  Index channel_size() const { return options_.image.height * options_.image.width; }
  Index kernel_size() const { return options_.kernel.height * options_.kernel.width; }

  /// Calls f(first, low, high) for each row of the kernel: its elements j in [low, high) lie on the image, at first + j · dilation in the
  /// channel, the others on padding.
  template <class F>
  void for_each_kernel_row(const Corner& corner, const F& f) const {
    for (Index i = 0; i < options_.kernel.height; ++i) {
      const Index row = corner.row + i * options_.dilation.height;
      const bool inside = row >= 0 && row < options_.image.height;
      f(row * options_.image.width + corner.column, inside ? corner.low : 0, inside ? corner.high : 0);
    }
  }

  /// Calls f(channels × positions in an image of the outputs, the same of the values) for the positions of each image, some channels at a
  /// time.
  template <class S, class Outputs, class Values, class F>
  void for_each_stretch(Outputs& outputs, Index first_channel, Index begin, Values& values, const F& f) const {
    require_in_range(first_channel, 0, outputs.rows() / positions() - values.rows(), "Unfold: first channel of the outputs");
    require_in_range(begin, 0, outputs.cols() * positions() - values.cols(), "Unfold: first position of the outputs");
    using Rows = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(outputs.data())>>, const RowMatrix<S>, RowMatrix<S>>;
    for_each_range(values.rows(), 1, static_cast<double>(values.size()), [&](Index from, Index to) {
      for (Index done = 0; done < values.cols();) {
        const Index image = (begin + done) / positions(), within = (begin + done) % positions();
        const Index count = std::min(positions() - within, values.cols() - done);
        auto* const corner = outputs.data() + image * outputs.outerStride() + (first_channel + from) * positions() + within;
        f(Eigen::Map<Rows, 0, Eigen::OuterStride<>>(corner, to - from, count, Eigen::OuterStride<>(positions())),
          values.block(from, done, to - from, count));
        done += count;
      }
    });
  }

  void check(Index rows, Index images, Index first_channel, Index channels, Index begin, Index patch_rows, Index patches) const {
    require_equal(rows, image_size(), "Unfold: rows of the images");
    require_in_range(channels, 1, options_.channels, "Unfold: channels of the patches");
    require_in_range(first_channel, 0, options_.channels - channels, "Unfold: first channel of the patches");
    require_equal(patch_rows, patch_size(channels), "Unfold: rows of the patches");
    require_in_range(begin, 0, images * positions() - patches, "Unfold: first position of the patches");
  }

  static void require(Extent extent, Index lowest, const std::string& what) {
    require_in_range(extent.height, lowest, largest, "Unfold: height of " + what);
    require_in_range(extent.width, lowest, largest, "Unfold: width of " + what);
  }

  Index steps(Index Extent::*side, const std::string& name) const {
    const Index room = options_.image.*side + 2 * (options_.padding.*side);
    const Index reach = options_.dilation.*side * (options_.kernel.*side - 1) + 1;
    require_in_range(reach, 1, room, "Unfold: " + name + " of the dilated kernel, against the padded image");
    return (room - reach) / (options_.stride.*side) + 1;
  }

  UnfoldOptions options_;
  Extent output_;
};

}  // namespace dylora

#endif
