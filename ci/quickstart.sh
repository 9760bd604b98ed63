#!/usr/bin/env bash
# Sets up .venv, makes a checkpoint with random weights, cuts two slices of it, compares both with transformers and
# answers a text and a picture. Everything lands in the folders .venv and artifacts.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
export PATH="$PWD/.venv/bin:$PATH"
bash ci/install.sh
gemma3n make-checkpoint --size tiny --seed 1 --output artifacts/tiny --force
python -c 'from PIL import Image; Image.radial_gradient("L").save("artifacts/picture.png")'
for slice in E2B E4B; do
  gemma3n-export --model artifacts/tiny --slice "$slice" --output "artifacts/tiny-$slice" --force
  gemma3n verify "artifacts/tiny-$slice" --model artifacts/tiny --modalities text,audio
  gemma3n run "artifacts/tiny-$slice" "Once upon a time" --max-new-tokens 24 --stats
  gemma3n run "artifacts/tiny-$slice" "What is this?" --image artifacts/picture.png --max-new-tokens 24 --stats
done
