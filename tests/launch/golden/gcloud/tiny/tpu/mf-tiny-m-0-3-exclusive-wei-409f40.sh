#!/usr/bin/env bash
# m=0.3,exclusive.weight=1,seed=0: on a queued TPU. Ending this script deletes the TPU.
set -euo pipefail
name=mf-tiny-m-0-3-exclusive-wei-409f40
options=(--zone=us-central1-a --project=my-project)
here=$(dirname "$0")

tpus() { gcloud compute tpus "$@" "${options[@]}"; }

state() {
  local said
  if said=$(tpus queued-resources describe "$name" --format='value(state.state)' 2>&1); then
    echo "$said"
  elif [[ $said == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo UNKNOWN  # no network, or a login that has expired: it may well run
  fi
}

delete() {
  tpus queued-resources delete "$name" --force --quiet || [ "$(state)" = ABSENT ] || {
    echo "$name is not deleted and may cost money: gcloud compute tpus queued-resources list" >&2
    return 1
  }
}

create() {
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type=v5p-32 \
    --runtime-version=v2-alpha-tpuv5 --spot --quiet
}

its_turn() {
  while true; do
    case $(state) in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | ABSENT) return 1 ;;
    esac
    sleep "${POLL_SECONDS:-30}"
  done
}

fetch() {
  mkdir -p runs/tiny/m=0.3,exclusive.weight=1,seed=0
  gcloud storage rsync --recursive \
    gs://my-bucket/faces/tiny/m=0.3,exclusive.weight=1,seed=0 \
    runs/tiny/m=0.3,exclusive.weight=1,seed=0
}

run() {
  tpus tpu-vm scp "$here/$name.tgz" "$here/$name-remote.sh" "$name:" --worker=all --quiet &&
    tpus tpu-vm ssh "$name" --worker=all --quiet --command="bash $name-remote.sh"
}

git ls-files -z --cached --others --exclude-standard |
  tar --null --files-from=- --ignore-failed-read -czf "$here/$name.tgz"
trap delete EXIT
[ "$(state)" = ABSENT ] || delete
for _ in $(seq 50); do
  create
  code=255
  if its_turn; then
    code=0
    run || code=$?
  fi
  case $code in
    0)
      fetch
      exit 0
      ;;
    75 | 255) ;;  # saved, or the connection is lost
    *)
      if [ "$(state)" = ACTIVE ]; then
        fetch || true  # what it says of its end
        exit "$code"
      fi
      ;;
  esac
  delete  # a TPU that was preempted never comes back by itself
done
echo "$name: 50 machines were not enough; the same command continues" >&2
exit 75
