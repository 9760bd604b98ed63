#!/usr/bin/env bash
# Sets up .venv, exports the E2B slice of the small model that comes with the project, and asks it about a picture, a
# sound and a sum. Everything lands in the folders .venv and artifacts.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
export PATH="$PWD/.venv/bin:$PATH"
bash ci/install.sh
gemma3n-export --model demo --slice E2B --output artifacts/demo-E2B --force
gemma3n verify artifacts/demo-E2B --model demo
gemma3n run artifacts/demo-E2B "What is 3 plus 4?"
gemma3n run artifacts/demo-E2B "What is in the picture?" --image demo/picture.png
gemma3n run artifacts/demo-E2B "What do you hear?" --audio demo/sound.wav
