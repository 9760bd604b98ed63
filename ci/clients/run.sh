#!/usr/bin/env bash
# Has the clients in tests/clients ask the server, each in its newest release and an environment of its own, and prints
# what works as a table; exits 1 if something does not. Needs curl, node and npm; run it in an environment with the
# project installed.
#
#     bash ci/clients/run.sh [PACKAGE...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
clients=$root/tests/clients
only=" $* "
work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$work"' EXIT
cd "$work"

read -r port files_port origin_port < <(python3 - <<'END'
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(each.getsockname()[1] for each in held))
END
)
export CLIENTS_URL=http://127.0.0.1:$port CLIENTS_KEY=key-of-the-clients CLIENTS_MODEL=google/gemma-3n-E4B-it
export CLIENTS_FILES_URL=http://127.0.0.1:$files_port CLIENTS_ORIGIN=http://localhost:$origin_port
export CLIENTS_DEMO=$root/demo
export LITELLM_LOCAL_MODEL_COST_MAP=True # It would fetch its list of prices from GitHub.

wanted() {
  [[ $only == "  " || $only == *" $1 "* ]]
}

ask() { # FILE COMMAND...
  if ! "${@:2}" "$1" >> results 2> log < /dev/null; then
    tail -n 5 log >&2
    echo "{\"client\": \"$(basename "$1")\", \"version\": \"\", \"feature\": \"text\", \"result\": \"failed\", \"why\": \"ended early\"}" >> results
  fi
}

gemma3n-export --model "$root/demo" --slice E2B --output "$CLIENTS_MODEL" --quiet
GEMMA3N_API_KEY=$CLIENTS_KEY gemma3n serve "$CLIENTS_MODEL" --port "$port" --context 1024 --allow-private-urls \
  --allow-origins "$CLIENTS_ORIGIN" &> server.log &
python3 -m http.server "$files_port" --bind 127.0.0.1 --directory "$CLIENTS_DEMO" &> /dev/null &
for _ in $(seq 100); do
  if curl --silent --fail --output /dev/null "$CLIENTS_URL/health"; then break; fi
  sleep 0.2
done

while read -r package names; do
  wanted "$package" || continue
  python3 -m venv "$package"
  "$package/bin/python" -m pip install --quiet "$package" < /dev/null
  for name in $names; do ask "$clients/python/$name.py" "$package/bin/python"; done
done <<'END'
openai openai_client openai_responses page_mistralrs
langchain-openai langchain_client
litellm litellm_client
instructor instructor_client
pydantic-ai pydantic_ai_client
together together_client page_together
anthropic anthropic_client
llm llm_client
END

if wanted npm; then
  npm install --silent --ignore-scripts openai ai @ai-sdk/openai-compatible @ai-sdk/openai @ai-sdk/anthropic \
    @anthropic-ai/sdk together-ai zod @sparticuz/chromium@147 puppeteer-core@24
  cp "$clients"/npm/*.mjs "$root/ci/page/browser.mjs" .
  for name in openai ai_sdk anthropic page_together origins; do ask "$name.mjs" node; done
fi
python3 "$here/table.py" < results
