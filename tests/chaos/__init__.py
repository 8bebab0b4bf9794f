"""Faults of the harness applied to real sockets, processes and containers, and healed."""
