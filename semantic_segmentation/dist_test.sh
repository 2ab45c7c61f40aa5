#!/usr/bin/env bash
# Tests a segmentor on the GPUs of one machine: bash dist_test.sh CONFIG CHECKPOINT GPUS [flags of test.py]
set -euo pipefail
config=$1 checkpoint=("$2") gpus=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python}" -m torch.distributed.run --nproc_per_node="$gpus" \
    --master_port="${PORT:-29500}" -m semantic_segmentation.test "$config" "${checkpoint[@]}" --launcher pytorch "$@"
