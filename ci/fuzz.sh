#!/usr/bin/env bash
# Fuzzes artifacts, checkpoints, media and requests: bash ci/fuzz.sh MINUTES [SEED]. Keeps what failed in build/fuzz/cases.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build/fuzz
PYTHONPATH=tests:tests/fuzz${PYTHONPATH:+:$PYTHONPATH} python tests/fuzz/long.py build/fuzz "$1" "${2:-0}"
