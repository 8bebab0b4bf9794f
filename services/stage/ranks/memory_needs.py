"""Whether a group of another degree has room. Pure: bytes in, a sentence out ("" where nothing is against it).

On a host ranks share memory and hold each weight once together, at any degree. On devices each rank has a memory of its
own: fewer ranks need more of it each, and K and V are on the host while heads change hands.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Free:
    """What may be taken now."""

    host_bytes: int
    device_bytes: int | None
    """What may be taken of each rank's device; None: ranks are on the host."""


def num_memories(degree: int, num_kv_heads: int) -> int:
    """Returns how often one rank's device counts for what a router plans with: several ranks have the same K and V
    where there are fewer KV heads than ranks."""
    return min(degree, num_kv_heads)


def against_growth(part_bytes: int, degree: int, next_degree: int, kv_bytes: int, free: Free) -> str:
    """Returns what is against loading the parts of more ranks beside those in use. `part_bytes`: a rank's weights now;
    `kv_bytes`: K and V that hold something, of all ranks."""
    if free.device_bytes is None:
        needed = part_bytes * degree
        if needed > free.host_bytes:
            return f"the parts of more ranks take {needed} bytes beside these, {free.host_bytes} are free"
        return ""
    needed = part_bytes * degree // next_degree
    if needed > free.device_bytes:
        return f"the part of one of {next_degree} ranks takes {needed} bytes, its GPU has {free.device_bytes} free"
    if kv_bytes > free.host_bytes:
        return f"K and V take {kv_bytes} bytes on the host while they change hands, {free.host_bytes} are free"
    return ""


def against_degree(weight_bytes: int, kv_bytes: int, num_kv_heads: int, degree: int, capacity_bytes: int) -> str:
    """Returns what is against going on with `degree` ranks on devices. Bytes are of all of them together, the capacity
    that of each; 0: not known."""
    needed = weight_bytes // degree + kv_bytes // num_memories(degree, num_kv_heads)
    if not capacity_bytes or needed <= capacity_bytes:
        return ""
    return f"with {degree} ranks each needs {needed} bytes, its GPU offers {capacity_bytes}"
