#!/usr/bin/env bash
# Lint, types and tests, in the environment that is active.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
bash ci/mypy.sh
python -m pytest -rP -n 2 --dist loadfile --no-loadscope-reorder --durations 10 "$@"
