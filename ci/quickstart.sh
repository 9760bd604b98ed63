#!/usr/bin/env bash
# Sets up .venv, makes a checkpoint with random weights, cuts two slices of it and generates text with both.
# Everything lands in the folders .venv and artifacts.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
export PATH="$PWD/.venv/bin:$PATH"
bash ci/install.sh
gemma3n make-checkpoint --size tiny --seed 1 --output artifacts/tiny --force
for slice in E2B E4B; do
  gemma3n-export --model artifacts/tiny --slice "$slice" --output "artifacts/tiny-$slice" --force
  gemma3n verify "artifacts/tiny-$slice" --model artifacts/tiny
  gemma3n run "artifacts/tiny-$slice" "Once upon a time" --max-new-tokens 24 --stats
done
