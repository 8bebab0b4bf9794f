"""All faults by the name that suites write, found in the files of this folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from types import ModuleType

from chaos import faults
from chaos.faults.base import Fault


def faults_in(package: ModuleType) -> Iterator[type[Fault]]:
    """Yields the faults of all modules of a package. A class without a name of its own is there to be built on."""
    for entry in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(entry.name)
        for found in vars(module).values():
            if isinstance(found, type) and issubclass(found, Fault) and found.__module__ == module.__name__:
                if "name" in vars(found):
                    yield found


FAULTS: Mapping[str, type[Fault]] = {fault.name: fault for fault in faults_in(faults)}
