#!/bin/sh
# Resolves the ranges of pyproject.toml anew and writes requirements.lock: `make lock`.
#
# The lock names versions and nothing else: no index, no path, no build of torch (2.13.0, not 2.13.0+cpu), and none of
# the CUDA packages that some builds of torch bring along, so that one file serves every machine and every index.
set -eu

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" - >"$work/requirements.txt" <<'PYTHON'
import tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], sep="\n")
for extra in project["optional-dependencies"].values():
    print(*extra, sep="\n")
PYTHON
"$work/venv/bin/python" -m pip install --disable-pip-version-check -r "$work/requirements.txt"
{
    echo "# Written by \`make lock\` from the ranges in pyproject.toml."
    "$work/venv/bin/python" -m pip freeze --all \
        | grep -v -i -E '^(pip|wheel|triton|nvidia-.*|cuda-.*)(==| @)' \
        | sed -E -e 's/^(torch==[0-9.]+)\+[A-Za-z0-9.]+$/\1/' \
            -e "s/^(uvloop==.*)\$/\\1 ; sys_platform != 'win32'/"
} >"$work/requirements.lock"
if grep -q ' @ ' "$work/requirements.lock"; then
    echo "lock: a requirement was resolved to a file or an address instead of a version" >&2
    grep ' @ ' "$work/requirements.lock" >&2
    exit 1
fi
mv "$work/requirements.lock" requirements.lock
