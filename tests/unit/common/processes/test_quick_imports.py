"""What a process's imports leave out, and that nothing is missed."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from common.processes.quick_imports import quick_imports


def run(script: str) -> str:
    """In a process of its own, since imports happen once."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nodes_do_not_import_what_only_compilers_need_and_whoever_asks_later_gets_it() -> None:
    script = """
import sys
import services.expert.__main__, services.stage.__main__, torch
print([name for name in ("torch._decomp.decompositions", "torch._meta_registrations") if name in sys.modules])
import torch._meta_registrations
product = torch.empty(2, 3, device="meta").mm(torch.empty(3, 4, device="meta"))
print(product.shape[1], len(vars(torch._meta_registrations)) > 100)
"""
    assert run(script).splitlines() == ["[]", "4 True"]


def test_a_module_that_is_there_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    there = ModuleType("torch._meta_registrations")
    monkeypatch.setitem(sys.modules, "torch._meta_registrations", there)
    with quick_imports():
        pass
    assert sys.modules["torch._meta_registrations"] is there


def test_garbage_is_collected_again_afterwards_but_not_among_what_was_imported() -> None:
    script = """
import gc, sys
from common.processes.quick_imports import quick_imports
try:
    with quick_imports():
        assert not gc.isenabled()
        import no_such_module
except ModuleNotFoundError:
    pass
print(gc.isenabled(), gc.get_freeze_count() > 0, "torch._meta_registrations" in sys.modules)
"""
    assert run(script) == "True True False"
