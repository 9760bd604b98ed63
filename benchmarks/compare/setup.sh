#!/usr/bin/env bash
# Environments for llama.cpp (built from its PyPI sources) and OpenVINO, in the folder given.
set -euo pipefail
folder=$1
python3 -m venv "$folder/llama"
"$folder/llama/bin/pip" install --quiet llama-cpp-python gguf safetensors ml_dtypes numpy
python3 -m venv "$folder/openvino"
"$folder/openvino/bin/pip" install --quiet torch==2.13.0 "optimum-intel[openvino]==2.2.*" transformers==5.0.0 openvino-genai
# A torchvision that does not fit this torch comes along, and transformers fails to import beside it.
"$folder/openvino/bin/pip" uninstall --quiet --yes torchvision
