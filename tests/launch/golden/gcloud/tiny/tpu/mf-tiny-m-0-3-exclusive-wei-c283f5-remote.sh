#!/usr/bin/env bash
# m=0.3,exclusive.weight=1,seed=1: what each worker of the TPU runs.
set -euo pipefail
mkdir -p marginface && tar -xzf mf-tiny-m-0-3-exclusive-wei-c283f5.tgz -C marginface && cd marginface
if ! command -v gcsfuse > /dev/null; then
  file=gcsfuse_2.2.0_amd64.deb
  curl -fsSL -o "/tmp/$file" \
    "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v2.2.0/$file"
  sudo apt-get install -y -q "/tmp/$file"
fi
sudo mkdir -p /runs && sudo chown "$(id -u)" /runs
mountpoint -q /runs || gcsfuse --implicit-dirs --rename-dir-limit 10000 --only-dir faces my-bucket /runs
python3 -m pip install --quiet uv
python3 -m uv venv --quiet --allow-existing --python 3.12 "$HOME/.marginface"
python3 -m uv pip install --quiet --python "$HOME/.marginface/bin/python" -e '.[tpu]'
set +e
export PATH="$HOME/.marginface/bin:$PATH"
for attempt in $(seq 4); do
  code=0
  python -m marginface.main --config tiny.py --config.loss.margin_kw.m=0.3 --config.regularizers.exclusive.weight=1.0 --config.seed=1 --workdir /runs/tiny/m=0.3,exclusive.weight=1,seed=1 --coordinator auto || code=$?
  case $code in 0 | 2 | 3 | 75) break ;; esac
  echo "attempt $attempt of 4: exit code $code"
done
exit "$code"
