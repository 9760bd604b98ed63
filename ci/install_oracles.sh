#!/usr/bin/env bash
# What the tests compare with. Without dependencies: timm would replace torch by an accelerator build, and
# torchvision has to be there but not to work (see tests/oracle_stubs.py).
set -euo pipefail
python -m pip install --quiet --no-deps "timm>=1.0.17,<2" "torchvision<1" "onnxruntime-genai==0.18.*"
