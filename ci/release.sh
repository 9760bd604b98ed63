#!/usr/bin/env bash
# Builds both distributions into the folder `dist`, each as sdist and as the wheel of that sdist, and checks their
# metadata as PyPI does.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
"$environment/bin/pip" install --quiet build twine
rm -rf dist
for project in . demo; do "$environment/bin/python" -m build --outdir dist "$project"; done
"$environment/bin/twine" check --strict dist/*
