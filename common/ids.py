"""Names of things. Four counters tell "which one now"; names and addresses identify no process."""

from __future__ import annotations

from typing import NewType

NodeId = NewType("NodeId", str)
"""A node process as people see it, for example `stage-3f9a`; unique in a mesh because it ends in the incarnation."""

Incarnation = NewType("Incarnation", int)
"""One start of one process: 63 random bits drawn at start."""

RouterTerm = NewType("RouterTerm", int)
"""Grows by one with every start of a router on the same state folder; older routers are fenced."""

LeaseTerm = NewType("LeaseTerm", int)
"""Who holds a pipeline slot now; an older term is fenced."""

Generation = NewType("Generation", int)
"""A pipeline's count: it grows when any of its slots changes hands."""

PipelineId = NewType("PipelineId", int)
SlotIndex = NewType("SlotIndex", int)
StepId = NewType("StepId", int)
RequestId = NewType("RequestId", str)
SequenceId = NewType("SequenceId", int)
"""A request's number on the wire: drawn by the router, unique in its term, never reused."""
