#!/usr/bin/env bash
# Trains a segmentor on the GPUs of one machine: bash dist_train.sh CONFIG GPUS [flags of train.py]
set -euo pipefail
config=$1 gpus=$2 checkpoint=()
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python}" -m torch.distributed.run --nproc_per_node="$gpus" \
    --master_port="${PORT:-29500}" -m semantic_segmentation.train "$config" "${checkpoint[@]}" --launcher pytorch "$@"
