#!/usr/bin/env bash
# bash dist_test.sh CONFIG CHECKPOINT GPUS [flags of test.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../dense/launch.sh" object_detection test "$@"
