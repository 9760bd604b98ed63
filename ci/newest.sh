#!/usr/bin/env bash
# The same checks in a fresh virtual environment with the newest releases that pyproject.toml admits.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
export PATH="$environment/bin:$PATH"
# Modules are compiled when they are first imported, which most never are.
unset PYTHONDONTWRITEBYTECODE
python -m pip install --quiet --upgrade pip
python ci/install_torch.py --quiet --no-compile --no-deps "torch<3" "torchvision<1"
python -m pip install --quiet --no-compile --editable ".[cpu,export,test]"
python -m pip list
bash ci/check.sh
