"""Prints what pyproject.toml asks for, a requirement a line: the image installs it before the code is copied in.

`python list_dependencies.py PYPROJECT [EXTRA ...]`: without an extra what every process needs, else what those add.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path


def dependencies(pyproject: str, extras: Sequence[str]) -> list[str]:
    """Returns the requirements of these extras, or without any those of the project itself. An unknown extra:
    KeyError."""
    project = tomllib.loads(pyproject)["project"]
    if not extras:
        return list(project["dependencies"])
    return [requirement for extra in extras for requirement in project["optional-dependencies"][extra]]


if __name__ == "__main__":
    print("\n".join(dependencies(Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2:])))
