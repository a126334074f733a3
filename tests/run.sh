#!/bin/sh
# From a bare machine to a green run: installs what is missing, builds from nothing, runs every test.
# Arguments go to ctest: tests/run.sh -R adapters
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/tests/support/install.sh"
install_missing g++ make cmake libeigen3-dev catch2 nlohmann-json3-dev libcli11-dev

build=$root/build/tests
cores=$(getconf _NPROCESSORS_ONLN)
rm -rf "$build"
cmake --preset dev -S "$root" -B "$build"
cmake --build "$build" --parallel "$cores" --target all all_verify_interface_header_sets
ctest --test-dir "$build" --parallel "$cores" --output-on-failure --no-tests=error "$@"
