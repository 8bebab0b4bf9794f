"""The pages: short lines, links that lead somewhere, and lists that are held against the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from common.config import Settings
from tests.architecture.sources import ROOT, modules

WIDTH = 120
CELL_WORDS = 40
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "compose").rglob("*.md")])
OF_OTHER_TIMES = ("CHANGELOG.md", "docs/log.md")
"""What these say of files is true of the day on which it was written."""
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
SOURCE_PATH = re.compile(r"`((?:common|services|compose|chaos|tests|docs)/[\w./-]+|[\w/]+\.py)`")
READING = re.compile(r"^\d+\. `(?P<path>[\w./]+)` \(about (?P<lines>\d+) lines\):", re.MULTILINE)
METRIC = re.compile(r"moemesh_[a-z_]*[a-z]")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines outside code blocks. Lists are not indented so far that they look like code."""
    fenced, before, in_list = False, "", False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            fenced = not fenced
        if line.strip() and not line.startswith(" "):
            in_list = re.match(r"([-*]|\d+\.) ", line) is not None
        is_code = fenced or (line.startswith("    ") and not in_list)
        if not is_code:
            yield number, line
        before = line
    assert not fenced, f"{page}: a code block has no end, after {before!r}"


def headings(page: Path) -> set[str]:
    """As GitHub's anchors."""
    found = [line.lstrip("#").strip() for _, line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_has_short_lines_and_no_essays_in_tables(page: Path) -> None:
    assert [number for number, line in prose(page) if len(line) > WIDTH] == []
    rows = [(number, line) for number, line in prose(page) if line.startswith("|")]
    cells = [(number, cell) for number, row in rows for cell in row.strip("|").split(" | ")]
    assert [number for number, cell in cells if len(cell.split()) > CELL_WORDS] == []


def is_pattern(path: str) -> bool:
    """Whether a part of it stands for any name, as in `services/X`."""
    return any(part.partition(".")[0].isupper() for part in path.split("/"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_link_leads_to_a_file_and_to_a_heading_of_it(page: Path) -> None:
    lost = []
    for _, line in prose(page):
        for match in LINK.finditer(line):
            path, _, anchor = match["target"].partition("#")
            if "://" in path:
                continue
            there = (page.parent / path).resolve() if path else page
            if not there.exists() or (anchor and anchor not in headings(there)):
                lost.append(match["target"])
    assert lost == []


@pytest.mark.parametrize("page", [page for page in PAGES if name_of(page) not in OF_OTHER_TIMES], ids=name_of)
def test_a_file_that_a_page_names_is_there(page: Path) -> None:
    named = {match for _, line in prose(page) for match in SOURCE_PATH.findall(line)}
    sources = [f"/{module.path.relative_to(ROOT)}" for module in modules()]
    lost = [path for path in sorted(named) if not (ROOT / path).exists() and not is_pattern(path)]
    # A short name stands for a file whose folder the page has named before.
    assert [path for path in lost if not any(source.endswith(f"/{path}") for source in sources)] == []


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_files_to_read_first_are_as_long_as_the_page_says() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    said = {match["path"]: int(match["lines"]) for match in READING.finditer(page)}
    assert len(said) == 10
    lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in said}
    assert {path: lines[path] for path in said if abs(lines[path] - said[path]) > 0.1 * lines[path]} == {}


def settings_on_the_page() -> dict[str, str]:
    """Name and text of each entry."""
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8").partition("## What is not a setting")[0]
    return {entry.partition("`")[0].lower(): entry for entry in page.split("\n- `")[1:]}


def test_the_page_of_settings_has_every_setting_and_no_other() -> None:
    assert settings_on_the_page().keys() == Settings.model_fields.keys()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_page_of_settings_has_the_default_and_the_choices(name: str) -> None:
    field, entry = Settings.model_fields[name], settings_on_the_page()[name]
    if name != "model" and field.default != "":
        assert f"default `{field.default}`" in entry
    for choice in get_args(field.annotation):
        assert f"`{choice}`" in entry


def test_the_page_of_metrics_has_every_metric_and_no_other() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "services").rglob("*.py")]
    made = {name.removesuffix("_total") for text in sources for name in re.findall(r'"(moemesh_[a-z_]+)"', text)}
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").replace("`moemesh_hop_*`", "")
    assert {name.removesuffix("_total") for name in METRIC.findall(page)} == made


def test_an_event_that_the_page_of_operations_names_is_logged() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    logs = page.partition("\n## Logs")[2].partition("\n## ")[0]
    named = {
        name for entry in re.findall(r"^- (`[^(:]*)", logs, re.MULTILINE) for name in re.findall(r"`(\w+)`", entry)
    }
    sources = "".join(
        path.read_text(encoding="utf-8")
        for path in [*(ROOT / "services").rglob("*.py"), *(ROOT / "common").rglob("*.py")]
    )
    assert len(named) > 50
    assert [name for name in sorted(named) if f'"{name}"' not in sources] == []
