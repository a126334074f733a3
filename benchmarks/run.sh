#!/bin/sh
# From a bare machine to the result of a benchmark: installs what is missing, builds it for this machine, runs it.
# The first argument names the benchmark, the others go to it: benchmarks/run.sh rank_sweep --quick
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -eq 0 ] || [ ! -f "$root/benchmarks/$1.cpp" ]; then
  {
    echo "usage: benchmarks/run.sh BENCHMARK [ARGUMENTS]; there are:"
    for source in "$root"/benchmarks/*.cpp; do echo "  $(basename "$source" .cpp)"; done
  } >&2
  exit 2
fi
name=$1
shift
build=$root/build/benchmarks
{
  . "$root/tests/support/install.sh"
  install_missing g++ make cmake libeigen3-dev nlohmann-json3-dev libcli11-dev gnuplot-nox
  cmake --preset bench -S "$root" -B "$build"
  cmake --build "$build" --parallel "$(getconf _NPROCESSORS_ONLN)" --target "$name"
} >&2 # standard output is the program's

# Where others use the machine too, a waiting thread must not hold a core that a working one needs.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec "$build/benchmarks/$name" "$@"
