#!/usr/bin/env bash
# Has a headless Chromium use the server's page, without any other network; checks it with axe-core and writes
# screenshots into FOLDER. Needs node and npm; run it in an environment with the project installed.
#
#     bash ci/page/run.sh [FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
screenshots=$(realpath -m "${1:-$root/build/page}")
work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$work"' EXIT
mkdir -p "$screenshots" "$work/media"

cd "$root"
gemma3n-export --model demo --slice E2B --output "$work/demo-E2B" --quiet
cd "$work"
cp "$root/demo/picture.png" "$root/demo/sound.wav" media
python3 "$here/make_media.py" media

serve() { # PORT OPTION...
  gemma3n serve demo-E2B --context 2048 --temperature 0 --port "$@" &> "server-$1.log" &
  until python3 -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$1/health')" 2>/dev/null; do
    kill -0 $!
    sleep 0.2
  done
}

read -r open guarded < <(python3 - <<'END'
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(each.getsockname()[1] for each in held))
END
)
serve "$open"
serve "$guarded" --api-key key-of-the-page
cp "$here"/*.mjs "$here"/package*.json .
npm ci --silent --ignore-scripts
node chat.mjs "http://127.0.0.1:$open" "http://127.0.0.1:$guarded" key-of-the-page media "$screenshots"
