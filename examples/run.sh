#!/bin/sh
# From a bare machine to the result of finetune_text: installs what is missing, builds it (and inspect_adapter), runs it.
# Arguments go to the program: examples/run.sh --json report.json
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/examples
{
  . "$root/tests/support/install.sh"
  install_missing g++ make cmake libeigen3-dev nlohmann-json3-dev libcli11-dev
  cmake --preset release -S "$root" -B "$build" -D DYLORA_BUILD_TESTS=OFF
  cmake --build "$build" --parallel "$(getconf _NPROCESSORS_ONLN)" --target finetune_text inspect_adapter
} >&2 # standard output is the program's

# Where others use the machine too, a waiting thread must not hold a core that a working one needs.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec "$build/examples/finetune_text" "$@"
