#!/usr/bin/env bash
# Has optimum, transformers' pipeline and transformers.js answer with exports of the demo, and compares their tokens with
# this project's. Needs node and npm; run it in an environment with the project installed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for layout in native optimum transformers.js; do
  gemma3n-export --model demo --slice E2B --layout "$layout" --output "$layout" --quiet
done
python "$here/ask.py" native > native.txt
python3 -m venv optimum-environment
optimum-environment/bin/python -m pip install --quiet "torch==2.13.0"
optimum-environment/bin/python -m pip install --quiet "optimum-onnx[onnxruntime]==0.1.*" "transformers>=4.57,<4.58"
optimum-environment/bin/python "$here/ask_optimum.py" optimum > optimum.txt
npm install --silent --ignore-scripts "@huggingface/transformers@4"
cp "$here/ask.mjs" .
node ask.mjs "$work/" transformers.js "$here/../../demo/picture.png" > transformers.js.txt
for layout in optimum transformers.js; do
  echo "$layout:"
  cat "$layout.txt"
  diff <(grep -v pipeline native.txt | head -n "$(grep -vc pipeline "$layout.txt")") <(grep -v pipeline "$layout.txt")
done
echo "The same tokens."
