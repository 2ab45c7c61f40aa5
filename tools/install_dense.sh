#!/usr/bin/env bash
# Installs what detection and segmentation need into .venv: the maintained forks of the mm stack.
#
# mmcv's compiled operators come as source. They are built once for a version of torch and Python (needs g++ and
# Python's headers), and the wheel is kept in HORNET_WHEELS, by default ~/.cache/hornet-pytorch. CUDA operators are
# built where a GPU is seen, or with FORCE_CUDA=1, and need nvcc (not tried yet).
set -euo pipefail
cd "$(dirname "$0")/.."

mmengine=0.10.12 mmcv=2.3.6 mmdet=3.5.1 mmseg=1.4.2
PATH=$PWD/.venv/bin:$PATH

key=$(python - <<'END'
import os, sys, torch

cuda = torch.cuda.is_available() or os.environ.get("FORCE_CUDA") == "1"
version = f"{sys.version_info.major}.{sys.version_info.minor}"
print(f"torch-{torch.__version__}-python{version}" + ("-cuda" if cuda else ""))
END
)
wanted="$key mmengine-$mmengine mmcv-$mmcv mmdet-$mmdet mmseg-$mmseg"
[[ $(cat .venv/.dense 2>/dev/null) != "$wanted" ]] || exit 0

wheels=${HORNET_WHEELS:-${XDG_CACHE_HOME:-$HOME/.cache}/hornet-pytorch}/$key
wheel=$(compgen -G "$wheels/onedl_mmcv-$mmcv-*.whl" || true)
if [[ -z $wheel ]]; then
    echo "compiling mmcv's operators for $key: about 5 minutes on two cores (CUDA: not tried), once; kept in $wheels"
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
    pip install --quiet setuptools wheel ninja
    # an isolated build has no torch, and then leaves the operators out without a word
    pip download --quiet --no-deps --no-build-isolation --no-binary :all: --dest "$build" "onedl-mmcv==$mmcv"
    tar -xzf "$build/onedl_mmcv-$mmcv.tar.gz" -C "$build"
    code=$build/onedl_mmcv-$mmcv
    sed -i 's/-std=c++17/-std=c++20/' "$code/setup.py" # what torch's headers want
    flags="-O2 -g0 -DNDEBUG -fwrapv -fPIC" # -g0: no symbols for a debugger
    # Torch's headers take most of the time: they are compiled once. CUDA code is compiled with other flags, and flags
    # in CFLAGS cannot have spaces.
    printf '#include "%s"\n' pytorch_cpp_helper.hpp pytorch_device_registry.hpp > "$build/headers.hpp"
    mapfile -t include < <(python -c 'from torch.utils.cpp_extension import include_paths
for path in include_paths(): print(f"-I{path}")')
    # shellcheck disable=SC2086 # words of flags
    if [[ $key != *-cuda && $build != *" "* ]] && "${CXX:-c++}" $flags -std=c++20 "${include[@]}" \
        "-I$code/mmcv/ops/csrc/common" -x c++-header "$build/headers.hpp"; then
        flags+=" -include $build/headers.hpp"
    fi
    CFLAGS=$flags MAX_JOBS=${MAX_JOBS:-$(nproc)} \
        pip wheel --verbose --no-build-isolation --no-deps --wheel-dir "$build/wheels" \
        "$code" 2>&1 | tee "$build/log" | while IFS= read -r line; do
        if [[ $line =~ ^\ *\[([0-9]+)/([0-9]+)\] ]]; then # of ninja
            printf '\r%s of %s files compiled' "${BASH_REMATCH[@]:1:2}"
        fi
    done || { tail -n 30 "$build/log" >&2; exit 1; }
    echo
    mkdir -p "$wheels"
    mv "$build"/wheels/*.whl "$wheels" # whole or not at all
    wheel=$(compgen -G "$wheels/onedl_mmcv-$mmcv-*.whl")
fi
pip install --quiet "$wheel" "onedl-mmengine==$mmengine" "onedl-mmdetection==$mmdet" "onedl-mmsegmentation==$mmseg"
# pip takes operators for another torch for the same
pip install --quiet --force-reinstall --no-deps "$wheel"
# fails where the operators or OpenCV's libraries are missing
python -W ignore -c 'import mmcv.ops, mmdet.models, mmseg.models' ||
    { echo "if a lib*.so is missing above: apt-get install libgl1 libglib2.0-0" >&2; exit 1; }
echo "$wanted" > .venv/.dense # last, so that an installation that was cut off starts again
