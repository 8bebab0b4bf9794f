"""Tests of `router/mesh/`."""
