#!/usr/bin/env bash
# Ends the SLURM that up.sh started in FOLDER, by the process ids noted there, and its jobs.
set -uo pipefail
folder=$(realpath -m "${1:?usage: down.sh FOLDER}")
[ -e "$folder/pids" ] || { echo "nothing is up in $folder"; exit 0; }
export SLURM_CONF=$folder/slurm.conf

jobs=$(timeout 10 squeue --noheader --format=%A 2> /dev/null | sort -u)
if [ -n "$jobs" ]; then
  timeout 10 scancel $jobs
  for _ in $(seq 100); do [ -n "$(timeout 5 squeue --noheader)" ] || break; sleep 0.1; done
fi
tac "$folder/pids" | while read -r pid name; do
  [ "$(cat "/proc/$pid/comm" 2> /dev/null)" = "${name%%-*}" ] || continue  # the id is still ours
  kill -TERM "$pid"
  for _ in $(seq 100); do kill -0 "$pid" 2> /dev/null || break; sleep 0.1; done
  kill -KILL "$pid" 2> /dev/null && echo "$name did not end by itself"
done
# A slurmd leaves the minders of its steps alive, as it may come back: it does not.
for pid in $(pgrep -x slurmstepd); do
  grep -qzx "SLURM_CONF=$folder/slurm.conf" "/proc/$pid/environ" 2> /dev/null && kill -KILL "$pid"
done
rm -f "$folder/pids"
