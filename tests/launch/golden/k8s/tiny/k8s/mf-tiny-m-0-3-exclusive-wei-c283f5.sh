#!/usr/bin/env bash
# m=0.3,exclusive.weight=1,seed=1
xpk workload create \
  --workload=mf-tiny-m-0-3-exclusive-wei-c283f5 \
  --cluster=my-cluster \
  --project=my-project \
  --zone=us-central1-a \
  --tpu-type=v5litepod-16 \
  --num-slices=1 \
  --base-docker-image=python:3.12 \
  --script-dir=. \
  --storage=my-runs \
  --priority=medium \
  --restart-on-exit-codes=1,75 \
  --max-restarts=50 \
  --termination-grace-period-seconds=120 \
  '--command=pip install --quiet -e '"'"'.[tpu]'"'"' && exec python -m marginface.main --config tiny.py --config.loss.margin_kw.m=0.3 --config.regularizers.exclusive.weight=1.0 --config.seed=1 --workdir /runs/tiny/m=0.3,exclusive.weight=1,seed=1 --coordinator auto' \
  "$@"
