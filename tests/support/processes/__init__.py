"""Processes with a flaw, and what the operating system says about processes."""
