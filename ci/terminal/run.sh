#!/usr/bin/env bash
# Has `gemma3n chat` hold a conversation in a real terminal, tmux, and prints what it shows. Needs tmux; run it in an
# environment with the project installed.
#
#     bash ci/terminal/run.sh
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"
gemma3n-export --model demo --slice E2B --output "$work/demo-E2B" --quiet
python3 ci/terminal/chat.py "$work/demo-E2B" "$work"
