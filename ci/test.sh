#!/usr/bin/env bash
# Everything CI checks, in a fresh virtual environment with the locked versions.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
export PATH="$environment/bin:$PATH"
bash ci/install.sh
bash ci/check.sh
