#!/usr/bin/env bash
# Install SGLang 0.5.23 without its GPU libraries, for the tests of its storage backend: its factory, its interface and
# its host memory run on a CPU, an engine does not.
#
#   tests/engines/install_sglang.sh VENV [PYTHON]        PYTHON: a Python 3.11 (default python3.11)
#
# SGLang pins a CUDA torch of several GB; the CPU build 2.13.0 serves here. Where pip is not offered it, name the index
# which has it:  TORCH_INDEX=https://download.pytorch.org/whl/cpu tests/engines/install_sglang.sh VENV
set -euo pipefail

venv=${1:?usage: install_sglang.sh VENV [PYTHON]}
python=${2:-python3.11}
index=${TORCH_INDEX:+--extra-index-url $TORCH_INDEX}

"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install --upgrade pip
# shellcheck disable=SC2086  # $index is two words or none
"${pip[@]}" install $index torch==2.13.0 numpy
# What importing the host memory pool imports
"${pip[@]}" install apache-tvm-ffi dill gguf ipython loguru msgspec orjson packaging pillow psutil pybase64 pydantic \
    pyzmq requests sentencepiece starlette transformers==5.19.0 triton
"${pip[@]}" install --no-deps sglang==0.5.23 compressed-tensors==0.18.0
# What distprefix needs
"${pip[@]}" install 'msgpack>=1.0.5' 'redis[hiredis]>=8' 'xxhash>=3.4'

"$venv/bin/python" -c 'import importlib.metadata as m; print("sglang", m.version("sglang"))'
echo "DISTPREFIX_SGLANG_PYTHON=$venv/bin/python python -m pytest tests/engines/test_sglang_storage.py"
