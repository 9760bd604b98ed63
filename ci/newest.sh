#!/usr/bin/env bash
# The checks of ci/test.sh with the newest releases that pyproject.toml admits.
set -euo pipefail
cd "$(dirname "$0")/.."
bash ci/test.sh ci/install_newest.sh
