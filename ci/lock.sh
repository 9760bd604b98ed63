#!/usr/bin/env bash
# Makes ci/lock.txt: the exact versions, with hashes, of what pyproject.toml and ci/torch.txt ask for, on Python 3.11 to
# 3.13 under Linux, x86-64 and aarch64. Arguments are those of `uv pip compile`; without --upgrade or
# --upgrade-package NAME, versions stay as they are where they still fit.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
"$environment/bin/pip" install --quiet "uv>=0.9,<1"
compile() {
  "$environment/bin/uv" --quiet pip compile pyproject.toml \
    --extra cpu --extra export --extra test --constraint ci/torch.txt --universal --python-version 3.11 \
    --fork-strategy fewest --no-annotate --no-header "$@"
}
# torch and torchvision, which ci/install_torch.py installs, and what only their builds for accelerators need.
compile "$@" --output-file "$environment/all.txt" > /dev/null
left_out=$(grep -oE '^(torch|torchvision|triton|cuda-[a-z-]+|nvidia-[a-z0-9-]+)\b' "$environment/all.txt")
cp ci/lock.txt "$environment/lock.txt" 2> /dev/null || true
compile "$@" --generate-hashes $(printf -- '--no-emit-package %s ' $left_out) --output-file "$environment/lock.txt"
{
  echo "# Made by: bash ci/lock.sh"
  echo "# Together with ci/torch.txt, what ci/install.sh installs."
  sed "s/ ; python_full_version < '3.14' and sys_platform == 'linux' / /" "$environment/lock.txt"
} > ci/lock.txt
