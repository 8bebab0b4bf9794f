"""All fault kinds by the name that suites write. One line a fault; nothing registers itself."""

from __future__ import annotations

from collections.abc import Mapping

from chaos.faults.base import FaultMaker
from chaos.faults.cpu_hog import make_cpu_hog
from chaos.faults.flap import make_flap
from chaos.faults.kill import make_kill
from chaos.faults.kill_child import make_kill_child
from chaos.faults.pause import make_pause
from chaos.faults.restart import make_restart
from chaos.faults.rolling_restart import make_rolling_restart
from chaos.faults.scale import make_scale
from chaos.faults.stop import make_stop

FAULTS: Mapping[str, FaultMaker] = {
    "cpu_hog": make_cpu_hog,
    "flap": make_flap,
    "kill": make_kill,
    "kill_child": make_kill_child,
    "pause": make_pause,
    "restart": make_restart,
    "rolling_restart": make_rolling_restart,
    "scale": make_scale,
    "stop": make_stop,
}
