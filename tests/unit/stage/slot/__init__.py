"""Tests of `stage/slot/`."""
