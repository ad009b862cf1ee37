#!/bin/sh
# Lock what the gate installs, with the hashes of every file of each release. Needs uv. Give --upgrade for newer releases.
# Universal: one file serves Python 3.11 and newer on Linux and macOS, x86_64 and aarch64; where releases differ it has
# both, with markers. It names no index: pip takes the one that it is set to, and the hashes say what may come from it.
set -eu
cd "$(dirname "$0")/.."
export UV_CUSTOM_COMPILE_COMMAND="sh requirements/lock.sh"
lock() {
  uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-package distprefix "$@"
}
lock pyproject.toml requirements/ci.in --extra dev -o requirements/ci.txt "${1:---no-upgrade}"
lock pyproject.toml --extra fuzz -c requirements/ci.txt -o requirements/fuzz.txt "${1:---no-upgrade}"
