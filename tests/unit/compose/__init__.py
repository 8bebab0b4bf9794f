"""Mirrors compose/."""
