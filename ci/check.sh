#!/usr/bin/env bash
# Lint, types and tests, in the environment that is active.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
# mypy uses one core; it runs beside the tests.
bash ci/mypy.sh &
types=$!
tests=0
python -m pytest -rP -n 2 --dist loadfile --no-loadscope-reorder --durations 10 "$@" || tests=$?
wait $types
exit $tests
