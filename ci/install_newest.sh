#!/usr/bin/env bash
# As ci/install.sh, with the newest releases that pyproject.toml admits. Lists them. Arguments go to pip.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pip install --quiet --upgrade pip
python ci/install_torch.py --quiet "$@" --no-deps "torch<3" "torchvision<1"
python -m pip install --quiet "$@" --editable ".[cpu,export,test]"
python -m pip list
