"""Tests of `common/checkpoint/`."""
