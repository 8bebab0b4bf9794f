"""Whose role is whose, by host and pid or by container."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.record.roles import Role, read_roles
from chaos.target import Node

CONTAINER = "0123456789abcdef" * 4
NODES = [Node("stage-0", "stage", 7), Node("stage-1", "stage", 70, CONTAINER), Node("expert-0", "expert", 8)]
SLOT = {"pipeline": 0, "index": 1}


def entry(process: str, role: str, slot: Any = None) -> dict[str, Any]:
    return {"process": process, "role": role, "slot": slot}


def test_a_process_is_found_by_its_pid_and_a_container_by_its_name() -> None:
    document = {
        "nodes": [
            entry("here/7", "holder", SLOT),
            entry("0123456789ab/1", "mirror", SLOT),
            entry("here/8", "expert"),
            entry("here/9", "expert"),
        ]
    }
    roles = read_roles(document, NODES)
    assert roles == {"stage-0": Role("holder", "0/1"), "stage-1": Role("mirror", "0/1"), "expert-0": Role("expert")}
    assert [str(role) for role in roles.values()] == ["holder of 0/1", "mirror of 0/1", "expert"]


@pytest.mark.parametrize("role", ["king", "", None])
def test_a_role_that_nobody_knows_is_none(role: Any) -> None:
    assert read_roles({"nodes": [entry("here/7", role)]}, NODES) == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["nodes", "process", "role", "slot"]), inner)
    ),
    max_leaves=10,
)


@given(document=JSON)
def test_another_answer_tells_no_roles(document: Any) -> None:
    assert all(role.word in ("holder", "mirror", "expert", "spare") for role in read_roles(document, NODES).values())
