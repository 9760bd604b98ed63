#!/usr/bin/env bash
# A checkpoint with random weights, two slices of it, and text out of both, in the folder `artifacts`.
set -euo pipefail
gemma3n make-checkpoint --size tiny --seed 1 --output artifacts/tiny --force
for slice in E2B E4B; do
  gemma3n-export --model artifacts/tiny --slice "$slice" --output "artifacts/tiny-$slice" --force
  gemma3n verify "artifacts/tiny-$slice" --model artifacts/tiny
  gemma3n run "artifacts/tiny-$slice" "Once upon a time" --max-new-tokens 24 --stats
done
