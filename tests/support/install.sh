# Sourced by tests/run.sh, examples/run.sh and benchmarks/run.sh.

# present PACKAGE: whether what this Debian package brings is here, whoever brought it.
present() {
  case $1 in
    g++) command -v "${CXX:-c++}" ;;
    cmake) command -v cmake ;;
    make) command -v make ;;
    libeigen3-dev) has_header eigen3/Eigen/Core Eigen/Core ;;
    catch2) has_header catch2/catch_all.hpp catch2/catch.hpp ;;
    nlohmann-json3-dev) has_header nlohmann/json.hpp ;;
    libcli11-dev) has_header CLI/CLI.hpp ;;
    gnuplot-nox) command -v gnuplot ;;
    libopenblas0-pthread) has_library libopenblas.so.0 ;;
    libopenblas0-openmp) ls /usr/lib/*/openblas-openmp/libopenblas.so.0 ;; # PyTorch's fastest
    '^libdnnl[0-9.]*$') has_library libdnnl.so ;; # the number differs between releases: apt-get takes a pattern
    python3-torch) python3 -c 'import torch' || /usr/bin/python3 -c 'import torch' ;;
  esac >/dev/null 2>&1
}

has_library() { PATH=$PATH:/sbin ldconfig -p | grep -qF "$1"; }

has_header() {
  for header; do
    for folder in /usr/include /usr/local/include /opt/homebrew/include; do
      [ ! -e "$folder/$header" ] || return 0
    done
  done
  return 1
}

# install_missing PACKAGE...: brings a Debian or Ubuntu machine up to what the build needs.
# Elsewhere it says what is missing and goes on: CMake fetches absent libraries, and may know places that we do not.
install_missing() {
  missing=
  for package; do
    present "$package" || missing="$missing $package"
  done
  if [ -n "$missing" ]; then
    as_root=
    [ "$(id -u)" = 0 ] || as_root=sudo
    if ! command -v apt-get >/dev/null || { [ -n "$as_root" ] && ! command -v sudo >/dev/null; }; then
      echo "Not found, and not installed for want of apt-get or root; please install (Debian's names):$missing" >&2
    else
      $as_root apt-get update -qq &&
        $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing ||
        echo "apt-get failed; please install:$missing" >&2
    fi
  fi

  version=$(cmake --version 2>/dev/null | sed -n '1s/[^0-9]*//p')
  if ! printf '3.24\n%s\n' "$version" | sort -V -C; then
    echo "dylora needs CMake 3.24 or newer; found here: ${version:-none}. See https://cmake.org/download" >&2
    exit 1
  fi
}
