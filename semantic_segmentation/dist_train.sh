#!/usr/bin/env bash
# bash dist_train.sh CONFIG GPUS [flags of train.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../dense/launch.sh" semantic_segmentation train "$@"
