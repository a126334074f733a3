#!/bin/sh
# Kills a training run with SIGKILL at many random moments, resumes it each time, and demands that the adapter is to the byte that of a run
# which was left alone and kept no checkpoints. A checkpoint after every step, so that many of the kills fall into the saving of one; it goes on
# until at least one did.
#   kill.sh <work folder> <kills> <program> <arguments>...
set -eu
work=$1 kills=$2
shift 2

rm -rf "$work"
mkdir -p "$work"

train() {
  exec "$@" --checkpoint-every 1 --checkpoint "$work/killed" --save "$work/killed.adapter" --resume >> "$work/killed.log" 2>&1
}

same_adapter() {
  for file in adapter_config.json adapter_model.safetensors; do
    cmp "$work/whole.adapter/$file" "$work/killed.adapter/$file" || { echo "the resumed run gave another $file"; exit 1; }
  done
}

"$@" --save "$work/whole.adapter" > "$work/whole.log" 2>&1 || { cat "$work/whole.log"; exit 1; }

killed=0 while_saving=0 finished=0 seed=1
while [ "$killed" -lt "$kills" ] || [ "$while_saving" -eq 0 ]; do
  if [ "$seed" -gt $((20 * kills)) ]; then
    echo "killed $killed times in $seed runs, $while_saving of them while saving: too few"
    exit 1
  fi
  (train "$@") &
  process=$!
  sleep "$(awk -v seed="$seed" 'BEGIN { srand(seed); for (i = 0; i < 3; ++i) wait = rand(); printf "%.3f", 0.01 + 0.6 * wait }')"
  seed=$((seed + 1))
  kill -KILL "$process" 2> /dev/null || true
  status=0
  wait "$process" 2> /dev/null || status=$?
  case $status in
    137) killed=$((killed + 1)) ;;
    0) # it was done before: start anew
      same_adapter
      finished=$((finished + 1))
      rm -rf "$work/killed" "$work/killed.adapter" ;;
    *) echo "the run ended with status $status"; tail -n 5 "$work/killed.log"; exit 1 ;;
  esac
  for part in "$work"/killed/*.part "$work"/killed.adapter/*.part; do
    if [ -e "$part" ]; then while_saving=$((while_saving + 1)); fi
  done
done
(train "$@") || { tail -n 5 "$work/killed.log"; exit 1; }
same_adapter
grep -q "resumed after step" "$work/killed.log" || { echo "no run was resumed"; exit 1; }
echo "killed $killed times, $while_saving of them while saving; $((finished + 1)) runs came to their end with the same adapter"
