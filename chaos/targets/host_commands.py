"""Programs of this machine (ip, iptables, tc, docker): what they answer, or why they cannot be run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from chaos.target import TargetError

COMMAND_TIMEOUT_S = 20.0


def run(
    words: Sequence[str], environment: Mapping[str, str] | None = None, timeout_s: float = COMMAND_TIMEOUT_S
) -> str:
    """Runs a program and returns its output. Raises TargetError with what it said."""
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise TargetError(f"{words[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise TargetError(f"{' '.join(words)}: not finished after {timeout_s:.0f} s") from None
    if done.returncode != 0:
        raise TargetError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def missing(*programs: str) -> str:
    """Returns what keeps this process from running these programs in another's namespace, or "" if nothing does."""
    if os.geteuid() != 0:
        return "only root may enter a node's network namespace"
    absent = [program for program in programs if shutil.which(program) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""
