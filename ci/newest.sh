#!/usr/bin/env bash
# The same checks in a fresh virtual environment with the newest releases that pyproject.toml admits.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
export PATH="$environment/bin:$PATH"
python -m pip install --quiet --upgrade pip
python ci/install_torch.py --quiet torch torchvision
python -m pip install --quiet --editable ".[cpu,export,test]"
python -m pip list
bash ci/check.sh
