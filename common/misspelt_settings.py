"""Environment variables that are nearly a setting: a typo is named, since by itself it changes nothing. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

SHORT = 3
"""Names up to this length resemble many that other programs read, as TMP does TP: they need a number."""
OTHERS = frozenset({"MODELS", "HOSTS", "PORTS", "DEVICES", "RPORT", "LPORT", "XHOST", "RHOST", "LHOST", "POST", "PART"})
"""One edit from a setting, and some other program's."""
PREFIX = "MOEMESH_"
"""Some names begin with it, and most do not."""


def misspelt_settings(environment: Mapping[str, str], settings: Collection[str]) -> list[str]:
    """Returns a sentence for each variable that is one edit from the name of a setting (a letter that is missing, too
    many, another one, or two that are swapped), or is one, or nearly, but for our prefix. `settings`: their names in
    capitals."""
    sentences = []
    for name, value in sorted(environment.items()):
        upper = name.upper()
        if not value or upper in settings or upper in OTHERS:
            continue
        near = [
            setting
            for setting in sorted(settings)
            if (is_one_edit(upper, setting) and (len(setting) > SHORT or value.isdecimal()))
            or (upper.startswith(PREFIX) and _is_near(upper.removeprefix(PREFIX), setting))
        ]
        if near:
            sentences.append(f"{name}={value} is not a setting and has no effect; did you mean {' or '.join(near)}?")
    return sentences


def _is_near(given: str, wanted: str) -> bool:
    return given == wanted or is_one_edit(given, wanted)


def is_one_edit(given: str, wanted: str) -> bool:
    """Returns whether one letter less, more or other, or two neighbours that are swapped, make one word of the
    other."""
    if abs(len(given) - len(wanted)) > 1 or given == wanted:
        return False
    start = next(
        (i for i, (a, b) in enumerate(zip(given, wanted, strict=False)) if a != b), min(len(given), len(wanted))
    )
    rest, wanted_rest = given[start:], wanted[start:]
    if len(rest) != len(wanted_rest):
        longer, shorter = sorted((rest, wanted_rest), key=len, reverse=True)
        return longer[1:] == shorter
    is_swap = rest[:2] == wanted_rest[1::-1] and rest[2:] == wanted_rest[2:]
    return rest[1:] == wanted_rest[1:] or (len(rest) > 1 and is_swap)
