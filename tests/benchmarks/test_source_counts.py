"""Lines, functions and users of files, counted in sources that are made up."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from tests.benchmarks.source_counts import (
    comparison_table,
    count_all,
    main,
    read_checkout,
    read_source,
    used_by_one_sibling,
)

TEXT = '''"""Module.

More of it.
"""

from a import (
    # why
    b,
)

# A comment.
LIMIT = 3  # not a line of its own
"""Of what."""
PAGE = """
# no comment

"""


class Thing:
    """A thing."""

    def method(self, one: int, *rest: int, two: int = 0, **more: int) -> str:
        import os

        return f"""{os.name}

        {b}"""
'''


def test_each_line_counts_once_as_what_it_is() -> None:
    file = read_source(PurePosixPath("common/thing.py"), TEXT)
    assert file.lines_by_kind == {"docstring": 6, "import": 5, "comment": 1, "blank": 6, "code": 10}
    assert file.num_lines == len(TEXT.splitlines())


def test_a_function_has_its_lines_and_its_parameters_without_self() -> None:
    file = read_source(PurePosixPath("common/thing.py"), TEXT)
    assert (file.num_classes, file.function_lines, file.function_parameters) == (1, (6,), (4,))


def test_a_file_is_alone_with_one_user_where_that_lies_in_its_folder() -> None:
    files = [
        read_source(PurePosixPath(path), text)
        for path, text in {
            "common/__init__.py": "",
            "common/kept.py": "",
            "common/shared.py": "",
            "common/far.py": "",
            "common/user.py": "from common import kept\nfrom common.shared import x\n",
            "chaos/other.py": "import common.shared\nfrom common.far import y\n",
        }.items()
    ]
    assert [str(file.path) for file in used_by_one_sibling(files)] == ["common/kept.py"]


def test_totals_leave_tests_out() -> None:
    paths = ("common/a.py", "services/x/b.py", "services/x/c.py", "tests/d.py")
    counts = count_all([read_source(PurePosixPath(path), "x = 1\n\n") for path in paths])
    assert {name: found["files"] for name, found in counts.items()} == {
        "common": 1,
        "services": 2,
        "compose": 0,
        "chaos": 0,
        "total": 3,
        "tests": 1,
    }
    assert (counts["total"]["lines"], counts["total"]["blank, % of lines"]) == (6, 50.0)
    assert counts["total"]["folders"] == 2


def test_what_is_over_a_limit_is_more_than_it() -> None:
    def function(name: str, num_lines: int, parameters: str = "") -> str:
        return f"def {name}({parameters}):\n" + "    pass\n" * (num_lines - 1)

    seven = ", ".join("abcdefg")
    text = function("f", 40, seven) + function("g", 41, f"{seven}, h") + "x = 1\n" * 320
    counts = count_all([read_source(PurePosixPath("chaos/long.py"), text)])["chaos"]
    assert counts["functions over 40 lines"] == 1
    assert counts["functions over 25 lines"] == 2
    assert counts["functions over 7 parameters"] == 1
    assert counts["files over 400 lines"] == 1
    assert counts["files over 600 lines"] == 0


def test_the_table_has_ratios_of_the_totals() -> None:
    before = count_all([read_source(PurePosixPath("common/a.py"), "x = 1\n" * 4)])
    after = count_all([read_source(PurePosixPath("common/a.py"), "x = 1\n" * 3)])
    assert "| lines | 4 | 3 | 0.750 |" in comparison_table(before, after).splitlines()
    assert "| classes | 0 | 0 | - |" in comparison_table(before, after).splitlines()


def test_a_checkout_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "common" / "__pycache__").mkdir(parents=True)
    (tmp_path / "common" / "a.py").write_text("x = 1\n")
    (tmp_path / "common" / "__pycache__" / "b.py").write_text("x = 1\n")
    assert [str(file.path) for file in read_checkout(tmp_path)] == ["common/a.py"]
    assert main(["--checkout", str(tmp_path), "--output", str(tmp_path / "counts.json")]) == 0
    assert main(["--checkout", str(tmp_path), "--compare", str(tmp_path / "counts.json")]) == 0
