#!/usr/bin/env bash
# Installs the project, editable, with all that exporting, running on the CPU and testing need.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pip install --quiet --upgrade pip
# First and pinned: without it the newest torch comes with whatever accelerator libraries it likes.
python -m pip install --quiet "torch==2.13.0"
python -m pip install --quiet --editable ".[cpu,export,test]"
