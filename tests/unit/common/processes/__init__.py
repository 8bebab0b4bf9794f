"""Tests of `common/processes/`."""
