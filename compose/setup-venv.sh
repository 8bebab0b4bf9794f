#!/bin/sh
# Makes the virtual environment of this checkout: `make` calls it, a person need not.
#
#   sh compose/setup-venv.sh .venv
#
# PYTHON   the interpreter to make it with (default: the first of python3, python3.11 ... python3.14 that is new enough)
#
# A build of torch that lies in wheels/ is taken before the one that the package index has.
#
# Safe to repeat: a sound environment is kept and only brought up to the lock. The stamp file is written last, so that
# an interrupted run is taken up again by the next one.
set -eu

venv=$1
venv_python=$venv/bin/python

say() { printf 'set-up: %s\n' "$*"; }
die() { printf 'set-up: %s\n' "$*" >&2; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
        if new_enough "$candidate"; then echo "$candidate"; return; fi
    done
    if [ -n "${PYTHON:-}" ]; then
        die "PYTHON=$PYTHON is no Python 3.11 or newer"
    fi
    die "Python 3.11 or newer is missing: install it (Debian, Ubuntu: apt-get install python3 python3-venv; Fedora: dnf install python3; macOS: brew install python)"
}

# Debian splits venv's ensurepip off into a package of the interpreter's own version.
check_venv_module() {
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$1" -c 'import venv, ensurepip' >/dev/null 2>&1 \
        || die "the venv module of Python $version is missing: install it (Debian, Ubuntu: apt-get install python$version-venv)"
}

sound() { [ -x "$venv_python" ] && new_enough "$venv_python" && "$venv_python" -m pip --version >/dev/null 2>&1; }

if ! sound; then
    python=$(find_python)
    check_venv_module "$python"
    say "creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
say "installing what requirements.lock names into $venv (torch is the large one; only the first time takes minutes)"
"$venv_python" -m pip install --disable-pip-version-check --find-links wheels -r requirements.lock
"$venv_python" -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
touch "$venv/installed.stamp"
say "ready"
