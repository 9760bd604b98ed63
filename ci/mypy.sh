#!/usr/bin/env bash
# Type-checks the rooms under their import name: mypy needs a tree in which gemma3n_onnx/ holds them.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/gemma3n_onnx"
ln -s "$root/gemma3n_onnx/__init__.py" "$tree/gemma3n_onnx/__init__.py"
for room in export graphs runtime matformer_configs training; do ln -s "$root/$room" "$tree/gemma3n_onnx/$room"; done
cd "$root"
MYPYPATH=$tree python -m mypy --config-file pyproject.toml "$tree/gemma3n_onnx"
