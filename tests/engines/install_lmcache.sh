#!/usr/bin/env bash
# Add the real LMCache (PyPI lmcache 0.5.6) to the virtual environment with vLLM that install_vllm.sh made.
#
#   tests/engines/install_lmcache.sh VENV
#
# Nothing that is there is changed. LMCache's other requirements are for CUDA and for services which its server and its
# connector do not need on a CPU, or are older versions of what came with vLLM; observability has to be disabled.
set -euo pipefail

venv=${1:?usage: install_lmcache.sh VENV}
"$venv/bin/python" -m pip --quiet --disable-pip-version-check install --no-deps lmcache==0.5.6 sortedcontainers==2.4.0

# Without what it imports `lmcache server` is there, but has no options.
help=$(LMCACHE_DISABLE_BANNER=1 "$venv/bin/python" -m lmcache.cli.main server --help 2>&1)
grep -q -e --l2-adapter <<<"$help" || { echo "$help" && exit 1; }
"$venv/bin/python" -c 'from importlib.metadata import version; print("lmcache", version("lmcache"))'
