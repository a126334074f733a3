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

# The summary comes last, after how many laws were shown, each on how many cases, and how many of the oracles of each method passed: every
# test's output is in ctest's own log. A test "oracle of METHOD: what it says" is one, over however many types.
log=$build/ctest.log
{ ctest --test-dir "$build" --parallel "$cores" --output-on-failure --no-tests=error "$@" && echo 0 || echo 1; } | tee "$log" | sed '/tests passed/,$d'
if [ -f "$build/Testing/Temporary/LastTest.log" ]; then
  awk '/ Test: / { law = $0; sub(/.* Test: /, "", law); sub(/ - .*/, "", law); sub(/.*\//, "", law) }
       /^laws: / { laws[law] = 1; cases += $NF }
       END { for (law in laws) ++count; printf "laws: %d, cases: %d\n", count, cases }' "$build/Testing/Temporary/LastTest.log"
  awk '/ Test: / { name = ""; if (sub(/.*\/oracle of /, "")) { name = $0; sub(/ - (float|double)$/, "", name) } }
       /^Test (Passed|Failed)/ && name != "" { seen[name] = 1; if ($2 !~ /^Passed/) failed[name] = 1 }
       END { for (name in seen) { method = name; sub(/:.*/, "", method); ++all[method]; good[method] += !(name in failed) }
             for (method in all) printf "oracles of %s: %d of %d\n", method, good[method], all[method] | "sort"
             close("sort") }' "$build/Testing/Temporary/LastTest.log"
fi
sed -n '/tests passed/,$p' "$log" | sed '$d'
exit "$(tail -n 1 "$log")"
