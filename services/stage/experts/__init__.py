"""Calls of expert nodes: rows out to them, late answers, and the sum of what comes back."""
