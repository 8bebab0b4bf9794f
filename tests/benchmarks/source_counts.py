"""How much source there is, and of what shape: counts of a checkout by top-level package, read with ast.

    python -m tests.benchmarks.source_counts
    python -m tests.benchmarks.source_counts --checkout ../before --output before.json
    python -m tests.benchmarks.source_counts --compare before.json

Each physical line counts once: as part of a docstring (also one of an attribute), as part of an import, as a comment
that has its line to itself, as blank, or else as code. A function has its lines from `def` to its end, and its
parameters without `self` and `cls`. `total` is everything but the tests, which are counted beside it.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from statistics import median

from tests.benchmarks.checkout_mesh import THIS_CHECKOUT, commit_of

PACKAGES = ("common", "services", "compose", "chaos")
TESTS = "tests"
KINDS = ("code", "docstring", "import", "comment", "blank")
LONG_FILE_LINES = (400, 600)
SHORT_FILE_LINES = 50
LONG_FUNCTION_LINES = (25, 40)
MANY_PARAMETERS = 7
MANY_FILES = 12
Function = ast.FunctionDef | ast.AsyncFunctionDef
Counts = dict[str, float]


@dataclass(frozen=True)
class SourceFile:
    """What is counted in one file."""

    path: PurePosixPath
    """Inside the checkout."""
    lines_by_kind: Mapping[str, int]
    num_classes: int
    function_lines: tuple[int, ...]
    function_parameters: tuple[int, ...]
    imports: frozenset[str]
    """Dotted names; `from a import b` counts as `a` and `a.b`."""

    @property
    def num_lines(self) -> int:
        return sum(self.lines_by_kind.values())

    @property
    def module(self) -> str:
        """Returns its dotted name; a package has its own name, not `__init__`."""
        parts = self.path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_source(path: PurePosixPath, text: str) -> SourceFile:
    """Counts one file. Raises SyntaxError where it is no Python."""
    tree = ast.parse(text, filename=str(path))
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    return SourceFile(
        path=path,
        lines_by_kind=lines_by_kind(tree, text),
        num_classes=sum(isinstance(node, ast.ClassDef) for node in ast.walk(tree)),
        function_lines=tuple((node.end_lineno or node.lineno) - node.lineno + 1 for node in functions),
        function_parameters=tuple(_num_parameters(node) for node in functions),
        imports=frozenset(_imports(tree)),
    )


def lines_by_kind(tree: ast.Module, text: str) -> dict[str, int]:
    """Returns how many physical lines are what; together they are all lines."""
    docstrings = _lines_of(tree, _is_docstring)
    imports = _lines_of(tree, lambda node: isinstance(node, ast.Import | ast.ImportFrom))
    # Blank lines and hashes inside of a string are neither blank nor comments.
    strings = _lines_of(tree, lambda node: isinstance(node, ast.Constant | ast.JoinedStr))
    kinds: Counter[str] = Counter()
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if number in docstrings:
            kinds["docstring"] += 1
        elif number in imports:
            kinds["import"] += 1
        elif number not in strings and not stripped:
            kinds["blank"] += 1
        elif number not in strings and stripped.startswith("#"):
            kinds["comment"] += 1
        else:
            kinds["code"] += 1
    return {kind: kinds[kind] for kind in KINDS}


def _is_docstring(node: ast.AST) -> bool:
    """Whether it is a string that stands by itself: of a module, class, function or attribute."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _lines_of(tree: ast.Module, is_meant: Callable[[ast.AST], bool]) -> set[int]:
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt | ast.expr) and is_meant(node)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def _num_parameters(function: Function) -> int:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    named = names[1:] if names and names[0] in ("self", "cls") else names
    starred = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return len(named) + len(arguments.kwonlyargs) + len(starred)


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def used_by_one_sibling(files: Sequence[SourceFile]) -> list[SourceFile]:
    """Returns the files that one module of their folder imports, and no other module of `files`."""
    users: dict[str, set[PurePosixPath]] = {file.module: set() for file in files}
    for file in files:
        for name in file.imports & users.keys() - {file.module}:
            users[name].add(file.path)
    return [
        file
        for file in files
        if file.path.name != "__init__.py" and [user.parent for user in users[file.module]] == [file.path.parent]
    ]


