"""Tests of `router/front/text/`."""
