"""What all faults have: a name, what they need, parameters with the values that these may have, and healing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar, Literal, ParamSpec, Self, dataclass_transform, get_args, get_origin, get_type_hints

from chaos.target import Node, Target, TargetError
from chaos.targets.host_commands import missing

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Range:
    """A number may be from `low` to `high`. Whether it must be a whole one is said by the type of the parameter."""

    low: float
    high: float


class UndoList:
    """What a fault has to take back: steps that are run once each, the last first.

    One that fails does not keep the others from running, and is tried again by the next run.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def add(self, step: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> None:
        """Remembers a call: right after what it undoes has been done, or before, where that may stop half-way."""
        self._steps.append(partial(step, *arguments, **named))

    def run(self) -> None:
        """Runs all of them. Raises TargetError with the sentences of those that failed."""
        failures, left = [], []
        while self._steps:
            step = self._steps.pop()
            try:
                step()
            except (TargetError, OSError) as error:
                failures.append(str(error))
                left.append(step)
        self._steps = left[::-1]
        if failures:
            raise TargetError("not healed: " + "; ".join(failures))


@dataclass_transform(field_specifiers=(field,))
@dataclass
class Fault(ABC):
    """One kind of damage. Each subclass with a `name` is in the catalog under it, without being entered anywhere.

    A subclass is a dataclass without saying so. Each public field is a parameter that suites may set. Its default holds
    where they do not, and its annotation says what it may be: `Annotated[float, Range(0.1, 60)]`, `Annotated[int,
    Range(1, 100)]` or `Literal["from", "to"]`.
    """

    name: ClassVar[str]
    """This is what suites and reports write, for example `kill`; the file has the same name."""
    needs: ClassVar[frozenset[str]] = frozenset({"processes"})
    """The target must have these features. One without them skips the fault, and the report says so."""
    programs: ClassVar[tuple[str, ...]] = ()
    """These are run in the network namespace of a node, as root."""
    remark: str = field(default="", init=False, repr=False)
    """What its work has done, where that shows only later. It is in the record once the fault is healed."""
    doubt: str = field(default="", init=False, repr=False)
    """Why its work may not have done what the fault is for. The record has it as well."""
    _undo: UndoList = field(default_factory=UndoList, init=False, repr=False)

    def __init_subclass__(cls) -> None:
        dataclass(cls)

    @classmethod
    def from_suite(cls, values: Mapping[str, Any]) -> Self:
        """Makes the fault. Raises ValueError that names the parameter which is not known or not as it must be."""
        if unknown := values.keys() - cls.parameters().keys():
            raise ValueError(f"{', '.join(sorted(map(str, unknown)))}: not known here")
        return cls(**values)

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """Returns the annotation of each parameter by its name."""
        annotations = get_type_hints(cls, include_extras=True)
        return {parameter.name: annotations[parameter.name] for parameter in fields(cls) if parameter.init}

    def __post_init__(self) -> None:
        for name, annotation in self.parameters().items():
            value = getattr(self, name)
            if not _is_allowed(value, annotation):
                raise ValueError(f"{name}={value!r} must be {allowed_values(annotation)}")

    def unavailable(self, target: Target) -> str:
        """Returns a sentence that says why this machine cannot do it, or nothing if it can."""
        return missing(*self.programs) if self.programs else ""

    def can_hurt(self, node: Node) -> bool:
        """Returns whether the node has now what it hurts. Only such nodes become victims."""
        return True

    @abstractmethod
    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        """Hurts the victims now and returns at once. Raises TargetError if it cannot.

        What must be undone goes into `_undo` right after it was done, or before, where that may stop half-way.
        """

    def heal(self, target: Target) -> None:
        """Undoes all that this object has done. It may be called at any time, also twice, also without `apply`."""
        self._undo.run()


def allowed_values(annotation: Any) -> str:
    """Returns what a parameter with this annotation must be, in words."""
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(get_args(annotation))}"
    sort, limits = annotation.__origin__, annotation.__metadata__[0]
    if sort is int:
        return f"a whole number from {limits.low} to {limits.high}"
    return f"a number from {limits.low:g} to {limits.high:g}"


def _is_allowed(value: Any, annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    sort, limits = annotation.__origin__, annotation.__metadata__[0]
    sorts = int if sort is int else int | float
    return isinstance(value, sorts) and not isinstance(value, bool) and bool(limits.low <= value <= limits.high)
