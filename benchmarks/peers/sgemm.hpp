#ifndef DYLORA_BENCHMARKS_PEERS_SGEMM_HPP
#define DYLORA_BENCHMARKS_PEERS_SGEMM_HPP

#include <dlfcn.h>

#include <Eigen/Core>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <optional>
#include <string>

/// The single-precision products of other libraries, to compare with. They are looked for when the program runs: it builds without them,
/// and what a machine does not have is left out.
namespace peers {

/// A frozen weight's two products, as one library computes them. All matrices are column-major, W is out × in.
struct Library {
  using Matrix = Eigen::MatrixXf;

  std::string name, version;
  std::function<void(int)> use_threads;
  std::function<void(const Matrix& W, const Matrix& x, Matrix& y)> forward;     ///< y = W x
  std::function<void(const Matrix& W, const Matrix& dy, Matrix& dx)> backward;  ///< dx = Wᵀ dy
};

namespace detail {

/// The first of these files that can be loaded, or null.
inline void* load(std::initializer_list<const char*> files) {
  for (const char* file : files) {
    if (void* library = dlopen(file, RTLD_NOW | RTLD_LOCAL)) return library;
  }
  return nullptr;
}

template <class Function>
Function* find(void* library, const char* name) {
  return reinterpret_cast<Function*>(dlsym(library, name));
}

inline std::string version(int major, int minor, int patch) {
  return std::to_string(major) + '.' + std::to_string(minor) + '.' + std::to_string(patch);
}

inline bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") != 0;
#else
  return false;
#endif
}

}  // namespace detail

inline Library eigen() {
  return {"Eigen", detail::version(EIGEN_WORLD_VERSION, EIGEN_MAJOR_VERSION, EIGEN_MINOR_VERSION),
          [](int threads) { Eigen::setNbThreads(threads); }, [](const auto& W, const auto& x, auto& y) { y.noalias() = W * x; },
          [](const auto& W, const auto& dy, auto& dx) { dx.noalias() = W.transpose() * dy; }};
}

/// oneDNN with OpenMP. It is row-major, so it is given every product transposed.
inline std::optional<Library> onednn() {
  using Sgemm = int(char, char, std::int64_t, std::int64_t, std::int64_t, float, const float*, std::int64_t, const float*, std::int64_t,
                    float, float*, std::int64_t);
  struct Version {
    int major, minor, patch;
  };
  void* library = detail::load({"libdnnl.so.3", "libdnnl.so.2"});
  if (library == nullptr) return std::nullopt;
  auto* sgemm = detail::find<Sgemm>(library, "dnnl_sgemm");
  auto* version = detail::find<const Version*()>(library, "dnnl_version");
  auto* use_threads = detail::find<void(int)>(library, "omp_set_num_threads");  // of the OpenMP that it is linked to
  if (sgemm == nullptr || version == nullptr || use_threads == nullptr) return std::nullopt;
  const auto [major, minor, patch] = *version();
  return Library{"oneDNN", detail::version(major, minor, patch), use_threads,
                 [sgemm](const auto& W, const auto& x, auto& y) {
                   sgemm('N', 'N', x.cols(), W.rows(), W.cols(), 1, x.data(), x.rows(), W.data(), W.rows(), 0, y.data(), y.rows());
                 },
                 [sgemm](const auto& W, const auto& dy, auto& dx) {
                   sgemm('N', 'T', dy.cols(), W.cols(), W.rows(), 1, dy.data(), dy.rows(), W.data(), W.rows(), 0, dx.data(), dx.rows());
                 }};
}

/// `core` is the processor whose kernels it shall use; empty for the widest that it has: it does not know what came after it, and falls
/// back to narrower ones there.
inline std::optional<Library> openblas(const std::string& core) {
  using Sgemm = void(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
  using Sgemv = void(int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
  enum { column_major = 102, as_is = 111, transposed = 112 };
  if (!core.empty()) {
    setenv("OPENBLAS_CORETYPE", core.c_str(), 1);
  } else if (detail::has_avx512()) {
    setenv("OPENBLAS_CORETYPE", "SKYLAKEX", 1);
  }
  setenv("OPENBLAS_THREAD_TIMEOUT", "20", 1);  // 2^20 cycles, then its threads leave the cores to the next contender
  void* library = detail::load({"libopenblas.so.0"});
  if (library == nullptr) return std::nullopt;
  auto* sgemm = detail::find<Sgemm>(library, "cblas_sgemm");
  auto* sgemv = detail::find<Sgemv>(library, "cblas_sgemv");
  auto* configuration = detail::find<const char*()>(library, "openblas_get_config");
  auto* use_threads = detail::find<void(int)>(library, "openblas_set_num_threads");
  if (sgemm == nullptr || sgemv == nullptr || configuration == nullptr || use_threads == nullptr) return std::nullopt;
  const auto product = [=](int transpose, const auto& W, const auto& x, auto& y) {
    const auto out = static_cast<int>(W.rows()), rows = static_cast<int>(y.rows()), cols = static_cast<int>(y.cols()),
               depth = static_cast<int>(x.rows());
    if (cols == 1) {
      sgemv(column_major, transpose, out, static_cast<int>(W.cols()), 1, W.data(), out, x.data(), 1, 0, y.data(), 1);
    } else {
      sgemm(column_major, transpose, as_is, rows, cols, depth, 1, W.data(), out, x.data(), depth, 0, y.data(), rows);
    }
  };
  return Library{"OpenBLAS", configuration(), use_threads, [product](const auto& W, const auto& x, auto& y) { product(as_is, W, x, y); },
                 [product](const auto& W, const auto& dy, auto& dx) { product(transposed, W, dy, dx); }};
}

}  // namespace peers

#endif
