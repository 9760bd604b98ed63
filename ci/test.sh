#!/usr/bin/env bash
# Everything CI checks, in a fresh virtual environment: lint, types, tests.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
export PATH="$environment/bin:$PATH"
bash ci/install.sh
bash ci/install_oracles.sh
ruff check .
ruff format --check .
bash ci/mypy.sh
python -m pytest -rP -n 2 --dist loadfile --no-loadscope-reorder
