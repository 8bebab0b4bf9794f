"""Tests of `chaos/targets/`."""
