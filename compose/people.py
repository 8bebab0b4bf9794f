"""What commands say to people on stderr: whole sentences, each in one line, whoever reads them."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

PIPE_WIDTH = 1000
"""Of a table that no terminal shows: nothing is folded, for programs that look for lines."""

console = Console(stderr=True)


def say(sentence: str) -> None:
    """As it is: a pipe has no width to wrap at, and brackets in it are no markup."""
    console.print(Text(sentence), soft_wrap=True)


def say_error(sentence: str) -> None:
    """Why a command cannot go on."""
    console.print(Text.assemble(("moemesh:", "red"), " ", sentence), soft_wrap=True)


def table_console() -> Console:
    """For tables on stdout."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
