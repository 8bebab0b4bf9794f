"""Panics of the tokenizers library as errors.

Its Rust code panics where a checkpoint brings it into a corner (a decoder that strips the end of a token without text,
for one). Python gets that as an exception that is no `Exception`: it passes everybody who ends a request that has
failed, and the client would wait for ever.
"""

from __future__ import annotations

from types import TracebackType

from common.errors import ExecutionError

_PANIC = "PanicException"
"""Its module cannot be imported."""


class _PanicsAreErrors:
    """A class, since a generator would cost more than what it guards."""

    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and kind.__name__ == _PANIC:
            raise ExecutionError(f"the tokenizer of this checkpoint failed: {error}") from error


panics_are_errors = _PanicsAreErrors()
"""A context in which a panic becomes an ExecutionError."""
