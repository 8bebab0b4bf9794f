"""Tests of `common/node/`."""
