"""All tests here compute on one thread, as a node does by default."""

from __future__ import annotations

from tests.support.nodes.kernels import one_torch_thread

__all__ = ["one_torch_thread"]
