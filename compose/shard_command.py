"""`moemesh shard`: per-role weight files for hosts that do not share a disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.checkpoint.part import describe_part
from common.errors import MoemeshError
from compose.people import say, say_error
from compose.shard_checkpoint import WrittenPart, shard_checkpoint

DEFAULT_COPIES = 2


def shard(
    model: Annotated[str, typer.Option(envvar="MODEL", help="checkpoint directory or hub name")],
    output: Annotated[Path, typer.Option(help="folder for the parts, new or empty")],
    pp: Annotated[int, typer.Option(envvar="PP", min=1, help="layer ranges, one folder each")] = 2,
    experts: Annotated[int, typer.Option(envvar="EXPERTS", min=1, help="folders with experts")] = 2,
    copies: Annotated[
        int | None,
        typer.Option(envvar="COPIES", min=1, help="folders that hold each expert; default: 2 where possible"),
    ] = None,
) -> None:
    """Cut a checkpoint into folders for the router, each stage and each expert node. Any of them can be a MODEL."""
    try:
        written = shard_checkpoint(
            model, output, pp, experts, copies or min(DEFAULT_COPIES, experts), lambda part: _say_begin(part, output)
        )
    except MoemeshError as error:
        say_error(str(error))
        raise typer.Exit(1) from None
    for part in written:
        print(f"{output / part.name}: {describe_part(part.part)}, {part.num_bytes} bytes")


def _say_begin(part: WrittenPart, output: Path) -> None:
    say(f"writing {output / part.name}")
