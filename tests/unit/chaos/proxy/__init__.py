"""Tests of `chaos/proxy/`."""
