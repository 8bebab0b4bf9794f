"""Tests of `chaos/verdicts/`."""
