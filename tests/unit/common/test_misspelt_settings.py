"""A variable that is nearly a setting is named; those of other programs are not."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import Settings, setting_names
from common.misspelt_settings import OTHERS, SHORT, is_one_edit, misspelt_settings

NAMES = setting_names()
COMMON = {
    "PATH": "/bin",
    "HOME": "/root",
    "HOSTNAME": "box",
    "HOSTTYPE": "x86_64",
    "TZ": "UTC",
    "TMP": "/tmp",
    "TMPDIR": "/tmp",
    "TERM": "xterm",
    "CPP": "cpp",
    "PS1": "$ ",
    "PWD": "/",
    "SHLVL": "1",
    "OMP_NUM_THREADS": "4",
    "CUDA_VISIBLE_DEVICES": "0",
    "LOGNAME": "root",
    "DISPLAY": ":0",
    "NTP": "no",
    "MODELS": "x",
    "HTTP_PROXY": "x",
    "CI": "1",
}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("EXPERT", "EXPERTS"),
        ("EXPERTSS", "EXPERTS"),
        ("EXPRETS", "EXPERTS"),
        ("expert", "EXPERTS"),
        ("MODLE", "MODEL"),
        ("STAGE", "STAGES"),
        ("SPARE", "SPARES"),
        ("STATEDIR", "STATE_DIR"),
        ("MAX_CONTEXT_TOKEN", "MAX_CONTEXT_TOKENS"),
        ("LOG-LEVEL", "LOG_LEVEL"),
        ("TPP", "PP or TP"),
        ("MOEMESH_CACHES", "MOEMESH_CACHE"),
        ("MOEMESH_EXPERTS", "EXPERTS"),
        ("moemesh_port", "PORT"),
        ("MOEMESH_EXPERT", "EXPERTS"),
        ("MOEMESH_ULR", "MOEMESH_URL"),
    ],
)
def test_a_typo_is_named_with_what_is_meant(name: str, meant: str) -> None:
    (sentence,) = misspelt_settings(COMMON | {name: "3"}, NAMES)
    assert sentence == f"{name}=3 is not a setting and has no effect; did you mean {meant}?"


def test_variables_of_other_programs_and_settings_themselves_are_not_named() -> None:
    assert misspelt_settings(COMMON | {name: "3" for name in NAMES} | dict.fromkeys(OTHERS, "3"), NAMES) == []
    assert misspelt_settings({"EXPERT": ""}, NAMES) == [], "empty is not set"


def test_every_field_of_the_settings_is_a_name() -> None:
    assert {name.upper() for name in Settings.model_fields} <= NAMES


@st.composite
def edited(draw: st.DrawFn) -> tuple[str, str]:
    """A setting, and one edit of it."""
    name = draw(st.sampled_from(sorted(one for one in NAMES if len(one) > SHORT)))
    place = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from(string.ascii_uppercase + "_"))
    kind = draw(st.sampled_from(["less", "more", "other", "swapped"]))
    swapped = name[:place] + name[place : place + 2][::-1] + name[place + 2 :]
    made = {
        "less": name[:place] + name[place + 1 :],
        "more": name[:place] + letter + name[place:],
        "other": name[:place] + letter + name[place + 1 :],
        "swapped": swapped,
    }
    return name, made[kind]


@given(edited())
def test_any_one_edit_of_any_setting_is_named(pair: tuple[str, str]) -> None:
    name, given_name = pair
    if given_name in NAMES or given_name in OTHERS:
        return
    (sentence,) = misspelt_settings({given_name: "x"}, NAMES)
    assert name in sentence


@given(st.text("ABC_", max_size=6), st.text("ABC_", max_size=6))
def test_one_edit_is_symmetric_and_what_a_slow_count_says(one: str, other: str) -> None:
    letters = "ABC_"
    edits = {one[:i] + one[i + 1 :] for i in range(len(one))}
    edits |= {one[:i] + letter + one[i:] for i in range(len(one) + 1) for letter in letters}
    edits |= {one[:i] + letter + one[i + 1 :] for i in range(len(one)) for letter in letters}
    edits |= {one[:i] + one[i : i + 2][::-1] + one[i + 2 :] for i in range(len(one) - 1)}
    assert is_one_edit(one, other) == is_one_edit(other, one) == (other in edits - {one})


def test_what_kubernetes_says_of_a_service_of_our_name_is_no_typo() -> None:
    assert misspelt_settings({"MOEMESH_PORT": "tcp://10.0.0.7:8000"}, NAMES) == []
    (sentence,) = misspelt_settings({"MOEMESH_PORT": "8000"}, NAMES)
    assert "did you mean PORT?" in sentence
    (sentence,) = misspelt_settings({"MOEMESH_CONTROL": "tcp://10.0.0.7:5550"}, NAMES)
    assert "did you mean CONTROL?" in sentence
