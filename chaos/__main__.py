"""Runs the harness: `python -m chaos run ...`."""

from __future__ import annotations

from chaos.command import app

if __name__ == "__main__":
    app(prog_name="python -m chaos")
