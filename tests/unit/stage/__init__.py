"""Mirrors services/stage."""
