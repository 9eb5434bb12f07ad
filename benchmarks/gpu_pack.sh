#!/usr/bin/env bash
# Collects what a bare GPU machine (JAX, Flax, Optax, Orbax, Matplotlib, OpenCV, tqdm; no network)
# lacks for the question on the sweep: wheels for Python 3.12 on x86-64, in a folder that git ignores. Their other
# dependencies come with Orbax. PYTHON chooses the Python whose pip downloads.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=benchmarks/wheels
platforms=()
for tag in manylinux2014_x86_64 manylinux_2_17_x86_64 manylinux_2_24_x86_64 manylinux_2_27_x86_64 \
  manylinux_2_28_x86_64; do
  platforms+=(--platform "$tag")
done
rm -rf "$wheels"
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --dest "$wheels" --no-deps \
  --only-binary=:all: --python-version 3.12 "${platforms[@]}" \
  'grain>=0.2.18,<0.3' 'array-record>=0.8.6' cloudpickle portpicker 'ml-collections>=1.1,<2' \
  'simplejpeg>=1.8' 'jaxtyping>=0.3.11' wadler-lindig 'beartype>=0.23.1'
echo "$(find "$wheels" -name '*.whl' | wc -l) wheels, $(du -sm "$wheels" | cut -f1) MiB, in $wheels"
echo "carry $wheels along with the checkout and type there, in the checkout:"
echo "python3 -m pip install --quiet --no-index --no-deps --target" \
  "/tmp/marginface_packages $wheels/*.whl && PYTHONPATH=/tmp/marginface_packages python3 -m" \
  "benchmarks.gpu --minutes 8 --out runs/gpu"
