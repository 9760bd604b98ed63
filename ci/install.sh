#!/usr/bin/env bash
# Installs the project, editable, with all that exporting, running on the CPU and testing need.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pip install --quiet --upgrade pip
# The CPU build: a plain `torch` brings gigabytes of CUDA libraries.
python -m pip install --quiet "torch==2.13.0" || python -m pip install --quiet torch
python -m pip install --quiet --editable ".[cpu,export,test]"
