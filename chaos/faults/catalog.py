"""All fault kinds by the name that suites write. One line a fault; nothing registers itself."""

from __future__ import annotations

from collections.abc import Mapping

from chaos.faults.base import FaultMaker

FAULTS: Mapping[str, FaultMaker] = {}
