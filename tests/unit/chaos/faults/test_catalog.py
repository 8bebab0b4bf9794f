"""A fault is found by being there: its file is all that it takes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from chaos import faults
from chaos.faults.base import Fault
from chaos.faults.catalog import FAULTS, faults_in
from tests.support.chaos.target import ListedTarget

BUILT_ON = {"__init__", "base", "background", "catalog", "cgroups", "network", "processes", "rings"}
NEW_FAULT = '''
"""The room of a node becomes hot."""

from typing import Annotated

from chaos.faults.base import Fault, Range
from chaos.faults.kill import Kill


class Heat(Fault):
    """It is `degrees` warmer."""

    name = "heat"
    degrees: Annotated[int, Range(1, 50)] = 10

    def apply(self, target, victims):
        self._undo.add(target.start, "cooling")
        target.stop(victims[0], self.degrees)
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    folder = tmp_path / "hot_faults"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "heat.py").write_text(NEW_FAULT)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("hot_faults")
    for name in [name for name in sys.modules if name.partition(".")[0] == "hot_faults"]:
        del sys.modules[name]


def test_a_file_that_is_put_there_is_a_fault_with_its_parameters_and_what_it_imports_is_none(
    package: ModuleType,
) -> None:
    (heat,) = faults_in(package)
    assert heat.name == "heat"
    with pytest.raises(ValueError, match="degrees=99 must be a whole number from 1 to 50"):
        heat.from_suite({"degrees": 99})
    target, fault = ListedTarget(), heat.from_suite({"degrees": 20})
    fault.apply(target, target.named("stage-0"))
    fault.heal(target)
    assert [(what, name) for what, name, _ in target.done] == [("stop", "stage-0"), ("start", "cooling")]


def test_each_file_of_the_folder_is_one_fault_of_its_name() -> None:
    files = {path.stem for path in Path(faults.__path__[0]).glob("*.py")} - BUILT_ON
    assert set(FAULTS) == files
    for name, fault in FAULTS.items():
        assert fault.__module__ == f"chaos.faults.{name}"
        assert issubclass(fault, Fault)
        assert fault.name == name


def test_the_page_of_faults_has_each_of_them_with_its_parameters_and_no_other() -> None:
    page = (Path(__file__).resolve().parents[4] / "docs" / "chaos-network.md").read_text(encoding="utf-8")
    listed = page.partition("\n### Of processes")[2].partition("\nA rule, limit or file")[0]
    entries = {entry.partition("`")[0]: entry for entry in listed.split("\n- `")[1:]}
    assert set(entries) == set(FAULTS)
    for name, fault in FAULTS.items():
        assert [parameter for parameter in fault.parameters() if f"`{parameter}`" not in entries[name]] == []
