#!/usr/bin/env bash
# Compares log-likelihoods and answers of lm-evaluation-harness, as released: its `hf` model on the demo, `gemma3n
# evaluate` on the exported demo, and its `local-completions` on `gemma3n serve`. Prints the largest differences; exits 1
# if one is above the bound. Run it in an environment with the project installed.
#
#     bash ci/harness/run.sh [ITEMS]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
items=${1:-200}
work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME=$work/cache
python3 -m pip install --quiet "lm-eval[api]>=0.4.9,<0.5" accelerate peft
port=$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')

tasks=$(python3 "$here/make_tasks.py" tasks --items "$items")
for precision in fp32 int8 int4; do
  gemma3n-export --model "$root/demo" --precision "$precision" --output "demo-$precision" --quiet
done
gemma3n serve demo-fp32 --port "$port" --context 2048 &> server.log &
for _ in $(seq 100); do
  if curl --silent --fail --output /dev/null "http://127.0.0.1:$port/health"; then break; fi
  sleep 0.2
done

# The torchvision of ci/install.sh may be built for another torch; transformers imports it with Gemma 3n.
harness="from gemma3n_onnx.export.verify.torchvision_shim import complete_torchvision as complete; complete()
from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
ask() { # NAME MODEL MODEL_ARGS
  python3 -c "$harness" --model "$2" --model_args "$3" --device cpu --tasks "$tasks" --include_path tasks --output_path "$1" --log_samples > "$1.log" 2>&1 ||
    { tail -n 20 "$1.log" >&2; exit 1; }
}
ask hf hf "pretrained=$root/demo,dtype=float32,add_bos_token=True"
ask server local-completions "base_url=http://127.0.0.1:$port/v1/completions,model=demo-fp32,tokenizer=$root/demo,tokenizer_backend=huggingface,add_bos_token=True"
gemma3n evaluate demo-fp32 demo-int8 demo-int4 --tasks "$tasks" --include-path tasks --output ours
python3 "$here/compare.py" hf server ours/demo-fp32 ours/demo-int8 ours/demo-int4
