"""The project's modules and what each imports, read with ast: nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "services", "compose", "chaos", "tests")


@dataclass(frozen=True)
class Module:
    """One source file."""

    path: Path
    name: str
    """Dotted; a package has its own name, not `__init__`."""
    imports: frozenset[str]
    """Dotted names of modules, also of imports inside functions; `from a import b` counts as `a` and `a.b`."""
    docstring: str | None
    num_lines: int

    @property
    def package(self) -> str:
        """`services.router.front` for `services.router.front.routes`."""
        return self.name.rpartition(".")[0]

    def is_in(self, *packages: str) -> bool:
        """Whether the module is one of these packages or below one."""
        return any(self.name == package or self.name.startswith(f"{package}.") for package in packages)

    def imports_any(self, *names: str) -> list[str]:
        """What it imports of these modules or from below them."""
        return sorted(
            imported
            for imported in self.imports
            if any(imported == name or imported.startswith(f"{name}.") for name in names)
        )


@cache
def modules() -> tuple[Module, ...]:
    """Every source file of the project, by name."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return tuple(_read(path) for path in paths if "__pycache__" not in path.parts)


def _read(path: Path) -> Module:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=str(path))
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Module(path, name, frozenset(_imports(tree, name)), ast.get_docstring(tree), len(text.splitlines()))


def _imports(tree: ast.Module, importer: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}: relative imports hide the arrow"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
