"""Environment variables that are nearly a setting: a typo is named, since by itself it changes nothing. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

SHORT = 3
"""Names up to this length resemble many that other programs read, as TMP does TP: they need a number."""
OTHERS = frozenset({"MODELS", "HOSTS", "PORTS", "DEVICES", "RPORT", "LPORT", "XHOST", "RHOST", "LHOST", "POST", "PART"})
"""One edit from a setting, and some other program's."""
PREFIX = "MOEMESH_"
"""Some names begin with it, and most do not."""
OF_KUBERNETES = "MOEMESH_PORT"
"""Every pod of a namespace gets it, with a URL, where a Service is named `moemesh`."""


def misspelt_settings(environment: Mapping[str, str], settings: Collection[str]) -> list[str]:
    """Returns a sentence for each variable that is one edit from the name of a setting (a letter that is missing, too
    many, another one, or two that are swapped), or is one, or nearly, but for our prefix. `settings`: their names in
    capitals."""
    sentences = []
    for name, value in sorted(environment.items()):
        upper = name.upper()
        bare = upper.removeprefix(PREFIX)
        if not value or upper in settings or upper in OTHERS:
            continue
        if upper == OF_KUBERNETES and "://" in value:
            continue
        near = [
            setting
            for setting in sorted(settings)
            if (is_one_edit(upper, setting) and (len(setting) > SHORT or value.isdecimal()))
            or (bare != upper and (bare == setting or is_one_edit(bare, setting)))
        ]
        if near:
            sentences.append(f"{name}={value} is not a setting and has no effect; did you mean {' or '.join(near)}?")
    return sentences


def is_one_edit(given: str, wanted: str) -> bool:
    """Returns whether one letter less, more or other, or two neighbours that are swapped, make one word of the
    other."""
    while given and wanted and given[0] == wanted[0]:
        given, wanted = given[1:], wanted[1:]
    while given and wanted and given[-1] == wanted[-1]:
        given, wanted = given[:-1], wanted[:-1]
    return max(len(given), len(wanted)) == 1 or (len(given) == 2 and given == wanted[::-1])
