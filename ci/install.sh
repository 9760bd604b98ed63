#!/usr/bin/env bash
# Installs the project, editable, with all that exporting, running on the CPU and testing need, in the versions of
# ci/lock.txt and ci/torch.txt. TORCH_INDEX chooses another build of torch: see ci/install_torch.py. Arguments go to pip.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pip install --quiet --no-deps --require-hashes "$@" --requirement ci/lock.txt
python ci/install_torch.py --quiet "$@" --requirement ci/torch.txt
python -m pip install --quiet --no-deps --no-build-isolation --editable .
