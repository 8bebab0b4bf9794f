"""All fault kinds by the name that suites write. One line a fault; nothing registers itself."""

from __future__ import annotations

from collections.abc import Mapping

from chaos.faults.bandwidth import make_bandwidth
from chaos.faults.base import FaultMaker
from chaos.faults.clock_jump import make_clock_jump
from chaos.faults.cpu_hog import make_cpu_hog
from chaos.faults.cpu_quota import make_cpu_quota
from chaos.faults.cut import make_cut_fault
from chaos.faults.delay import make_delay
from chaos.faults.disk_full import make_disk_full
from chaos.faults.flap import make_flap
from chaos.faults.frames import make_frames
from chaos.faults.freeze import make_freeze
from chaos.faults.half_close import make_half_close
from chaos.faults.host_loss import make_host_loss
from chaos.faults.kill import make_kill
from chaos.faults.kill_child import make_kill_child
from chaos.faults.link_down import make_link_down
from chaos.faults.lose_files import make_lose_files
from chaos.faults.loss import make_loss
from chaos.faults.memory_limit import make_memory_limit
from chaos.faults.pause import make_pause
from chaos.faults.pause_child import make_pause_child
from chaos.faults.restart import make_restart
from chaos.faults.rolling_restart import make_rolling_restart
from chaos.faults.scale import make_scale
from chaos.faults.stall import make_stall
from chaos.faults.stop import make_stop

FAULTS: Mapping[str, FaultMaker] = {
    "bandwidth": make_bandwidth,
    "clock_jump": make_clock_jump,
    "cpu_hog": make_cpu_hog,
    "cpu_quota": make_cpu_quota,
    "cut": make_cut_fault,
    "delay": make_delay,
    "disk_full": make_disk_full,
    "flap": make_flap,
    "frames": make_frames,
    "freeze": make_freeze,
    "half_close": make_half_close,
    "host_loss": make_host_loss,
    "kill": make_kill,
    "kill_child": make_kill_child,
    "pause_child": make_pause_child,
    "link_down": make_link_down,
    "lose_files": make_lose_files,
    "loss": make_loss,
    "memory_limit": make_memory_limit,
    "pause": make_pause,
    "restart": make_restart,
    "rolling_restart": make_rolling_restart,
    "scale": make_scale,
    "stall": make_stall,
    "stop": make_stop,
}
