"""Mirrors services/stage/model."""
