#!/usr/bin/env bash
# Runs dry_run.py on artifacts in an environment of its own: onnxruntime-gpu, and none of CUDA's libraries.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
"$environment/bin/python" -m pip install --quiet "onnxruntime-gpu>=1.31,<2" --editable "$root"
"$environment/bin/python" "$root/ci/cuda_dry_run/dry_run.py" "$@"
