"""Tests of `router/journal/`."""
