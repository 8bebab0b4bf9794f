"""Tests of `router/front/http/`."""
