#!/bin/sh
# Makes an environment for benchmarks/payload_peers.py with the Redis clients of LMCache: install_lmcache.sh DIR [PYTHON]
# LMCache's other dependencies are for CUDA and services that its Redis clients do not use; these are what they import.
# hiredis is not among LMCache's dependencies: with it its redis-py client is at its best, and it is measured without too.
set -eu
[ $# -ge 1 ] || { echo "usage: $0 DIR [PYTHON]" >&2; exit 2; }
"${2:-python3}" -m venv "$1"
"$1/bin/pip" install --quiet --no-deps lmcache==0.5.6
"$1/bin/pip" install --quiet torch==2.13.0
"$1/bin/pip" install --quiet 'numpy<=2.2.6' numba 'prometheus_client<=0.24.1' 'setuptools>=77.0.3,<81.0.0' 'transformers>=5.4' \
    aiofile aiofiles aiohttp cachetools cryptography hiredis msgspec psutil py-cpuinfo pyyaml pyzmq redis requests \
    safetensors sortedcontainers
echo "python benchmarks/payload_peers.py --lmcache-python $1/bin/python"
