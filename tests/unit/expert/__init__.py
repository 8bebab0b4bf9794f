"""Mirrors services/expert."""
