"""Tests of `router/front/schema/`."""
