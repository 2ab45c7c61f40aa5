#!/usr/bin/env bash
# Installs what detection and segmentation need into .venv: the maintained forks of the mm stack.
#
# mmcv's compiled operators come as source. They are built once for a version of torch and Python (ten
# minutes on two cores; needs g++ and Python's headers), and the wheel is kept in HORNET_WHEELS, by default
# ~/.cache/hornet-pytorch. For CUDA operators: FORCE_CUDA=1 tools/install_dense.sh, with nvcc at hand
# (not tried yet).
set -euo pipefail
cd "$(dirname "$0")/.."

mmengine=0.10.12 mmcv=2.3.6 mmdet=3.5.1 mmseg=1.4.2
PATH=$PWD/.venv/bin:$PATH

key=$(python -c 'import sys, torch; print(f"torch-{torch.__version__}-python{sys.version_info.major}.{sys.version_info.minor}")')
wheels=${HORNET_WHEELS:-${XDG_CACHE_HOME:-$HOME/.cache}/hornet-pytorch}/$key${FORCE_CUDA:+-cuda}
wheel=$(compgen -G "$wheels/onedl_mmcv-$mmcv-*.whl" || true)
if [[ -z $wheel ]]; then
    echo "building mmcv's operators for $key"
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
    pip install --quiet setuptools wheel ninja
    # an isolated build has no torch, and then leaves the operators out without a word
    pip download --quiet --no-deps --no-build-isolation --no-binary :all: --dest "$build" "onedl-mmcv==$mmcv"
    tar -xzf "$build/onedl_mmcv-$mmcv.tar.gz" -C "$build"
    sed -i 's/-std=c++17/-std=c++20/' "$build/onedl_mmcv-$mmcv/setup.py" # what torch's headers want
    MAX_JOBS=${MAX_JOBS:-$(nproc)} pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$build/wheels" \
        "$build/onedl_mmcv-$mmcv"
    mkdir -p "$wheels"
    mv "$build"/wheels/*.whl "$wheels" # whole or not at all
    wheel=$(compgen -G "$wheels/onedl_mmcv-$mmcv-*.whl")
fi
pip install --quiet "$wheel" "onedl-mmengine==$mmengine" "onedl-mmdetection==$mmdet" "onedl-mmsegmentation==$mmseg"
python -c 'import mmcv.ops, mmdet.models, mmseg.models' # fails where the operators are missing
