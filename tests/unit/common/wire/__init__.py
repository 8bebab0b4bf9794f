"""Tests of `common/wire/`."""
