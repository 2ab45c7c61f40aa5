#!/usr/bin/env bash
# Installs the programs that tests/clients runs exported files in, each if it can be had, into build/clients: its
# Python sees the packages of .venv, which stay as they are.
set -uo pipefail
cd "$(dirname "$0")/../.."
place=build/clients
rm -rf "$place"
"${PYTHON:-python3}" -m venv "$place/venv" || exit 1
site=$(echo "$PWD"/.venv/lib/python3*/site-packages)
echo "$site" >"$(echo "$place"/venv/lib/python3*/site-packages)/base.pth"
install() { "$place/venv/bin/pip" install --quiet "$@" || echo "not installed, so its tests are skipped: $*"; }
for extra in executorch litert ncnn coreml; do install --editable ".[$extra]"; done
for package in mnn torchao transformers; do install "$package"; done
# two versions of one package; they need numpy only, which .venv has
install --no-deps --target "$place/opencv4" 'opencv-python-headless<5'
install --no-deps --target "$place/opencv5" 'opencv-python-headless>=5'
mkdir "$place/web"
cp examples/web/package.json "$place/web"
npm install --prefix "$place/web" --no-audit --no-fund --silent || echo "no onnxruntime-web: its test is skipped"
