"""Every wait has a limit: the list in docs/failure-model.md, held against the code and against the tests."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WAIT = re.compile(r"\*\*(?P<who>[^*]+):\*\* (?P<limit>.*\bthen\b.*)\. Test: `(?P<test>\w+)`\.")
LIMIT = re.compile(r"(?P<seconds>[\d.]+) s[^()|`]*\(`(?P<module>[\w.]+):(?P<name>[\w.]+)`\)")


def waits() -> list[str]:
    """The entries of the list, each in one line."""
    page = (ROOT / "docs" / "failure-model.md").read_text()
    section = page.partition("## Every wait and its limit")[2].partition("\n## ")[0]
    entries = section.partition("\n\nOne wait has no limit")[0].split("\n- ")[1:]
    return [" ".join(entry.split()) for entry in entries]


def limits() -> list[tuple[float, str, str]]:
    return [
        (float(match["seconds"]), match["module"], match["name"]) for wait in waits() for match in LIMIT.finditer(wait)
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


@pytest.mark.parametrize("wait", waits(), ids=lambda wait: wait.partition(":**")[0].strip("*"))
def test_a_wait_has_a_limit_an_end_and_a_test_that_lets_it_run_out(wait: str) -> None:
    said = WAIT.fullmatch(wait)
    assert said is not None, "**who:** limit, then what. Test: `name`."
    assert re.search(r"\d s", said["limit"].partition("then ")[0]), "a limit is a number"
    name = said["test"]
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if f"def {name}(" in path.read_text()]
    assert len(found) == 1, f"{name} is in {found}"


def test_the_list_is_read() -> None:
    assert len(waits()) > 15
    assert len(limits()) >= len(waits()) - 1
