#!/usr/bin/env bash
# Trains or tests on the GPUs of one machine, for the dist_*.sh of both trees:
#   launch.sh TASK train CONFIG GPUS [flags]
#   launch.sh TASK test CONFIG CHECKPOINT GPUS [flags]
set -euo pipefail
task=$1 action=$2
shift 2
if [[ $action == train ]]; then
    files=("$1") gpus=$2
    shift 2
else
    files=("$1" "$2") gpus=$3
    shift 3
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python}" -m torch.distributed.run \
    --nproc_per_node="$gpus" --master_port="${PORT:-29500}" -m "$task.$action" "${files[@]}" --launcher pytorch "$@"
