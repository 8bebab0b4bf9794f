"""Every wait has a limit: the table in docs/failure-model.md, held against the code and against the tests."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = re.compile(r"(?P<seconds>[\d.]+) s[^()|`]*\(`(?P<module>[\w.]+):(?P<name>[\w.]+)`\)")


def rows() -> list[list[str]]:
    """Cells of the table, without its head."""
    page = (ROOT / "docs" / "failure-model.md").read_text()
    section = page.partition("## Every wait and its limit")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def limits() -> list[tuple[float, str, str]]:
    return [
        (float(match["seconds"]), match["module"], match["name"]) for row in rows() for match in LIMIT.finditer(row[1])
    ]


@pytest.mark.parametrize(("seconds", "module", "name"), limits(), ids=lambda value: str(value).rpartition(".")[2])
def test_a_limit_is_what_the_page_says(seconds: float, module: str, name: str) -> None:
    owner = importlib.import_module(module)
    holder, _, field = name.rpartition(".")
    if holder:
        made = getattr(owner, holder)
        fields = getattr(made, "model_fields", None) or made.__dataclass_fields__
        value = fields[field].default / (1000 if field.endswith("_ms") else 1)
    else:
        value = getattr(owner, field)
    assert value == seconds


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_wait_has_a_limit_an_end_and_a_test_that_lets_it_run_out(row: list[str]) -> None:
    waits, limit, then, test = row
    assert waits
    assert re.search(r"\d s", limit), "a limit is a number"
    assert then
    name = test.strip("`")
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if f"def {name}(" in path.read_text()]
    assert len(found) == 1, f"{name} is in {found}"


def test_the_table_is_read() -> None:
    assert len(rows()) > 15
    assert len(limits()) >= len(rows()) - 1
