"""A deployment that is known by its address only: it can be asked, and nothing can be done to it."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from chaos.target import Node, TargetError


@dataclass(frozen=True, slots=True)
class RemoteTarget:
    """`--against URL` without another target: load and verdicts, all faults are skipped."""

    url: str
    features: frozenset[str] = frozenset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def nodes(self) -> list[Node]:
        return []

    def signal(self, node: Node, number: int) -> None:
        raise TargetError(f"{node.name} cannot be reached: only {self.url} is known of this deployment")

    def stop(self, node: Node, timeout_s: float) -> None:
        self.signal(node, 0)

    def start(self, name: str) -> None:
        raise TargetError(f"{name} cannot be reached: only {self.url} is known of this deployment")

    def scale(self, kind: str, count: int) -> None:
        raise TargetError(f"{kind} cannot be scaled: only {self.url} is known of this deployment")
