"""What a run of byte tokens says, as SentencePiece decodes it: characters stay, whatever else is in the run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def text_of_run(data: bytes) -> str:
    """Characters as they are, and U+FFFD for each byte that is part of none."""
    text = ""
    while data:
        lengths = [length for length in range(1, 5) if _is_character(data[:length])]
        text += data[: lengths[0]].decode() if lengths else "\ufffd"
        data = data[lengths[0] if lengths else 1 :]
    return text


def text_of_pieces(pieces: Iterable[str]) -> str:
    """What tokens of SentencePiece's kind say, by their names: `▁` for a blank, `<0x0A>` for a byte."""
    text = ""
    for is_run, group in itertools.groupby(pieces, lambda piece: BYTE_TOKEN.fullmatch(piece) is not None):
        if is_run:
            text += text_of_run(bytes(int(piece[3:5], 16) for piece in group))
        else:
            text += "".join(group).replace("▁", " ")
    return text


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False
