#!/usr/bin/env bash
# Everything CI checks, in a fresh virtual environment: with the locked versions, or what another installer puts there.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
export PATH="$environment/bin:$PATH"
# Modules are compiled when they are first imported, which most never are.
unset PYTHONDONTWRITEBYTECODE
bash "${1:-ci/install.sh}" --no-compile
bash ci/check.sh
