"""Tests of `router/control/experts/`."""
