"""Tests of `stage/experts/`."""
