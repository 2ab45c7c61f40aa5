#!/usr/bin/env bash
# Trains or tests on the GPUs of this machine; called by the dist_*.sh of both trees. For several machines, start it on
# each with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
#   launch.sh TASK train CONFIG GPUS [flags]
#   launch.sh TASK test CONFIG CHECKPOINT GPUS [flags]
set -euo pipefail
task=$1 action=$2
shift 2
if [[ $action == train ]]; then
    : "${2:?usage: dist_train.sh CONFIG GPUS [flags]}"
    files=("$1") gpus=$2
    shift 2
else
    : "${3:?usage: dist_test.sh CONFIG CHECKPOINT GPUS [flags]}"
    files=("$1" "$2") gpus=$3
    shift 3
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$gpus" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" -m "$task.$action" "${files[@]}" --launcher pytorch "$@"
