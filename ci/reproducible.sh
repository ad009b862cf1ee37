#!/usr/bin/env bash
# Build the sdist and the wheel twice, from two copies of the sources in folders of other names, times and permissions,
# and fail where a byte differs. Usage: reproducible.sh PYTHON OUT; PYTHON has build and hatchling, OUT gets the first
# pair. SOURCE_DATE_EPOCH dates what is in them, by default a fixed day.
set -euo pipefail
python=$1
out=$2
sources=$(cd "$(dirname "$0")/.." && pwd)
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-1577836800}
copies=$(mktemp -d)
trap 'rm -rf "$copies"' EXIT
for copy in one "another folder"; do
  mkdir -p "$copies/$copy"
  tar -C "$sources" --exclude=./.venv --exclude=./.git --exclude=./dist --exclude=__pycache__ -cf - . | tar -C "$copies/$copy" -xf -
done
find "$copies/another folder" -exec touch -d '2001-02-03 04:05:06' {} +
chmod -R go-rwx "$copies/another folder"
"$python" -m build --no-isolation --outdir "$copies/out1" "$copies/one" >/dev/null
(umask 077 && TZ=Asia/Tokyo "$python" -m build --no-isolation --outdir "$copies/out2" "$copies/another folder" >/dev/null)
(cd "$copies/out1" && sha256sum -- *) >"$copies/sums"
(cd "$copies/out2" && sha256sum --check --quiet "$copies/sums")
mkdir -p "$out"
cp "$copies/out1"/* "$out"
cat "$copies/sums"