def counts_of(files: Sequence[SourceFile], alone: frozenset[PurePosixPath]) -> Counts:
    """Returns the counts of some files; `alone` are the paths of those that one sibling alone uses."""
    lengths = [file.num_lines for file in files]
    function_lines = [lines for file in files for lines in file.function_lines]
    folders = Counter(file.path.parent for file in files)
    counts: Counts = {"files": len(files), "lines": sum(lengths)}
    counts |= {kind: sum(file.lines_by_kind[kind] for file in files) for kind in KINDS}
    counts |= {f"{kind}, % of lines": _percent(counts[kind], counts["lines"]) for kind in KINDS}
    counts |= {"folders": len(folders), f"folders over {MANY_FILES} files": _over(folders.values(), MANY_FILES)}
    counts |= {"lines of a file, median": median(lengths or [0]), "lines of the longest file": max(lengths, default=0)}
    counts |= {f"files over {limit} lines": _over(lengths, limit) for limit in LONG_FILE_LINES}
    counts[f"files under {SHORT_FILE_LINES} lines"] = sum(length < SHORT_FILE_LINES for length in lengths)
    counts["files that one sibling alone uses"] = sum(file.path in alone for file in files)
    counts |= {"classes": sum(file.num_classes for file in files), "functions": len(function_lines)}
    counts |= {f"functions over {limit} lines": _over(function_lines, limit) for limit in LONG_FUNCTION_LINES}
    parameters = [number for file in files for number in file.function_parameters]
    counts[f"functions over {MANY_PARAMETERS} parameters"] = _over(parameters, MANY_PARAMETERS)
    return counts


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 1) if whole else 0.0


def _over(values: Iterable[int], limit: int) -> int:
    return sum(value > limit for value in values)


def count_all(files: Sequence[SourceFile]) -> dict[str, Counts]:
    """Returns the counts by package, of them together as `total`, and of the tests."""
    written = [file for file in files if file.path.parts[0] in PACKAGES]
    alone = frozenset(file.path for file in used_by_one_sibling(written))
    groups = {package: [file for file in written if file.path.parts[0] == package] for package in PACKAGES}
    groups |= {"total": written, TESTS: [file for file in files if file.path.parts[0] == TESTS]}
    return {name: counts_of(group, alone) for name, group in groups.items()}


def read_checkout(checkout: Path) -> list[SourceFile]:
    """Reads every source file of the project; a package that is not there has none."""
    paths = [path for package in (*PACKAGES, TESTS) for path in sorted((checkout / package).rglob("*.py"))]
    return [
        read_source(PurePosixPath(path.relative_to(checkout).as_posix()), path.read_text(encoding="utf-8"))
        for path in paths
        if "__pycache__" not in path.parts
    ]


def table(counts: Mapping[str, Counts]) -> str:
    """Returns Markdown with a column for each package."""
    lines = [f"| | {' | '.join(counts)} |", "| --- |" + " ---: |" * len(counts)]
    lines += [f"| {row} | {' | '.join(f'{found[row]:g}' for found in counts.values())} |" for row in counts["total"]]
    return "\n".join(lines)


def comparison_table(before: Mapping[str, Counts], after: Mapping[str, Counts]) -> str:
    """Returns Markdown: the totals of two checkouts and their ratio."""
    lines = ["| total | before | after | after : before |", "| --- | ---: | ---: | ---: |"]
    for row, new in after["total"].items():
        old = before["total"].get(row)
        ratio = f"{new / old:.3f}" if old else "-"
        lines.append(f"| {row} | {'-' if old is None else f'{old:g}'} | {new:g} | {ratio} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the module says."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.source_counts", description=__doc__)
    parser.add_argument("--checkout", type=Path, default=THIS_CHECKOUT, help="default: this one")
    parser.add_argument("--output", type=Path, help="also write JSON there")
    parser.add_argument("--compare", type=Path, metavar="JSON", help="what an earlier run wrote: also print ratios")
    parsed = parser.parse_args(arguments)
    counts = count_all(read_checkout(parsed.checkout))
    if not counts["total"]["files"]:
        parser.error(f"{parsed.checkout} has no source of this project")
    print(table(counts))
    if parsed.compare:
        print("\n" + comparison_table(json.loads(parsed.compare.read_text())["counts"], counts))
    if parsed.output:
        document = {"commit": commit_of(parsed.checkout), "counts": counts}
        parsed.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
