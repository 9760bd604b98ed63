#!/usr/bin/env bash
# Has a headless Chromium chat on the server's page, about a picture and a sound, without any other network, and writes a
# screenshot. Needs node and npm; run it in an environment with the project installed.
#
#     bash ci/page/run.sh [SCREENSHOT]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
screenshot=$(realpath -m "${1:-page.png}")
work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$work"' EXIT
cd "$work"
gemma3n-export --model demo --slice E2B --output demo-E2B --quiet
npm install --silent --ignore-scripts @sparticuz/chromium@147 puppeteer-core@24
gemma3n serve demo-E2B --port 8765 --context 2048 &
for _ in $(seq 100); do
  if python3 -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8765/health')" 2>/dev/null; then break; fi
  sleep 0.2
done
cp "$here"/*.mjs .
node chat.mjs http://127.0.0.1:8765 "$root/demo/picture.png" "$root/demo/sound.wav" "$screenshot"
