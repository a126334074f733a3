#!/bin/sh
# From a bare machine to the result of the benchmarks: installs what is missing, builds them for this machine, runs them.
#
#   benchmarks/run.sh [--json FILE]             how fast it is: step_ratio, gpt_step, compile_time; one table, whose rows FILE gets as a list
#   benchmarks/run.sh BENCHMARK [ARGUMENTS]     one of these, or rank_sweep, or method_ratio: what each method costs beside LoRA
#
# Other libraries are there to compare with. Where one cannot be had, its rows are left out.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
names="step_ratio gpt_step compile_time"
json=
if [ $# -eq 2 ] && [ "$1" = --json ]; then
  json=$2
elif [ $# -gt 0 ] && [ -f "$root/benchmarks/$1.cpp" ]; then
  names=$1
  shift
elif [ $# -gt 0 ]; then
  sed -n '/^#  /s/^# *//p' "$0" >&2
  exit 2
fi
build=$root/build/benchmarks
{
  . "$root/tests/support/install.sh"
  install_missing g++ make cmake libeigen3-dev nlohmann-json3-dev libcli11-dev
  case $names in
    rank_sweep) install_missing gnuplot-nox ;;
    method_ratio) ;; # compares our own with each other
    *) for peer in libopenblas0-pthread libopenblas0-openmp '^libdnnl[0-9.]*$' python3-torch; do install_missing "$peer"; done ;;
  esac
  cmake --preset bench -S "$root" -B "$build"
  cmake --build "$build" --parallel "$(getconf _NPROCESSORS_ONLN)" --target $names
} >&2 # standard output is the programs'

case $names in
  # It runs for long, with a worker on every core: a waiting thread must not hold one that a working thread needs.
  rank_sweep) export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" ;;
  # The others want the machine for themselves, and the default, with which all libraries are fastest: to spin for some milliseconds, then sleep.
esac
case $names in *" "*) ;; *) exec "$build/benchmarks/$names" "$@" ;; esac

if [ -z "$json" ]; then
  json=$(mktemp)
  trap 'rm -f "$json"' EXIT
fi
echo '[]' >"$json"
lscpu | grep -E '^(Model name|CPU\(s\)|Thread|L[1-3]d? cache)'
"${CXX:-c++}" --version | sed 1q
printf 'load before: %s\n\n' "$(cut -d ' ' -f 1 /proc/loadavg)"
for name in $names; do "$build/benchmarks/$name" --json "$json" --append; done
echo "goals met: $(grep -c '"met": true' "$json") of $(grep -c '"met": [tf]' "$json")"
