"""Tests of the shared compute kernels."""
