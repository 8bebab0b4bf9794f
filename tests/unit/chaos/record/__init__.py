"""Tests of `chaos/record/`."""
